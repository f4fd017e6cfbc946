"""The formats: a row each, and a package with the modules that ``compress.formats.MEMBERS`` names.

Formats never see each other, and see of ``compress`` only what they are handed: a
``DecoderConfig``, a ``Plan`` and ``Weights`` to ask for one tensor at a time.

Costs are of benchmarks/full_size.py and batch.py.
"""

from __future__ import annotations

from compress.formats import FORMATS, Format, ProcessCost

ROWS = (
    Format("gguf", "GGUF", "exporters.gguf", ProcessCost(80_000_000, 1.05, 17e-9), imatrix=True),
    Format("onnx", "ONNX", "exporters.onnx", ProcessCost(100_000_000, 1.65, 7e-9)),
    Format(
        "coreml", "Core ML", "exporters.coreml",
        ProcessCost(290_000_000, 1.15, 11e-9, palette_seconds=26e-9, library_bytes=280_000_000),
        stores_zeros=True,
    ),
)  # fmt: skip

FORMATS.update({row.name: row for row in ROWS})
