"""Packages for the Neural Engine in the MIL evaluator, against the reference decoder.

    python benchmarks/neural_engine.py CHECKPOINT [GRID …]

Prints a row of docs/iphone.md for each grid: bytes, the largest difference of logits in float32,
the KL divergence with every value rounded to float16, top-1 agreement. The reference has the same
constants, so quantization is not in these figures.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from exported import Exports, reference  # noqa: E402

from compress.checkpoint.checkpoint import Checkpoint  # noqa: E402
from exporters.coreml.ane.runtime import Chunks, Evaluators  # noqa: E402
from exporters.coreml.runtime import open_runtime  # noqa: E402

CONTEXT, TOKENS = 512, 256
CALLS = (64, 64, 64, 32, 30, 1, 1)  # whole, padded, and of the other function


def kl_divergence(logits: np.ndarray, other: np.ndarray) -> float:
    """Mean over positions, in nats."""
    p, q = (x.astype(np.float64) - x.max(1, keepdims=True) for x in (logits, other))
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(1).mean())


def measure(checkpoint: Path, grid: str, ids: list[int], folder: Path) -> str:
    """The row of a grid."""
    settings = {"preset": "iphone-ane", "grid": grid, "context": CONTEXT}
    made = Exports(folder).write("coreml", checkpoint, settings)
    expected = reference(made, halves=True).logits(ids)
    count = len(list(made.artifact.path.glob("*.mlpackage")))
    evaluators = Evaluators(fp16=False, threads=1, cache_bytes=1 << 30, count=count)
    chunks = Chunks(made.artifact.path, evaluators.open_function, np.float32)
    state, found, end = chunks.make_state(), [], 0
    for size in CALLS:
        new = np.array([ids[end : end + size]], np.int32)
        end += size
        given = {"inputIds": new, "causalMask": np.zeros((1, 1, 1, end))}
        found.append(chunks.predict(given, state)["logits"][0])
    off = np.abs(np.concatenate(found) - expected).max()
    rounded = open_runtime(made.artifact.path, context=CONTEXT, threads=1).logits(ids)
    top = (expected.argmax(1) == rounded.argmax(1)).mean()
    megabytes = made.artifact.nbytes / 1e6
    return (
        f"| {grid} | {megabytes:.0f} MB | {off:.1e} (of {np.abs(expected).max():.0f}) "
        f"| {kl_divergence(expected, rounded):.1e} | {100 * top:.1f} % |"
    )


def main() -> None:
    checkpoint = Path(sys.argv[1])
    import tokenizers

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = tokenizers.Tokenizer.from_file(str(Checkpoint.open(checkpoint).path / "tokenizer.json"))
    ids = found.encode(text).ids[:TOKENS]
    for grid in sys.argv[2:] or ["F16", "lut6-g32"]:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(checkpoint, grid, ids, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
