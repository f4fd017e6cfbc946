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
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import exporters  # noqa: F401 -- fills the table of formats
from compress.build.write import write_artifacts
from compress.calibration.step import CalibrationStep, Importance
from compress.checkpoint.checkpoint import Checkpoint
from compress.console import Console
from compress.demo import model_path
from compress.plan.job import Job, prepare
from compress.plan.shapes import Artifact
from compress.pruning.rotation import KINDS
from compress.pruning.transforms import transforms_of
from compress.recipe import load
from compress.verify.scorer import Scorer, read_text

GRIDS = ("lut4-g8", "lut4-g16", "lut4-tensor", "lut3-g8", "int4-channel")
SOLVERS = ("scale_search", "gptq")


def plan(checkpoint: Checkpoint, grid: str, solver: str, kinds: str, windows: int) -> Job:
    """One package, as ``packlight build`` would prepare it."""
    changes = [
        f"targets.coreml.grid={grid}",
        f"targets.coreml.rotate={kinds}",
        f"quantize.solver={solver}",
        f"verify.windows={windows}",
    ]
    recipe = load("phone-4bit", changes, ["coreml"])
    return prepare(checkpoint, recipe, transforms=transforms_of(recipe))


def build(job: Job, folder: Path, console: Console) -> Artifact:
    """Written with the statistics of its own source."""
    folder.mkdir()
    calibration = CalibrationStep(job, Importance(), console, threads=1)
    (artifact,) = write_artifacts(job, calibration, folder, console)
    return artifact


def measure(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build everything, then score everything against one run of the float model."""
    checkpoint, console = Checkpoint.open(chosen.model), Console()
    keys = list(product(chosen.grid or GRIDS, chosen.solver or SOLVERS, KINDS))
    jobs = [plan(checkpoint, *key, chosen.windows) for key in keys]
    artifacts = [build(job, folder / str(n), console) for n, job in enumerate(jobs)]
    everything = replace(jobs[0], plans=tuple(artifact.plan for artifact in artifacts))
    scorer = Scorer(everything, read_text(chosen.eval_text), 1, console)
    rows = []
    for key, artifact, found in zip(
        keys, artifacts, scorer.verify(artifacts, folder, keep_going=False), strict=True
    ):
        assert found is not None
        quality = found.quality
        rows.append(
            dict(zip(("grid", "solver", "rotate"), key, strict=True))
            | {
                "bytes": artifact.nbytes,
                "kl_mean": round(quality.kl_mean.value, 6),
                "kl_mean_se": round(quality.kl_mean.se or 0.0, 6),
                "kl_p99": round(quality.kl_p99.value, 5),
                "perplexity_ratio": round(quality.perplexity_ratio.value, 5),
                "top1_agreement": round(quality.top1_agreement.value, 4),
                "scored_tokens": quality.tokens,
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
