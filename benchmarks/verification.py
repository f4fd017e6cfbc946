"""Where the time of a verification goes, by stage: CPU seconds, wall time, peak memory.

    python benchmarks/verification.py BUILD CHECKPOINT [--tree DIR] [--threads N] [--windows N]
                                      [--out FILE] [--no-peer]

BUILD is the output folder of a ``packlight build``, CHECKPOINT its float model. ``--tree`` is
another checkout of packlight (``git worktree add before main~1``), which verifies the same build
first, so that one run has both; *again* verifies once more with the float model's answers in the
cache. Stages: *start* (imports, headers, the text in tokens), *float baseline*, *float speed*; of
each artifact *load and speed*, *generation*, *logits and KL*. The CPU seconds of a child are those
of its process when it tells of its next stage. ``--windows`` sets the number that is scored.

Below the table: llama.cpp's own pass over four windows of the same text, float16 GGUF and artifact,
both by ``llama_decode``, and the formula of its ``--kl-divergence`` (the wheel that packlight
installs has that option, but not the tool that reads it). The float16 GGUF is ``BUILD.f16.gguf``,
written first where it is missing. On a machine that others use too, look at CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TICK = os.sysconf("SC_CLK_TCK")
GATES = {"perplexity_ratio": "<=1.25", "kl_divergence": "<=0.20", "top1_agreement": ">=0.80"}
CHILD = {
    "loading": "start",
    "tokenizing": "load and speed",
    "generating": "load and speed",
    "computing logits": "generation",
    "answering tasks": "logits and KL",
}


def cpu_of(pid: int) -> float:
    """CPU seconds of a process so far; 0 where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICK


def measure(build: str, checkpoint: str, windows: int, threads: int) -> dict[str, Any]:
    """Verify in this process, whose packlight may be of any tree; stages by name."""
    import compress.verify as verify
    import packlight

    stages: dict[str, float] = {}
    real = verify.run_child

    def staged(command: list[str], what: str, **options: Any) -> Generator[Any, Any, None]:
        before, pid, name = 0.0, 0, what.rsplit("(", 1)[-1].rstrip(")")
        known = {int(path.name) for path in Path("/proc").glob("[0-9]*")}
        events, answer = real(command, what, **options), None
        while True:
            try:
                event = events.send(answer)
            except StopIteration:
                return
            if not pid:  # the process that was not there before and runs this format's probe
                pid = child_of(command, known)
            if stage := CHILD.get(event.get("stage", "")):
                now = cpu_of(pid)
                key = f"{name}: {stage}"
                stages[key] = stages.get(key, 0.0) + now - before
                before = now
            answer = yield event

    verify.run_child = staged  # type: ignore[assignment]
    begun, phases = time.perf_counter(), [("start", time.process_time())]

    def progress(phase: str, done: int, total: int, unit: str) -> None:
        if phase != phases[-1][0]:
            phases.append((phase, time.process_time()))

    began = time.process_time()
    options = {"windows": windows} if windows else {}
    report = packlight.verify(
        build, checkpoint, GATES, threads=threads, progress=progress, **options
    )
    phases.append(("end", time.process_time()))
    names = {"score the float model": "float baseline", "time the float model": "float speed"}
    own: dict[str, float] = {"start": began}
    for (phase, at), (_, then) in pairwise(phases):
        key = names.get(phase, "further windows" if phase.startswith("verify") else "start")
        own[key] = own.get(key, 0.0) + then - at
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "stages": {key: round(value, 2) for key, value in (own | stages).items()},
        "cpu": round(sum(usage.ru_utime + usage.ru_stime for usage in usages), 1),
        "wall": round(time.perf_counter() - begun, 1),
        "peak_mb": [round(usage.ru_maxrss / 1000) for usage in usages],
        "artifacts": {
            a.format: {
                "windows": getattr(a, "windows", None) or report.baseline.windows,
                "kl": a.kl_divergence and a.kl_divergence.mean,
                "kl_se": a.kl_divergence and a.kl_divergence.se,
                "perplexity_ratio": a.perplexity_ratio,
                "stopped": getattr(a, "stopped", ""),
                "failure": a.failure,
            }
            for a in report.artifacts
        },
    }


