"""The formats: a row each, and a package with the modules that ``compress.formats.MEMBERS`` names.

Formats never see each other, and see of ``compress`` only what they are handed: a
``DecoderConfig``, a ``Plan`` and ``Weights`` to ask for one tensor at a time.

Costs are of benchmarks/full_size.py and batch.py.
"""

from __future__ import annotations

from compress.formats import FORMATS, Format, ProcessCost

ROWS = (
    Format(
        "gguf", "GGUF", "exporters.gguf", "a .gguf file",
        ProcessCost(80_000_000, 1.05, 17e-9),
        libraries=("gguf",), tokenizer_inside=True, imatrix=True,
    ),
    Format(
        "onnx", "ONNX", "exporters.onnx", "an ONNX folder or its .onnx file",
        ProcessCost(100_000_000, 1.65, 7e-9),
        libraries=("onnx", "onnx-ir", "protobuf"),
    ),
    Format(
        "coreml", "Core ML", "exporters.coreml", "a .mlpackage",
        ProcessCost(290_000_000, 1.15, 11e-9, palette_seconds=26e-9, library_bytes=280_000_000),
        libraries=("coremltools", "protobuf"),
        speed_note="Core ML speeds are those of packlight's own evaluator where there is no macOS.",
        stores_zeros=True,
    ),
)  # fmt: skip

FORMATS.update({row.name: row for row in ROWS})
