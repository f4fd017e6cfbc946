"""Compares packlight's GGUF block grids with llama.cpp's quantizer: speed per core and error.

    python benchmarks/kquant.py [TYPE ...]    # some minutes; writes kquant.json and kquant.md

With types given, only their rows are measured again.
Speed is Mweights per CPU second on one thread, bytes of a GGUF tensor included on both sides, the
best of five, or of as many as fit ten seconds; compiling is not counted. The limit: with an
importance at most three times the CPU seconds of llama.cpp's encoder. Errors are ratios of
packlight's to llama.cpp's (below 1: packlight's is smaller): `weighted` as llama.cpp weights the
squares, `bare` by the importance alone (without one: the plain squared error), each on normal,
Student-t5 and outlier-channel weights.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numba
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent)]

import ggml_oracle  # noqa: E402

# Uses internal names: covers every type of the modules' tables, on one thread.
from compress.grids import codebook, get_grid, kquant  # noqa: E402
from compress.machine import bounded  # noqa: E402

ROWS, COLUMNS, REPEATS, PATIENCE = 256, 4096, 5, 10.0
SLOWEST = 3.0  # times llama.cpp's seconds
TYPES = (*kquant.TYPES, "MXFP4", *codebook.TYPES)


def tensors() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    normal = draw.standard_normal((ROWS, COLUMNS)) * 0.02
    kinds = {
        "normal": normal,
        "t5": draw.standard_t(5, (ROWS, COLUMNS)) * 0.02,
        "outliers": normal * np.where(draw.random(COLUMNS) < 0.01, 20, 1),
    }
    return {kind: values.astype(np.float32) for kind, values in kinds.items()}


def speed(work: Callable[[], object]) -> float:
    """Mweights per CPU second."""
    work()
    best = float("inf")
    spent = 0.0
    for _ in range(REPEATS):
        begin = time.process_time()
        work()
        best = min(best, time.process_time() - begin)
        spent += best
        if spent > PATIENCE:
            break
    return ROWS * COLUMNS / best / 1e6


def measure(name: str, importance: np.ndarray | None) -> dict[str, Any]:
    grid = get_grid(name)
    weights = tensors()
    ours = speed(lambda: grid.quantize(weights["normal"], importance).pack())
    theirs = speed(lambda: ggml_oracle.quantize(name, weights["normal"], importance))
    row: dict[str, Any] = {
        "grid": name,
        "importance": importance is not None,
        "mweights_per_cpu_s": round(ours, 1),
        "llama_cpp_mweights_per_cpu_s": round(theirs, 1),
        "speedup": round(ours / theirs, 2),
    }
    for kind, weight in weights.items():
        decoded = grid.quantize(weight, importance).decode()
        blocks = ggml_oracle.quantize(name, weight, importance)
        squares = (weight.astype(np.float64) - decoded) ** 2
        their_squares = (weight.astype(np.float64) - ggml_oracle.decode(name, blocks)) ** 2
        factor = ggml_oracle.error_weights(name, weight, importance)
        bare = 1.0 if importance is None else importance.astype(np.float64)
        row[f"weighted_{kind}"] = round(
            (factor * squares).sum() / (factor * their_squares).sum(), 4
        )
        row[f"bare_{kind}"] = round((bare * squares).sum() / (bare * their_squares).sum(), 4)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| grid | importance | Mw/CPU-s | llama.cpp | × | weighted error: normal, t5, outliers "
        "| bare error: normal, t5, outliers |",
        "|---|---|---:|---:|---:|---|---|",
    ]
    for row in rows:
        errors = (
            ", ".join(f"{row[f'{which}_{kind}']:.3f}" for kind in ("normal", "t5", "outliers"))
            for which in ("weighted", "bare")
        )
        lines.append(
            f"| {row['grid']} | {'yes' if row['importance'] else 'no'} "
            f"| {row['mweights_per_cpu_s']:.0f} | {row['llama_cpp_mweights_per_cpu_s']:.1f} "
            f"| {row['speedup']:.2f} | {' | '.join(errors)} |"
        )
    return "\n".join(lines)


def bar(rows: list[dict[str, Any]]) -> str:
    """Whether the slowest type is within the bar."""
    weighted = [row for row in rows if row["importance"]]
    slowest = min(weighted, key=lambda row: row["speedup"])
    times = 1 / slowest["speedup"]
    return (
        f"Slowest beside llama.cpp with an importance: {slowest['grid']}, {times:.2f} times its "
        f"CPU seconds (bar {SLOWEST:.0f}): {'pass' if times <= SLOWEST else '**fail**'}."
    )


def main() -> None:
    importance = np.exp(np.random.default_rng(1).standard_normal(COLUMNS)).astype(np.float32)
    names = sys.argv[1:] or TYPES
    measured = [measure(name, given) for name in names for given in (None, importance)]
    kept = json.loads((HERE / "kquant.json").read_text(encoding="utf-8"))["rows"]
    rows = measured + [row for row in kept if row["grid"] not in names]
    rows.sort(key=lambda row: TYPES.index(row["grid"]))
    machine = f"{platform.machine()}, {numba.config.CPU_NAME or 'host CPU'}"
    result = {
        "machine": machine,
        "numba": version("numba"),
        "xllamacpp": version("xllamacpp"),
        "shape": [ROWS, COLUMNS],
        "rows": rows,
    }
    (HERE / "kquant.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = f"{table(rows)}\n\n{bar(rows)}\n"
    (HERE / "kquant.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    with bounded(threads=1):
        main()
