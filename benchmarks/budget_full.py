"""Measures budgets at full size: plans for every target from one cost table, and the GGUF build.

    python benchmarks/make_checkpoint.py phi-3-mini-4k -o /tmp/full/phi-3-mini-4k
    python benchmarks/budget_full.py /tmp/full/phi-3-mini-4k [--budget 1.8GiB --budget 1.8GB]
                                     [--solver rtn] [--no-build] [--out DIR]

Each budget is planned by ``packlight build MODEL -f gguf -f coreml --budget B --dry-run --json``:
wall and CPU seconds, and the most memory that the process held. (ONNX has no grid below 4 bits, and
fits in neither.) The first starts from an empty cache (or that of ``PACKLIGHT_CACHE``); the next
uses the cached cost table. Then the GGUF file is written from the plan and its size compared with
the plan's. Weights of ``make_checkpoint.py`` are random: sizes, time and memory are those of the
real model, expected divergences are not. Writes DIR/budget_NAME.json and .md (default:
benchmarks/budget_phi3).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

# Uses internal names: parses sizes like the command that it runs.
from compress.console import parse_bytes  # noqa: E402

PACKLIGHT = (sys.executable, "-m", "compress")
FORMATS = ("gguf", "coreml")
EXACT = 4096  # bytes by which a file may differ from its plan


def measured(command: list[str], output: Path) -> dict[str, float]:
    """Run a command; seconds, and MB of 2²⁰ bytes that its process held at most."""
    begin = time.perf_counter()
    with output.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, cwd=HERE.parent)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {process.returncode}")
    return {
        "wall_seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_mb": round(used.ru_maxrss / 1024),
    }


def build(model: str, place: Path, solver: str, out: Path) -> tuple[dict[str, float], int]:
    """Write the GGUF file of a plan; its resources and size."""
    command = [
        *PACKLIGHT, "build", model, "-f", "gguf", "--plan", str(place), "--no-verify",
        "--set", f"quantize.solver={solver}", "-o", str(out),
    ]  # fmt: skip
    took = measured(command, Path(f"{out}.log"))
    (file,) = out.glob("gguf/*.gguf")
    return took, file.stat().st_size


def rows_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each target of a plan."""
    return [
        {
            "format": name,
            "type": target["type"],
            "limit_bytes": target["budget"]["limit_bytes"],
            "file_bytes": target["file_bytes"],
            "used": round(target["file_bytes"] / target["budget"]["limit_bytes"], 5),
            "smallest_bytes": target["budget"]["smallest_bytes"],
            "expected_kl": target["expected_kl_divergence"],
        }
        for name, target in document["targets"].items()
    ]


def page(document: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"`{document['model']}`, {document['parameters']:,} parameters, random weights of "
        f"`make_checkpoint.py`; {document['machine']}.",
        "",
        "| budget | target | file | of the budget | grids | expected KL |",
        "|---|---|--:|--:|---|--:|",
    ]
    for run in document["budgets"]:
        for row in run["targets"]:
            lines.append(
                f"| {run['budget']} | {row['format']} | {row['file_bytes']:,} "
                f"| {100 * row['used']:.2f} % | {row['type']} "
                f"| {row['expected_kl']:.3f} |"
            )
    lines += [
        "",
        "| budget | what | wall s | CPU s | peak MB | written | planned |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for run in document["budgets"]:
        names = {"plan": "plan gguf, coreml", "build": "build GGUF"}
        work = {name: run[key] for key, name in names.items() if key in run}
        for what, took in work.items():
            sizes = [f"{took[key]:,}" if key in took else "" for key in ("bytes", "planned")]
            lines.append(
                f"| {run['budget']} | {what} | {took['wall_seconds']} | {took['cpu_seconds']} "
                f"| {took['peak_mb']} | {sizes[0]} | {sizes[1]} |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--budget", action="append")
    parser.add_argument("--recipe", default="phone-4bit")
    parser.add_argument("--solver", default="rtn", help="that writes the GGUF file")
    parser.add_argument("--no-build", action="store_true")
    parser.add_argument("--name", default="phi3")
    parser.add_argument("--out", type=Path, default=HERE)
    chosen = parser.parse_args()
    budgets = chosen.budget or ["1.8GiB", "1.8GB"]
    model, runs = str(Path(chosen.model).resolve()), []
    parameters = 0
    with tempfile.TemporaryDirectory(prefix="packlight-") as folder:
        os.environ["PACKLIGHT_CACHE"] = os.environ.get("PACKLIGHT_CACHE", f"{folder}/cache")
        for budget in budgets:
            place = Path(folder) / f"plan-{budget}.json"
            command = [
                *PACKLIGHT, "build", "--json", model, "-r", chosen.recipe, "--budget", budget,
                "--dry-run", *(word for name in FORMATS for word in ("-f", name)),
            ]  # fmt: skip
            run: dict[str, Any] = {"budget": budget, "plan": measured(command, place)}
            document = json.loads(place.read_text(encoding="utf-8"))
            parameters = document["model"]["parameters"]
            run["targets"] = rows_of(document)
            print(json.dumps(run, indent=1), file=sys.stderr, flush=True)
            assert all(row["file_bytes"] <= parse_bytes(budget) for row in run["targets"])
            if not chosen.no_build:
                took, nbytes = build(model, place, chosen.solver, Path(folder) / budget)
                planned = run["targets"][0]["file_bytes"]
                assert abs(nbytes - planned) <= EXACT and nbytes <= parse_bytes(budget)
                run["build"] = {**took, "solver": chosen.solver, "bytes": nbytes,
                                "planned": planned}  # fmt: skip
            runs.append(run)
            found = {
                "model": Path(chosen.model).name,
                "parameters": parameters,
                "recipe": chosen.recipe,
                "machine": f"{os.cpu_count()} CPUs",
                "budgets": runs,
            }
            stem = chosen.out / f"budget_{chosen.name}"
            stem.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
            stem.with_suffix(".md").write_text(page(found), "utf-8")
            print(page(found), flush=True)


if __name__ == "__main__":
    main()
