"""How right the time left is: what a command's phases tell beside how long they really take.

    python benchmarks/progress.py build CHECKPOINT -r int4-fast -f gguf --no-verify -o OUT
    OMP_NUM_THREADS=1 python benchmarks/progress.py --cpu build CHECKPOINT …

Runs ``packlight`` with these arguments and prints, for every phase of a second and more: how long
it took, what time left was told after a tenth of it and what really was, by how much that was
wrong, and the most by which the duration that follows (time gone by and time left) was wrong from
then on. ``--cpu`` counts CPU seconds, of this process and of those that it starts, for a machine
that others use meanwhile (``OMP_NUM_THREADS=1`` and ``--threads 1``: threads that wait for each
other burn CPU there). What was measured so is in ``progress.md``.
"""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compress import console
from compress.cli import run
from compress.progress import Estimate
from compress.verify import scorer
from compress.verify.forecast import slowness


class Witness(console.Phase):
    """A phase that remembers what it told and when."""

    seen: list[Witness] = []  # noqa: RUF012

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.told: list[tuple[float, float]] = []
        self.seconds = 0.0
        self.seen.append(self)

    def update(self, done: int, total: int) -> None:
        super().update(done, total)
        left = self.estimate.seconds_left
        if left is not None:
            self.told.append((self.estimate.seconds, left))

    def close(self) -> None:
        self.seconds = self.estimate.seconds
        super().close()


class CpuClock:
    """CPU seconds of this process, of those that it started, and of those that have ended."""

    def __init__(self) -> None:
        self.looked = self.others = 0.0

    def __call__(self) -> float:
        if time.monotonic() > self.looked + 0.2:  # a look takes milliseconds
            ended, living = os.times(), psutil.Process().children(recursive=True)
            found = ended.children_user + ended.children_system + sum(map(cpu_of, living))
            self.others = max(self.others, found)  # one that ends between the two looks is in none
            self.looked = time.monotonic()
        return time.process_time() + self.others


def cpu_of(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:  # ended meanwhile
        return 0.0
    return times.user + times.system


def judge(phase: Witness) -> str | None:
    """One phase's line of the table; None where it was over too soon or counted nothing."""
    whole = phase.seconds
    told = [(when, left) for when, left in phase.told if whole * 0.1 <= when < whole]
    if whole < 1 or not told:
        return None
    when, left = told[0]
    worst = max(((at + rest) / whole - 1 for at, rest in told), key=abs)
    return (
        f"| {phase.name} | {whole:.1f} | {left:.1f} | {whole - when:.1f} | "
        f"{left / (whole - when) - 1:+.0%} | {worst:+.0%} |"
    )


def main() -> None:
    arguments = sys.argv[1:]
    console.Phase = Witness
    if arguments[0] == "--cpu":
        arguments = arguments[1:]
        console.Estimate = partial(Estimate, clock=CpuClock())
        scorer.slowness = partial(slowness, clock=time.process_time)
    code = run(arguments)
    print("| phase | seconds | left after a tenth: told | really | error | of all, later |")
    print("|---|---|---|---|---|---|")
    for row in filter(None, map(judge, Witness.seen)):
        print(row)
    sys.exit(code)


if __name__ == "__main__":
    main()
