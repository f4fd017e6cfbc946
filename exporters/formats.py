"""The table of formats: a row for each package, which has the modules of
``compress.formats.MEMBERS``.

Formats do not import each other. From ``compress`` they get a ``DecoderConfig``, a ``Plan`` and
``Weights``, from which they read one tensor at a time.

Costs were measured by benchmarks/full_size.py and batch.py.
"""

from __future__ import annotations

from compress.formats import FORMATS, Format, ProcessCost

ROWS = (
    Format(
        "gguf", "GGUF", "exporters.gguf", "a .gguf file",
        ProcessCost(80_000_000, 1.05, 17e-9),
        libraries=("gguf",), tokenizer_inside=True, imatrix=True, hub_root=True,
    ),
    Format(
        "onnx", "ONNX", "exporters.onnx", "an ONNX folder or its .onnx file",
        ProcessCost(100_000_000, 1.65, 7e-9),
        libraries=("onnx", "onnx-ir", "protobuf"), hub_root=True,
    ),
    Format(
        "coreml", "Core ML", "exporters.coreml", "a .mlpackage",
        ProcessCost(290_000_000, 1.15, 11e-9, palette_seconds=26e-9, library_bytes=280_000_000),
        libraries=("coremltools", "protobuf"),
        speed_note="Core ML speeds are those of packlight's own evaluator where there is no macOS.",
        stores_zeros=True, app=True, prompt_call=1 << 20,  # whole
    ),
    Format(
        "coreai", "Core AI", "exporters.coreai", "a Core AI folder or its .aimodel",
        ProcessCost(330_000_000, 9.0, 11e-9, palette_seconds=26e-9, library_bytes=250_000_000),
        speed_note="Core AI speeds are those of a float32 twin in Apple's CPU runtime.",
        stores_zeros=True,
        extra="coreai", extra_module="coreai", app=True, prompt_call=1024,  # as Apple's runner
    ),
    Format(
        "mlx", "MLX", "exporters.mlx", "an MLX folder with config.json",
        ProcessCost(600_000_000, 4.0, 17e-9), extra="mlx", extra_module="mlx_lm",
        speed_note="MLX's quality, speeds and memory are those of packlight's float32 decoder with "
        "the decoded weights; mlx-lm's own code runs on some tokens.",
    ),
)  # fmt: skip

FORMATS.update({row.name: row for row in ROWS})
