"""Where the bits of a real model go furthest: its matrices rounded to nearest, some on 8 bits.

    python benchmarks/real_bits.py CHECKPOINT [--only TEXT ...] [--windows N] [--out FILE]

CHECKPOINT is a folder, e.g. of SmolLM2-135M-Instruct. Nothing is written but FILE (default:
benchmarks/real_bits.json) and its sibling ``.md``: the reference decoder runs on decoded codes, the
embedding always on int8-g32. One row takes seconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Uses internal names: rounds single tensors and runs the float decoder on them.
import exporters  # noqa: F401 -- fills the table of formats
from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import Float32, WeightMap, split_name
from compress.decoder.decoder import Decoder, reader
from compress.grids import get_grid
from compress.plan.job import describe_model
from compress.verify.baseline import log_softmax
from compress.verify.scorer import read_text

LENGTH = 256  # tokens of a window
HIGH = "int8-g32"
Rule = Callable[[int, str, int], bool]
"""``rule(block, role, blocks)``: whether a matrix has 8 bits."""


def ends(block: int, blocks: int) -> bool:
    """The first and the last eighth of the blocks."""
    return block < blocks // 8 or block >= 7 * blocks // 8


def as_mixes(block: int, blocks: int) -> bool:
    """The blocks in which llama.cpp's Q4_K_M gives ``down_proj`` more bits."""
    return ends(block, blocks) or (block - blocks // 8) % 3 == 2


def roles(*names: str) -> Rule:
    return lambda block, role, blocks: role in names


RULES: dict[str, Rule] = {
    "none": roles(),
    "v": roles("v_proj"),
    "k, v": roles("k_proj", "v_proj"),
    "q, k, v": roles("q_proj", "k_proj", "v_proj"),
    "v, o": roles("v_proj", "o_proj"),
    "down in the blocks of Q4_K_M": lambda b, r, n: r == "down_proj" and as_mixes(b, n),
    "v; the last block": lambda b, r, n: r == "v_proj" or b == n - 1,
    "v; down in the first and last eighth": lambda b, r, n: (
        r == "v_proj" or (r == "down_proj" and ends(b, n))
    ),
    "v; down in the blocks of Q4_K_M": lambda b, r, n: (
        r == "v_proj" or (r == "down_proj" and as_mixes(b, n))
    ),
}
ROWS = [
    *(("int4-g32", name) for name in RULES),
    *(("int4-g32-asym", name) for name in ("none", "v", "v; the last block")),
    *((grid, "none") for grid in ("int4-g16", "lut6-g8")),
]


class Model:
    """A checkpoint, its windows of text, and the float model's answers."""

    def __init__(self, path: str, count: int) -> None:
        checkpoint = Checkpoint.open(path)
        self.config = describe_model(checkpoint)
        source = Stored(checkpoint, self.config)
        names = WeightMap(self.config).names(tied_head=False, repeats=False)
        self.weights = {name: source.read(name) for name in names}
        ids = checkpoint.tokenizer.encode(read_text(None))
        step = (len(ids) - LENGTH) // count
        self.windows = [ids[i * step : i * step + LENGTH] for i in range(count)]
        self.float = list(self.answers(self.weights))

    def answers(self, weights: dict[str, Float32]) -> Iterator[Any]:
        """Log-probabilities of each window."""
        decoder = Decoder(self.config, reader(self.config, weights))
        for logits in decoder.stream_logits(self.windows):
            yield log_softmax(logits)

    def row(self, base: str, name: str) -> dict[str, Any]:
        """The figures of one choice of grids."""
        rounded, nbytes = dict(self.weights), 0
        for key, weight in self.weights.items():
            if weight.ndim != 2:
                continue
            block, role, _ = split_name(key)
            high = block is None or RULES[name](block, role, self.config.num_hidden_layers)
            grid = get_grid(HIGH if high else base)
            rounded[key] = grid.quantize(weight).decode()
            nbytes += grid.nbytes((weight.shape[0], weight.shape[1]))
        kl, same, lost, count = 0.0, 0, 0.0, 0
        for ids, expected, found in zip(
            self.windows, self.float, self.answers(rounded), strict=True
        ):
            kl += float((np.exp(expected) * (expected - found)).sum())
            same += int((expected.argmax(1) == found.argmax(1)).sum())
            count += len(ids)
            places = np.arange(len(ids) - 1), np.array(ids[1:])
            lost += float((expected[places] - found[places]).mean()) / len(self.windows)
        return {
            "grid": base,
            "eight_bits": name,
            "bits_per_weight": round(8 * nbytes / self.config.num_parameters, 3),
            "kl_mean": round(kl / count, 4),
            "perplexity_ratio": round(float(np.exp(lost)), 3),
            "top1_agreement": round(same / count, 3),
        }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per row."""
    titles = ("grid", "8 bits", "bits per weight", "mean KL", "perplexity ratio", "top-1")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        figures = f"{row['bits_per_weight']:.2f} | {row['kl_mean']:.4f}"
        more = f"{row['perplexity_ratio']:.3f} | {100 * row['top1_agreement']:.1f} %"
        lines.append(f"| {row['grid']} | {row['eight_bits']} | {figures} | {more} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--only", action="append", help="rows whose 8 bits have this text")
    parser.add_argument("--windows", type=int, default=4, help="of 256 tokens")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    chosen = parser.parse_args()
    model = Model(chosen.model, chosen.windows)
    rows = [
        model.row(base, name)
        for base, name in ROWS
        if not chosen.only or any(text in name for text in chosen.only)
    ]
    chosen.out.write_text(json.dumps(rows, indent=1) + "\n")
    chosen.out.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
