"""How right the time left is: a command's ``--progress-file`` beside a clock.

    python benchmarks/progress.py build CHECKPOINT -r int4-fast -f gguf --no-verify -o OUT

Runs ``packlight`` with these arguments and prints, for every phase of a second and more: how long
it took, what time left was told after a tenth of it and what really was, by how much that was
wrong, and the most by which the duration that follows (time gone by and time left) was wrong from
then on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LOOK = 0.05  # seconds between two looks at the file


def watch(arguments: list[str], path: Path) -> list[tuple[float, dict]]:
    """Lines of the progress file of a command, each with the second that it came."""
    seen: list[tuple[float, dict]] = []
    command = [sys.executable, "-m", "compress", *arguments, "--progress-file", str(path)]
    path.touch()
    with subprocess.Popen(command) as process, path.open() as file:
        pending = ""
        while True:
            ended = process.poll() is not None
            pending += file.read()
            *lines, pending = pending.split("\n")
            seen += [(time.monotonic(), json.loads(line)) for line in lines]
            if ended:
                break
            time.sleep(LOOK)
    if process.returncode > 1:
        sys.exit(process.returncode)
    return seen


def phases(seen: list[tuple[float, dict]]) -> list[list[tuple[float, dict]]]:
    """The lines of each phase: from where its name and its count begin anew."""
    found: list[list[tuple[float, dict]]] = []
    for when, line in seen:
        if line["done"] == 0 and line["eta_s"] is None and line["total"] is None:
            found.append([])
        found[-1].append((when, line))
    return found


def judge(lines: list[tuple[float, dict]]) -> str | None:
    """One phase's line of the table; None where it was over too soon or counted nothing."""
    begin, end = lines[0][0], lines[-1][0]
    told = [
        (when, line["eta_s"])
        for when, line in lines
        if line["eta_s"] is not None and begin + (end - begin) * 0.1 <= when < end
    ]
    if end - begin < 1 or not told:
        return None
    errors = [(when + eta - end) / (end - begin) for when, eta in told]
    when, eta = told[0]
    return (
        f"| {lines[0][1]['phase']} | {end - begin:.1f} | {eta:.1f} | {end - when:.1f} | "
        f"{eta / (end - when) - 1:+.0%} | {max(errors, key=abs):+.0%} |"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        seen = watch(sys.argv[1:], Path(folder) / "progress.jsonl")
    print(
        "| phase | seconds | left after a tenth: told | really | error | of the duration, later |"
    )
    print("|---|---|---|---|---|---|")
    for lines in phases(seen):
        if row := judge(lines):
            print(row)


if __name__ == "__main__":
    main()
