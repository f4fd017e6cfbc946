"""Turns among processes: what runs alone, and what runs together."""

from __future__ import annotations

import select
import subprocess
import sys
from pathlib import Path

from compress.verify.turns import turn

CHILD = """
import sys
from pathlib import Path
from compress.verify.turns import turn
print("asks", flush=True)
with turn(Path(sys.argv[1]), alone=sys.argv[2] == "alone"):
    print("runs", flush=True)
    sys.stdin.readline()
print("ended", flush=True)
"""


class Child:
    """A process that takes a turn until it is told to end."""

    def __init__(self, folder: Path, how: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), how],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.hears() == "asks"

    def hears(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self.hears() == "ended"
        self.process.wait()


def test_shared_turns_run_together_and_a_measurement_waits_for_them(tmp_path: Path) -> None:
    first, second = Child(tmp_path, "shared"), Child(tmp_path, "shared")
    assert first.hears() == second.hears() == "runs"
    alone = Child(tmp_path, "alone")
    assert alone.process.stdout
    first.end()
    waits, _, _ = select.select([alone.process.stdout], [], [], 0.3)
    assert not waits  # for the second
    second.end()
    assert alone.hears() == "runs"
    alone.end()


def test_a_killed_process_gives_its_turn_back(tmp_path: Path) -> None:
    child = Child(tmp_path, "alone")
    assert child.hears() == "runs"
    child.process.kill()
    child.process.wait()
    with turn(tmp_path, alone=True):
        pass


def test_nothing_begins_during_a_measurement(tmp_path: Path) -> None:
    with turn(tmp_path, alone=True):
        child = Child(tmp_path, "shared")
        assert child.process.stdout
        waits, _, _ = select.select([child.process.stdout], [], [], 0.3)
        assert not waits
    assert child.hears() == "runs"
    child.end()
