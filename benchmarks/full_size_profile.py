"""Measures the steps of packing: nanoseconds per weight of each, on one thread.

    python benchmarks/full_size_profile.py full-size/phi-3-mini-4k       # about a minute

The linears of one block, in slabs as the writers read them, on each grid. The time of a step is the
minimum of ``ROUNDS``, since other processes can only add to it. Prints a Markdown table.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

# Uses internal names: times the steps of packing separately.
from compress.checkpoint.checkpoint import Checkpoint  # noqa: E402
from compress.checkpoint.safetensors import read_range  # noqa: E402
from compress.grids import Quantized, get_grid  # noqa: E402
from compress.machine import bounded  # noqa: E402
from exporters.coreml.constants import as_stored  # noqa: E402
from exporters.onnx.packing import pack as pack_onnx  # noqa: E402

# Grid → what its format does with codes and parameters.
GRIDS: dict[str, tuple[str, Callable[[Quantized], Any]]] = {
    "Q4_K": ("GGUF", Quantized.pack),
    "Q6_K": ("GGUF", Quantized.pack),
    "Q4_0": ("GGUF", Quantized.pack),
    "IQ4_XS": ("GGUF", Quantized.pack),
    "int4-g32": ("ONNX", pack_onnx),
    "int4-g128": ("ONNX", pack_onnx),
    "lut4-g16": ("Core ML", as_stored),
}
STEPS = ("read, widen, check", "fit", "encode", "pack")
SLAB = 1 << 22
ROUNDS = 3


def profile(folder: Path, grid_name: str, pack: Callable[[Quantized], Any]) -> list[float]:
    """Nanoseconds per weight of the ``STEPS``, over the linears of block 1."""
    checkpoint, grid = Checkpoint.open(folder), get_grid(grid_name)
    linears = [
        info
        for name, info in checkpoint.tensors.items()
        if ".layers.1." in name and len(info.shape) == 2
    ]
    spent, weights = [0.0] * len(STEPS), 0
    for info in linears:
        rows, columns = min(SLAB // info.shape[1] // 256 * 256, info.shape[0]), info.shape[1]
        weights += rows * columns
        least = [float("inf")] * len(STEPS)
        for _ in range(ROUNDS):
            marks = [time.thread_time()]
            values = read_range(info, 0, rows * columns).reshape(rows, columns)
            marks.append(time.thread_time())
            params = grid.fit(values)
            marks.append(time.thread_time())
            codes = grid.encode(values, params)
            marks.append(time.thread_time())
            pack(Quantized(codes, params, grid, (rows, columns)))
            marks.append(time.thread_time())
            taken = (after - before for before, after in itertools.pairwise(marks))
            least = [min(pair) for pair in zip(least, taken, strict=True)]
        spent = [sum(pair) for pair in zip(spent, least, strict=True)]
    return [1e9 * seconds / weights for seconds in spent]


def main() -> None:
    folder = Path(sys.argv[1])
    print("| grid | format | " + " | ".join(STEPS) + " | sum |")
    print("|---|---|" + "--:|" * (len(STEPS) + 1))
    for name, (format_name, pack) in GRIDS.items():
        found = profile(folder, name, pack)
        shown = " | ".join(f"{value:.2f}" for value in (*found, sum(found)))
        print(f"| {name} | {format_name} | {shown} |", flush=True)


if __name__ == "__main__":
    with bounded(threads=1):
        main()
