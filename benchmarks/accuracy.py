"""Accuracy of every solver on every grid, through the real runtimes.

    python benchmarks/accuracy.py [MODEL] [--eval-text FILE] [--out DIR] [--windows N]
                                  [--solver NAME ...] [--setting NAME ...]

For each setting and solver one artifact is built from MODEL (default: the bundled demo), loaded in
llama.cpp, onnxruntime or the MIL evaluator, and compared with the float model on held-out text that
calibration never saw. Writes DIR/accuracy.json and DIR/accuracy.md (default: benchmarks/). CPU
seconds are those of choosing codes and writing, without verification, with the statistics already
in the cache; the walk is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from compress.demo import model_path

# Name in the table → the format and the overrides that make it.
SETTINGS: dict[str, tuple[str, list[str]]] = {
    "GGUF Q4_K_M": ("gguf", ["targets.gguf.type=Q4_K_M"]),
    "GGUF Q3_K_M": ("gguf", ["targets.gguf.type=Q3_K_M"]),
    "GGUF Q4_0": ("gguf", ["targets.gguf.type=Q4_0"]),
    "ONNX int4-g32": ("onnx", ["targets.onnx.group_size=32"]),
    "ONNX int4-g128": ("onnx", ["targets.onnx.group_size=128"]),
    "Core ML int4-g32": ("coreml", ["targets.coreml.grid=int4-g32"]),
    "Core ML lut4-g8": ("coreml", ["targets.coreml.grid=lut4-g8"]),
}
SOLVERS = ("rtn", "scale_search")


def run(arguments: list[str]) -> tuple[dict[str, Any], float]:
    """A command's JSON and the CPU seconds of its process and children.

    Raises:
        SystemExit: it could not run; its talk is shown.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "compress", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode == 2:
        raise SystemExit(done.stderr)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(done.stdout), seconds


def measure(model: str, setting: str, solver: str, options: list[str], folder: Path) -> Any:
    """One row: build without verification for the cost, then verify the artifact."""
    name, overrides = SETTINGS[setting]
    output = folder / f"{name}-{solver}"
    wanted = [f"--set={override}" for override in (*overrides, f"quantize.solver={solver}")]
    build = ["build", model, "-f", name, "-o", str(output), "--no-verify", "--overwrite", *wanted]
    report, seconds = run(build)
    (artifact,) = report["artifacts"]
    found, _ = run(["verify", str(output / artifact["path"]), "--baseline", model, *options])
    (scored,) = found["artifacts"]
    return {
        "setting": setting,
        "solver": solver,
        "bytes": artifact["bytes"],
        "bits_per_weight": artifact["bits_per_weight"],
        "kl_divergence": scored["kl_divergence"],
        "perplexity_ratio": scored["perplexity_ratio"],
        "top1_agreement": scored["top1_agreement"],
        "cpu_seconds": round(seconds, 1),
    }


def table(rows: list[Any]) -> str:
    """Markdown: one line per artifact; KL beside that of rtn at the same setting."""
    lines = [
        "| setting | solver | bits per weight | mean KL | 99 % KL | of rtn's | perplexity ratio | "
        "top-1 | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    plain = {row["setting"]: row["kl_divergence"]["mean"] for row in rows if row["solver"] == "rtn"}
    for row in rows:
        kl = row["kl_divergence"]
        of_rtn = f"{kl['mean'] / plain[row['setting']]:.2f}" if row["setting"] in plain else ""
        lines.append(
            f"| {row['setting']} | {row['solver']} | {row['bits_per_weight']:.2f} | "
            f"{kl['mean']:.4f} | {kl['p99']:.3f} | {of_rtn} | {row['perplexity_ratio']:.4f} "
            f"| {100 * row['top1_agreement']:.1f} % | {row['cpu_seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(model_path()))
    parser.add_argument("--eval-text")
    parser.add_argument("--windows", default="64")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--solver", action="append", choices=("rtn", "scale_search", "gptq"))
    parser.add_argument("--setting", action="append", choices=tuple(SETTINGS))
    chosen = parser.parse_args()
    options = ["--windows", chosen.windows]
    if chosen.eval_text:
        options += ["--eval-text", chosen.eval_text]
    solvers, rows = chosen.solver or SOLVERS, []
    os.environ.setdefault("PACKLIGHT_CACHE", tempfile.mkdtemp(prefix="packlight-"))
    with tempfile.TemporaryDirectory() as folder:
        for solver in solvers:  # statistics and compiled kernels into their caches
            measure(chosen.model, "GGUF Q4_0", solver, ["--windows", "2"], Path(folder))
        for setting in chosen.setting or SETTINGS:
            for solver in solvers:
                rows.append(measure(chosen.model, setting, solver, options, Path(folder)))
                print(table(rows[-1:]).splitlines()[-1], file=sys.stderr)
    document = {"model": Path(chosen.model).name, "windows": int(chosen.windows), "rows": rows}
    (chosen.out / "accuracy.json").write_text(json.dumps(document, indent=2) + "\n")
    (chosen.out / "accuracy.md").write_text(table(rows))


if __name__ == "__main__":
    main()