def child_of(command: list[str], known: set[int]) -> int:
    """The process id of a command that was begun after ``known`` were seen."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode().split("\0")[:-1]
        except OSError:
            continue
        if int(path.name) not in known and words == list(command):
            return int(path.name)
    return 0


def float16_file(build: str, checkpoint: str) -> Path:
    """The checkpoint as a float16 GGUF, beside the build."""
    import packlight

    path = Path(f"{build.rstrip('/')}.f16.gguf")
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            packlight.build(
                checkpoint, "int4-fast", formats=["gguf"], output=f"{folder}/out", verify=False,
                overrides={"targets.gguf.type": "F16"},
            )  # fmt: skip
            (made,) = Path(folder).rglob("*.gguf")
            made.rename(path)
    return path


def peer(build: str, checkpoint: str, threads: int) -> dict[str, Any] | None:
    """llama.cpp over windows of the same text: float16 and the artifact, and their KL."""
    import numpy as np

    from compress.checkpoint.checkpoint import Checkpoint
    from compress.decoder.tokenizer import eval_windows
    from compress.verify.scorer import read_text
    from exporters.gguf.runtime import LlamaCpp

    found = sorted(Path(build).rglob("*.gguf"))
    if not found:
        return None
    float16 = float16_file(build, checkpoint)
    windows = eval_windows(read_text(None), Checkpoint.open(checkpoint).tokenizer, 512, 4)
    began, total = time.process_time(), 0.0
    both = [LlamaCpp(path, context=512, threads=threads) for path in (float16, found[0])]
    for window in windows:
        ours, theirs = (runtime.logits(window)[:-1] for runtime in both)
        for p, q in zip(ours, theirs, strict=True):  # perplexity.cpp: a row at a time, float
            p, q = p - p.max(), q - q.max()
            p -= np.log(np.exp(p).sum())
            q -= np.log(np.exp(q).sum())
            total += float((np.exp(p) * (p - q)).sum())
    scored = sum(len(window) - 1 for window in windows)
    return {"cpu": round(time.process_time() - began, 1), "windows": 4, "kl": total / scored}


def run(tree: Path, chosen: argparse.Namespace, cache: str) -> dict[str, Any]:
    """``measure`` in a process of its own, with the packlight of a tree and a cache folder."""
    command = [sys.executable, __file__, chosen.build, chosen.checkpoint, "--inside"]
    command += ["--windows", str(chosen.windows), "--threads", str(chosen.threads)]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PACKLIGHT_CACHE": cache}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(runs: dict[str, dict[str, Any]]) -> str:
    """The stages of every run as Markdown, CPU seconds."""
    keys = list(dict.fromkeys(key for found in runs.values() for key in found["stages"]))
    lines = [f"|stage, CPU s | {' | '.join(runs)} |", f"|---|{'--:|' * len(runs)}"]
    for key in keys:
        cells = (f"{found['stages'].get(key, 0.0):.1f}" for found in runs.values())
        lines.append(f"|{key} | {' | '.join(cells)} |")
    lines.append(f"|**all** | {' | '.join(str(found['cpu']) for found in runs.values())} |")
    lines.append(f"|wall s | {' | '.join(str(found['wall']) for found in runs.values())} |")
    peaks = (" / ".join(map(str, found["peak_mb"])) for found in runs.values())
    lines.append(f"|peak MB, own / largest child | {' | '.join(peaks)} |")
    for name in next(iter(runs.values()))["artifacts"]:
        of = [found["artifacts"].get(name, {}) for found in runs.values()]
        cells = (f"{a['kl']:.4f} ({a['windows']})" if a.get("kl") else "failed" for a in of)
        lines.append(f"|{name}: KL (windows) | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the trees and the peer, print the table, write the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build")
    parser.add_argument("checkpoint")
    parser.add_argument("--tree", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--windows", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.inside:
        found = measure(chosen.build, chosen.checkpoint, chosen.windows, chosen.threads)
        print(json.dumps(found))
        return
    runs = {}
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        if chosen.tree:
            runs["before"] = run(chosen.tree, chosen, first)
        runs["now"] = run(ROOT, chosen, second)
        runs["again"] = run(ROOT, chosen, second)
    print(table(runs))
    document: dict[str, Any] = {"runs": runs}
    if not chosen.no_peer and (other := peer(chosen.build, chosen.checkpoint, chosen.threads or 1)):
        document["llama.cpp"] = other
        print(
            f"llama.cpp alone, {other['windows']} windows: {other['cpu']} CPU s, {other['kl']:.4f}"
        )
    if chosen.out:
        chosen.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
