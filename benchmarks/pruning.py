"""Measures the loss from pruning alone: the pruned float32 model against the whole model.

    python benchmarks/pruning.py                   the bundled demo model
    python benchmarks/pruning.py MODEL --windows 8
    python benchmarks/pruning.py --heal 100        before and after so many steps a block

Prints the table of docs/pruning.md. Nothing is quantized here.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

# Uses internal names: measures the pruned float model, without an artifact.
from compress.calibration.texts import CalibrationSet  # noqa: E402
from compress.checkpoint.checkpoint import Checkpoint, Stored  # noqa: E402
from compress.checkpoint.sources import Source  # noqa: E402
from compress.console import Console  # noqa: E402
from compress.decoder.decoder import Decoder  # noqa: E402
from compress.decoder.tokenizer import Tokenizer, eval_windows  # noqa: E402
from compress.demo import heldout_path, model_path  # noqa: E402
from compress.plan.cut import plan_cut  # noqa: E402
from compress.plan.job import describe_model  # noqa: E402
from compress.pruning.step import prune_source  # noqa: E402
from compress.recipe.model import Prune  # noqa: E402

CASES = (
    {"method": "depth", "blocks": 1},
    {"method": "depth", "blocks": 2},
    {"method": "ffn", "ratio": 0.10, "update": False},
    {"method": "ffn", "ratio": 0.10},
    {"method": "ffn", "ratio": 0.25, "update": False},
    {"method": "ffn", "ratio": 0.25},
    {"method": "ffn", "ratio": 0.50, "update": False},
    {"method": "ffn", "ratio": 0.50},
    {"method": "heads", "ratio": 0.25, "update": False},
    {"method": "heads", "ratio": 0.25},
)
HEALED = (
    {"method": "depth", "blocks": 1},
    {"method": "depth", "blocks": 2},
    {"method": "ffn", "ratio": 0.25},
    {"method": "ffn", "ratio": 0.50},
    {"method": "heads", "ratio": 0.25},
)  # with --heal
COLUMNS = ("pruned", "update", "parameters", "mean KL", "perplexity", "÷ float", "top-1", "CPU s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(model_path()))
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--heal", type=int, default=0, metavar="STEPS")
    options = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(options.model)
    source = Stored(checkpoint, describe_model(checkpoint))
    tokenizer = Tokenizer(checkpoint.path)
    texts = CalibrationSet.load(["builtin"], tokenizer, tokens=16384, sequence_length=512, seed=0)
    text = heldout_path().read_text(encoding="utf-8")
    windows = eval_windows(text, tokenizer, 512, options.windows)
    whole = perplexity(source, windows, source)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    cases: list[dict[str, Any]] = list(CASES)
    if options.heal:
        steps = {"heal": {"steps": options.heal}}
        cases = [case | heal for case in HEALED for heal in ({}, steps)]
    for case in cases:
        cut = plan_cut(source.config, Prune(**case))
        assert cut is not None
        start = time.process_time()
        found = prune_source(source, cut, texts, Console("quiet", False)).source
        seconds = time.process_time() - start
        kl, value, top1 = perplexity(source, windows, found)
        change = cut.config.num_parameters / source.config.num_parameters - 1
        update = "–" if cut.method == "depth" else "least squares" if cut.update else "none"
        update += f", {cut.healing.describe()}" if cut.healing else ""
        cells = (
            cut.describe(), update, f"{change * 100:+.1f} %", f"{kl:.4f}", f"{value:.2f}",
            f"{value / whole[1]:.4f}", f"{top1 * 100:.1f} %", f"{seconds:.0f}",
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)


def perplexity(
    source: Source, windows: list[list[int]], found: Source
) -> tuple[float, float, float]:
    """Mean KL divergence, perplexity and top-1 agreement of ``found``."""
    divergences, losses, same = [], [], []
    pairs = zip(
        windows,
        Decoder(source.config, source.read).stream_logits(windows),
        Decoder(found.config, found.read).stream_logits(windows),
        strict=True,
    )
    for tokens, expected, logits in pairs:
        p = torch.from_numpy(expected).log_softmax(-1)[:-1]
        q = torch.from_numpy(logits).log_softmax(-1)[:-1]
        divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
        losses.append(-float(q.gather(1, torch.tensor(tokens[1:])[:, None]).mean()))
        same.append(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    return float(np.mean(divergences)), float(np.exp(np.mean(losses))), float(np.mean(same))


if __name__ == "__main__":
    main()
