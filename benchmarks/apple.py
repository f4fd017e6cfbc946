"""Measures what a developer for iPhones gets: Core ML and Core AI, built and verified.

    python benchmarks/apple.py SmolLM2-135M-Instruct --windows 4
    python benchmarks/make_checkpoint.py phi-3-mini-4k --layers 4 -o phi-3-4-layers
    python benchmarks/apple.py phi-3-4-layers --windows 2 --length 64

Each artifact is built (rounded to nearest) and verified in processes of its own. CPU seconds are
those of a process and its children; where the machine is busy, they wander by some 20 %. Rows are
added to ``apple.json``, and ``apple.md`` is made from it. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FIGURES, PAGE = HERE / "apple.json", HERE / "apple.md"
ANONYMOUS = re.compile(r"RssAnon:\s*(\d+) kB")
COMMAND = (sys.executable, "-m", "compress")
# Format, settings of its target.
ROWS: tuple[tuple[str, dict[str, str]], ...] = (
    ("coreml", {"grid": "int4-g32"}),
    ("coreai", {"grid": "int4-g32"}),
    ("coreai", {"grid": "int8-channel"}),
    ("coreai", {"grid": "F16"}),
)

HEAD = """\
# Core ML and Core AI, built and verified

Written by `benchmarks/apple.py`, on one core of {cpu}. Weights are rounded to nearest; MB are 10⁶
bytes; *build* is CPU seconds to read, quantize and write; *anonymous* the most memory that it held,
without pages of files; *verify* the CPU seconds of the float model, of loading and timing the
artifact, of its greedy sample and of the windows; *memory* the peak of the process that ran it.
Nothing ran on Apple's hardware: Core ML's programs ran in packlight's evaluator, with float16
rounding, Core AI's in Apple's CPU runtime, as float32 twins.

"""
COLUMNS = (
    "model", "artifact", "MB", "build CPU s", "anonymous MB", "windows", "KL", "perplexity",
    "top-1", "verify CPU s", "memory MB",
)  # fmt: skip


def run(arguments: Sequence[object]) -> tuple[str, float, float]:
    """Stdout, CPU seconds and peak anonymous megabytes of a command of packlight's."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)], stdout=output, env={**os.environ, "NO_COLOR": "1"}
        )
        peak = 0
        while True:
            done, status, used = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            found = ANONYMOUS.search(Path(f"/proc/{process.pid}/status").read_text())
            peak = max(peak, int(found[1]) if found else 0)
            time.sleep(0.02)
        output.seek(0)
        text = output.read()
    if status not in (0, 256):  # 1: a gate failed
        raise SystemExit(f"{arguments}: status {status}")
    return text, used.ru_utime + used.ru_stime, peak * 1024 / 1e6


def measure(
    model: Path, form: str, settings: dict[str, str], windows: int, length: int
) -> dict[str, Any]:
    """One row."""
    values = [f"targets.{form}.{key}={value}" for key, value in settings.items()]
    overrides = [word for value in values for word in ("--set", value)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        _, seconds, peak = run(
            ["build", model, "-r", "int4-fast", "-f", form, "-o", out, "--no-verify", "-q",
             *overrides, "--threads", 1]
        )  # fmt: skip
        text, verifying, _ = run(
            ["verify", out, "--baseline", model, "--windows", windows, "--sequence-length", length,
             "--threads", 1, "--json"]
        )  # fmt: skip
        (artifact,) = json.loads(text)["artifacts"]
    return {
        "model": model.name,
        "artifact": f"{form} {artifact['type']}",
        "bytes": artifact["bytes"],
        "build_cpu_seconds": seconds,
        "build_anonymous_mb": peak,
        "windows": f"{windows} × {length}",
        "kl": artifact["kl_divergence"]["mean"],
        "perplexity": artifact["perplexity"],
        "top1": artifact["top1_agreement"],
        "verify_cpu_seconds": verifying,
        "memory_mb": artifact["peak_memory_bytes"] / 1e6,
        "runtime": artifact["runtime"],
    }


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The table."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    lines = [
        f"|{row['model']} | {row['artifact']} | {row['bytes'] / 1e6:.1f} | "
        f"{row['build_cpu_seconds']:.1f} | {row['build_anonymous_mb']:.0f} | {row['windows']} | "
        f"{row['kl']:.2g} | {row['perplexity']:.2f} | {row['top1']:.1%} | "
        f"{row['verify_cpu_seconds']:.0f} | {row['memory_mb']:.0f}|\n"
        for row in rows
    ]
    head = HEAD.format(cpu=found[1] if found else "this machine")
    titles = f"|{' | '.join(COLUMNS)}|\n|---|---|--:|--:|--:|---|--:|--:|--:|--:|--:|\n"
    return head + titles + "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--only", default="", help="formats, or format:grid, comma-separated")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else []
    rows = json.loads(FIGURES.read_text()) if FIGURES.is_file() else []
    for model in options.models:
        for form, settings in ROWS:
            if wanted and not {form, f"{form}:{settings['grid']}"} & set(wanted):
                continue
            row = measure(model, form, settings, options.windows, options.length)
            print(json.dumps(row), flush=True)
            same = ("model", "artifact")
            rows = [old for old in rows if any(old[key] != row[key] for key in same)]
            rows.append(row)
            FIGURES.write_text(json.dumps(rows, indent=1) + "\n")
            PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
