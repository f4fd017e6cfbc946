"""Accuracy of every solver on every grid, through the real runtimes.

    python benchmarks/accuracy.py [MODEL] [--eval-text FILE] [--calibration FILE ...] [--windows N]
                                  [--solver NAME ...] [--setting NAME ...] [--out DIR]

For each setting and solver one artifact is built from MODEL (default: the bundled demo), loaded in
llama.cpp, onnxruntime or the MIL evaluator, and compared with the float model on held-out text that
calibration never saw. Writes DIR/accuracy.json and DIR/accuracy.md (default: benchmarks/). CPU
seconds are those of choosing codes and writing; the walk over the calibration texts, which all
settings share, is told below the table.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress.calibration_step import CalibrationStep, Importance
from compress.checkpoint import Checkpoint
from compress.console import Console
from compress.demo import model_path
from compress.job import Job, prepare
from compress.model import Artifact
from compress.pipeline import Scorer, read_text, write_artifacts
from compress.recipe import load
from compress.verify import Verified
from exporters import SHIPYARD

# Name in the table → format and the recipe's override that makes it.
SETTINGS: dict[str, tuple[str, str]] = {
    "GGUF Q4_K_M": ("gguf", "targets.gguf.type=Q4_K_M"),
    "GGUF Q3_K_M": ("gguf", "targets.gguf.type=Q3_K_M"),
    "GGUF Q4_0": ("gguf", "targets.gguf.type=Q4_0"),
    "ONNX int4-g32": ("onnx", "targets.onnx.group_size=32"),
    "ONNX int4-g128": ("onnx", "targets.onnx.group_size=128"),
    "Core ML int4-g32": ("coreml", "targets.coreml.grid=int4-g32"),
    "Core ML lut4-g8": ("coreml", "targets.coreml.grid=lut4-g8"),
}
DEMO = str(model_path())
SOLVERS = ("rtn", "scale_search", "gptq")


def plan(checkpoint: Checkpoint, setting: str, solver: str, chosen: argparse.Namespace) -> Job:
    """One setting by one solver, as ``packlight build`` would prepare it."""
    name, override = SETTINGS[setting]
    texts = chosen.calibration or ["builtin"]
    overrides = [
        override,
        f"quantize.solver={solver}",
        f"calibration.texts={json.dumps(texts)}",
        f"verify.windows={chosen.windows}",
    ]
    return prepare(checkpoint, load("phone-4bit", overrides, [name]), SHIPYARD.get_exporter)


def build(job: Job, folder: Path, console: Console) -> tuple[Artifact, float, float]:
    """The artifact, CPU seconds of its statistics, and of choosing codes and writing."""
    folder.mkdir(parents=True)
    start = time.process_time()
    calibration = CalibrationStep(job, Importance(), SHIPYARD, console, threads=1)
    calibration.gather(job.source, job.plans[0])
    middle = time.process_time()
    (artifact,) = write_artifacts(calibration, SHIPYARD, folder, console)
    return artifact, middle - start, time.process_time() - middle


def row(
    key: tuple[str, str], artifact: Artifact, verified: Verified, parameters: int, seconds: float
) -> dict[str, Any]:
    """What the table says of one artifact."""
    quality = verified.quality
    return {
        "setting": key[0],
        "solver": key[1],
        "bytes": artifact.nbytes,
        "bits_per_weight": round(8 * artifact.nbytes / parameters, 3),
        "kl_mean": round(quality.kl_mean.value, 6),
        "kl_mean_se": round(quality.kl_mean.se or 0.0, 6),
        "kl_p99": round(quality.kl_p99.value, 5),
        "perplexity_ratio": round(quality.perplexity_ratio.value, 5),
        "top1_agreement": round(quality.top1_agreement.value, 4),
        "cpu_seconds": round(seconds, 2),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: one line per artifact; KL beside that of rtn at the same setting."""
    lines = [
        "| setting | solver | bits per weight | mean KL | of rtn's | 99 % KL | perplexity ratio | "
        "top-1 | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    plain = {row["setting"]: row["kl_mean"] for row in rows if row["solver"] == "rtn"}
    for row in rows:
        base = plain.get(row["setting"])
        share = f"{row['kl_mean'] / base:.2f}" if base else ""
        lines.append(
            f"| {row['setting']} | {row['solver']} | {row['bits_per_weight']:.2f} "
            f"| {row['kl_mean']:.4f} | {share} "
            f"| {row['kl_p99']:.3f} | {row['perplexity_ratio']:.4f} "
            f"| {100 * row['top1_agreement']:.1f} % | {row['cpu_seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def measure(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build everything, then score everything against one run of the float model."""
    checkpoint, console = Checkpoint.open(chosen.model), Console()
    keys = [(s, solver) for s in chosen.setting or SETTINGS for solver in chosen.solver or SOLVERS]
    built, walks = [], {}
    for number, key in enumerate(keys):
        job = plan(checkpoint, *key, chosen)
        build(job, folder / f"{number}-compile", console)  # numba's kernels, and the statistics
        built.append(build(job, folder / str(number), console))
    for solver in chosen.solver or SOLVERS:
        os.environ["PACKLIGHT_CACHE"] = str(folder / f"cache-{solver}")
        statistics = build(plan(checkpoint, keys[0][0], solver, chosen), folder / solver, console)
        walks[solver] = round(statistics[1], 1)
    artifacts = [artifact for artifact, _, _ in built]
    everything = replace(job, plans=tuple(artifact.plan for artifact in artifacts))
    scorer = Scorer(everything, read_text(chosen.eval_text), 0, console)
    verified = scorer.verify(artifacts, SHIPYARD, folder)
    rows = [
        row(key, artifact, found, job.config.num_parameters, seconds)
        for key, (artifact, _, seconds), found in zip(keys, built, verified, strict=True)
        if found is not None
    ]
    tokens = verified[0].quality.tokens if verified[0] else 0
    return {
        "model": "packlight-demo" if chosen.model == DEMO else Path(chosen.model).name,
        "scored_tokens": tokens,
        "calibration": job.recipe.document["calibration"],
        "walk_cpu_seconds": walks,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=DEMO)
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--calibration", action="append")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--solver", action="append", choices=SOLVERS)
    parser.add_argument("--setting", action="append", choices=tuple(SETTINGS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="packlight-") as folder:
        os.environ["PACKLIGHT_CACHE"] = folder
        document = measure(chosen, Path(folder))
    walks = ", ".join(
        f"{name} {seconds} s" for name, seconds in document["walk_cpu_seconds"].items()
    )
    text = table(document["rows"]) + f"\nCPU seconds of tokenizing and the walk: {walks}.\n"
    (chosen.out / "accuracy.json").write_text(json.dumps(document, indent=2) + "\n")
    (chosen.out / "accuracy.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
