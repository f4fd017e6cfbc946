"""Core AI: the bundle of a language model for iOS 27 and macOS 27, as Apple's runner loads it.

    planning.py    settings → which tensor gets which grid, how it is stored, and its bytes
    graph.py       the decoder as a Core AI graph, operation by operation, from a DecoderConfig
    constants.py   its constants: packed arrays in a file, and views of them
    writer.py      the bundle, streamed
    library.py     all that is private of coreai-core
    bytecode.py    reads names and places of the arrays in a written program
    runtime.py     Apple's CPU runtime, with the float32 twin of the program (twin.py)
    magnitudes.py  the largest values in it, for float16's range
    app.py         what an app needs beside it
    card.py        finds bundles, and how to run them
    inspection.py  describes a bundle from its own metadata

Importing this package does not load coreai-core, an extra: ``pip install 'packlight[coreai]'``.
"""
