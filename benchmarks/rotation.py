"""What rotations are worth on the grids that take them, in the real runtime.

    python benchmarks/rotation.py [MODEL] [--eval-text FILE] [--windows N] [--grid NAME ...]
                                  [--solver NAME ...] [--out DIR]

For each Core ML grid, solver and rotation (none, r1, r2, r1r2) one package is built from MODEL
(default: the bundled demo) and compared with the float model, which is not rotated, on held-out
text. Bytes are those of the file: where R1 unties an embedding, with the head's. Writes
DIR/rotation.json and DIR/rotation.md (default: benchmarks/).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import packlight
from compress.demo import model_path

GRIDS = ("lut4-g8", "lut4-g16", "lut4-tensor", "lut3-g8", "int4-channel")
SOLVERS = ("scale_search", "gptq")
KINDS = ("none", "r1", "r2", "r1r2")


def measure(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build and score everything against one run of the float model."""
    rows = []
    for key in product(chosen.grid or GRIDS, chosen.solver or SOLVERS, KINDS):
        grid, solver, kinds = key
        report = packlight.build(
            chosen.model,
            "phone-4bit",
            formats=["coreml"],
            output=folder / "-".join(key),
            overrides={
                "targets.coreml.grid": grid,
                "targets.coreml.rotate": kinds,
                "quantize.solver": solver,
                "verify.windows": chosen.windows,
            },
            eval_text=chosen.eval_text,
            keep_baseline=folder / "baseline",
            threads=1,
        )
        found = report["coreml"]
        rows.append(
            dict(zip(("grid", "solver", "rotate"), key, strict=True))
            | {
                "bytes": found.bytes,
                "kl_mean": round(found.kl_divergence.mean, 6),
                "kl_mean_se": round(found.kl_divergence.se, 6),
                "kl_p99": round(found.kl_divergence.p99, 5),
                "perplexity_ratio": round(found.perplexity_ratio, 5),
                "top1_agreement": round(found.top1_agreement, 4),
                "scored_tokens": report.baseline.tokens,
            }
        )
    name = Path(chosen.model).name
    return {"model": "packlight-demo" if chosen.model == str(model_path()) else name, "rows": rows}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line per grid and solver, mean KL by rotation."""
    titles = ("grid", "solver", *KINDS)
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for key in dict.fromkeys((row["grid"], row["solver"]) for row in rows):
        found = {row["rotate"]: row for row in rows if (row["grid"], row["solver"]) == key}
        base = found["none"]["kl_mean"]
        cells = [f"{base:.4f} ± {found['none']['kl_mean_se']:.4f}"]
        for kinds in KINDS[1:]:
            cells.append(f"{found[kinds]['kl_mean']:.4f} ({found[kinds]['kl_mean'] / base:.2f})")
        lines.append(f"| {' | '.join((*key, *cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(model_path()))
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--grid", action="append")
    parser.add_argument("--solver", action="append", choices=SOLVERS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="packlight-") as folder:
        document = measure(chosen, Path(folder))
    (chosen.out / "rotation.json").write_text(json.dumps(document, indent=2) + "\n")
    (chosen.out / "rotation.md").write_text(table(document["rows"]))
    print(table(document["rows"]))


if __name__ == "__main__":
    main()
