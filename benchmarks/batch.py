"""Measures `packlight batch`: 12 tiny checkpoints of six families, 2 recipes, 3 formats.

    python benchmarks/batch.py WORK_FOLDER [--max-memory 3GB]

Three steps, each with the real command line; figures go to benchmarks/batch.json and
benchmarks/batch.md:

1. all 24 jobs, 72 artifacts, within the memory; the memory of all processes together is sampled
   four times a second (proportional set size: shared pages count once);
2. the same models with one truncated checkpoint, one unknown architecture, and one job killed
   with SIGKILL; then run again, and with --retry-failed;
3. a batch of a third of the models that is killed with SIGKILL while it runs, and run again.

Artifacts of steps 2 and 3 are compared with those of step 1, byte by byte.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

FAMILIES = ("llama", "mistral", "phi3", "phi", "qwen2", "qwen3")
RECIPE = """schema: 1
name: {name}
targets: {{gguf: {{type: {type}}}, onnx: {{}}, coreml: {{grid: {grid}}}}}
quantize: {{solver: {solver}}}
calibration: {{tokens: 2048, sequence_length: 128}}
verify: {{windows: 4, sequence_length: 64, gates: {{kl_divergence: "<=1.0"}}}}
"""
JOBS = """schema: 1
models: ["shelf/*"]
recipes: [rounded.yaml, scaled.yaml]
formats: [gguf, onnx, coreml]
"""


def make_shelf(work: Path) -> None:
    """Two checkpoints of each family, with 2 and 3 blocks."""
    import tiny

    for family in FAMILIES:
        for blocks in (2, 3):
            tiny.make(
                family, work / "shelf" / f"{family}-{blocks}", num_hidden_layers=blocks, seed=blocks
            )
    recipes = (
        ("rounded", "Q4_0", "int4-g32", "rtn"),
        ("scaled", "Q4_K_M", "int4-g64", "scale_search"),
    )
    for name, type_name, grid, solver in recipes:
        text = RECIPE.format(name=name, type=type_name, grid=grid, solver=solver)
        (work / f"{name}.yaml").write_text(text)
    (work / "jobs.yaml").write_text(JOBS)


def spoil(work: Path) -> None:
    """The models of step 2: the same names, one truncated, one of an unknown architecture."""
    shutil.copytree(work / "shelf", work / "bad" / "shelf", copy_function=os.link)
    for name in ("jobs.yaml", "rounded.yaml", "scaled.yaml"):
        shutil.copy(work / name, work / "bad" / name)
    weights = work / "bad" / "shelf" / "mistral-3" / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(whole[: len(whole) // 2])
    config = work / "bad" / "shelf" / "phi-3" / "config.json"
    told = json.loads(config.read_text())
    config.unlink()
    config.write_text(json.dumps(told | {"model_type": "bert", "architectures": ["BertModel"]}))


class Memory:
    """Peak memory of a process and its descendants together."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._process = psutil.Process(pid)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            try:
                family = [self._process, *self._process.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            total = 0
            for process in family:
                with suppress(psutil.Error):
                    total += process.memory_full_info().pss
            self.peak = max(self.peak, total)
            time.sleep(0.25)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The batch of a folder, with a separate cache."""
    return subprocess.Popen(
        [sys.executable, "-m", "compress", "batch", "jobs.yaml", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PACKLIGHT_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output = process.communicate()[0]
    print(output, flush=True)
    return process.returncode, output


def document(tree: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tree / "batch.json").read_text())
    return found


def started(output: str) -> list[str]:
    return [line.split()[1] for line in output.splitlines() if line.startswith("started  ")]


def artifacts(folder: Path) -> dict[str, bytes]:
    """The files of a job, without those that contain speeds or their checksums."""
    pages = ("report", "README", "SHA256SUMS", "provenance")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(pages)
    }


def same_bytes(tree: Path, reference: Path, jobs: list[str]) -> bool:
    return all(artifacts(tree / job) == artifacts(reference / job) for job in jobs)


def good(found: dict[str, Any]) -> list[str]:
    return [job["name"] for job in found["jobs"] if job["status"] == "passed"]


def whole_shelf(work: Path, options: list[str]) -> dict[str, Any]:
    """Step 1."""
    before = os.getloadavg()[0]
    process = start(work, *options)
    memory = Memory(process.pid)
    code, _ = finish(process)
    found = document(work / "jobs")
    seconds = sum(job["seconds"] for job in found["jobs"])
    cores = found["machine"]["cpus"]
    return {
        "exit_code": code,
        "jobs": len(found["jobs"]),
        "artifacts": sum(len(job["artifacts"]) for job in found["jobs"]),
        "verified": sum(
            a["kl_divergence"] is not None for j in found["jobs"] for a in j["artifacts"]
        ),
        "passed": len(good(found)),
        "killed": found["counts"].get("killed", 0),
        "cores": cores,
        "load_before": round(before, 1),
        "seconds": found["seconds"],
        "job_seconds": round(seconds, 1),
        "cpu_seconds": round(sum(job["cpu_seconds"] for job in found["jobs"]), 1),
        "ratio": round(found["seconds"] / (seconds / cores), 3),
        "memory_limit": found["machine"]["memory_bytes"],
        "memory_peak": memory.peak,
        "memory_predicted_per_job": max(j["predicted"]["memory_bytes"] for j in found["jobs"]),
        "memory_measured_per_process": max(j["peak_memory_bytes"] for j in found["jobs"]),
    }


def wait_for(folder: Path, name: str) -> psutil.Process:
    """The process of a job, as soon as its build is writing."""
    output = str(folder / "jobs" / name)
    while True:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                words = process.cmdline()
                if {"compress.batch.child", output} <= set(words) and Path(
                    f"{output}.partial"
                ).exists():
                    return process
        time.sleep(0.05)


def bad_shelf(work: Path, options: list[str]) -> dict[str, Any]:
    """Step 2."""
    spoil(work)
    folder = work / "bad"
    process = start(folder, *options)
    wait_for(folder, "qwen2-2/rounded").send_signal(signal.SIGKILL)
    code, _ = finish(process)
    found = document(folder / "jobs")
    again, output = finish(start(folder, *options))
    retried, retry_output = finish(start(folder, *options, "--retry-failed"))
    last = document(folder / "jobs")
    return {
        "exit_code": code,
        "jobs": len(found["jobs"]),
        "counts": found["counts"],
        "errors": {j["name"]: j["error"] for j in found["jobs"] if j["status"] == "error"},
        "good_artifacts": sum(
            len(j["artifacts"]) for j in found["jobs"] if j["status"] == "passed"
        ),
        "again": {"exit_code": again, "started": started(output)},
        "retry_failed": {
            "exit_code": retried,
            "started": started(retry_output),
            "counts": last["counts"],
        },
        "bytes_equal": same_bytes(folder / "jobs", work / "jobs", good(last)),
    }


def killed_batch(work: Path, options: list[str]) -> dict[str, Any]:
    """Step 3."""
    folder = work / "cut-off"
    for model in ("llama-2", "mistral-2", "phi-2", "qwen3-3"):
        shutil.copytree(work / "shelf" / model, folder / "shelf" / model, copy_function=os.link)
    for name in ("jobs.yaml", "rounded.yaml", "scaled.yaml"):
        shutil.copy(work / name, folder / name)
    process = start(folder, *options)
    job = wait_for(folder, "mistral-2/rounded")
    process.kill()
    process.communicate()
    job.wait(timeout=30)
    done = [path.parent.relative_to(folder / "jobs").as_posix()
            for path in sorted((folder / "jobs").glob("*/*/SHA256SUMS"))]  # fmt: skip
    stamps = {name: (folder / "jobs" / name / "SHA256SUMS").stat().st_mtime_ns for name in done}
    code, output = finish(start(folder, *options))
    found = document(folder / "jobs")
    return {
        "jobs": len(found["jobs"]),
        "done_before": len(done),
        "exit_code": code,
        "started_after": len(started(output)),
        "done_twice": sorted(set(done) & set(started(output))),
        "untouched": all(
            (folder / "jobs" / name / "SHA256SUMS").stat().st_mtime_ns == stamp
            for name, stamp in stamps.items()
        ),
        "passed": len(good(found)),
        "bytes_equal": same_bytes(folder / "jobs", work / "jobs", good(found)),
    }


def page(figures: dict[str, Any]) -> str:
    """benchmarks/batch.md."""
    one, two, three = figures["shelf"], figures["bad_shelf"], figures["killed_batch"]
    retried = two["retry_failed"]
    retried_jobs = ", ".join(retried["started"])
    lines = [
        "# A shelf of models",
        "",
        "`python benchmarks/batch.py WORK --max-memory 3GB`: 12 tiny checkpoints of six families",
        f"({', '.join(FAMILIES)}; 2 and 3 blocks) × 2 recipes (rounded to nearest;",
        "calibrated `scale_search` with a Core ML palette) × 3 formats. A job is a model with a",
        f"recipe; its three formats are one `build`. {one['cores']} cores,",
        f"load {one['load_before']} before the start.",
        "",
        "## All of them",
        "",
        f"- {one['jobs']} jobs, {one['artifacts']} artifacts, {one['verified']} of them run in",
        f"  their runtimes and compared with the float model; {one['passed']} jobs passed,",
        f"  {one['killed']} were killed; exit code {one['exit_code']}.",
        f"- {one['seconds']:.0f} s: {one['ratio']:.3f} × the sum of the jobs' times",
        f"  ({one['job_seconds']:.0f} s) ÷ {one['cores']} cores; the bar is 1.15.",
        f"  {one['cpu_seconds']:.0f} CPU seconds.",
        f"- Memory of all processes together: {gigabytes(one['memory_peak'])} at most, of",
        f"  {gigabytes(one['memory_limit'])} (proportional set size, four looks a second).",
        f"  Predicted for a job: {gigabytes(one['memory_predicted_per_job'])}; the largest single",
        f"  process had {gigabytes(one['memory_measured_per_process'])}.",
        "",
        "## One truncated checkpoint, one unknown architecture, one job killed with SIGKILL",
        "",
        f"- {told(two['counts'])} of {two['jobs']} jobs; {two['good_artifacts']} good artifacts;",
        f"  exit code {two['exit_code']}. A bad checkpoint costs both of its jobs, so that three",
        "  causes are five jobs:",
        *(f"  - {name}: {error}" for name, error in two["errors"].items()),
        f"- Run again: started {', '.join(two['again']['started']) or 'nothing'}; exit code",
        f"  {two['again']['exit_code']}.",
        f"- `--retry-failed`: started {retried_jobs}; then {told(retried['counts'])};",
        f"  exit code {retried['exit_code']}.",
        f"- Bytes of all good artifacts equal to those of the whole shelf: {two['bytes_equal']}.",
        "",
        "## The batch itself killed with SIGKILL",
        "",
        f"- Four models, {three['jobs']} jobs; {three['done_before']} were done. Run again,",
        "  it started the other",
        f"  {three['started_after']}, {len(three['done_twice'])} of them a second time; finished",
        f"  folders untouched: {three['untouched']}. {three['passed']} passed; exit code",
        f"  {three['exit_code']}.",
        f"- Bytes equal to those of the whole shelf: {three['bytes_equal']}.",
        "",
    ]
    return "\n".join(lines)


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def told(counts: dict[str, int]) -> str:
    """``19 passed, 4 error, 1 killed``."""
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="a new folder for checkpoints and artifacts")
    parser.add_argument("--max-memory", default="3GB")
    told = parser.parse_args()
    options = ["--max-memory", told.max_memory]
    work = told.work.resolve()
    kept = work / "figures.json"  # of the steps so far, if this script was interrupted
    if not kept.exists():
        work.mkdir(parents=True)
        make_shelf(work)
        kept.write_text("{}")
    figures = json.loads(kept.read_text())
    acts = {"shelf": whole_shelf, "bad_shelf": bad_shelf, "killed_batch": killed_batch}
    for name, act in acts.items():
        if name not in figures:
            figures[name] = act(work, options)
            kept.write_text(json.dumps(figures))
    here = Path(__file__).parent
    (here / "batch.json").write_text(json.dumps(figures, indent=2) + "\n")
    (here / "batch.md").write_text(page(figures))
    print(page(figures))


if __name__ == "__main__":
    main()
