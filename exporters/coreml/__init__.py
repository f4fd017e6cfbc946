"""Core ML: one ``.mlpackage`` for iOS 18 and macOS 15, with the names of swift-transformers.

    planning.py   settings → which tensor gets which grid, how it is stored, and its bytes
    graph.py      the decoder as a MIL program, operation by operation, from a DecoderConfig
    constants.py  its constants: placeholders, and weight.bin, written slab by slab
    writer.py     the package, streamed; all that is private of coremltools
    runtime.py    Core ML on macOS, the MIL evaluator elsewhere
    app.py        what an app needs beside it
    card.py       finds packages, and how to run them
    inspection.py describes a package from its own metadata
    evaluator.py  runs a package on any machine; mil*.py, constexpr.py, blobs.py are its parts

Importing this package loads neither coremltools nor torch.
"""
