"""What is written of one target: its finished tensors, a line each, so that a build that was cut
off goes on behind them.

A line is appended when the tensor's bytes are in the target's file. What a process wrote outlives
it, even after kill -9; it need not outlive the machine. So the file is synced every few seconds,
the ledger says up to where, and lines behind that count only until the machine starts again. The
line that was being written when the build ended is left out.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.files import sync

__all__ = ["Ledger", "has_finished"]

SYNC_EVERY = 5.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Row = dict[str, Any]


class Ledger(dict[str, Row]):
    """Finished tensors by name, in the order of their coming.

    Args:
        path: the file; None keeps the ledger in memory only.
        target: names what is written. What stands in the file of another target is forgotten.
        sync_every: seconds of work that a loss of power may cost.
        boot: file that is another after every start of the machine (Linux has one); where there is
            none, every start is taken for new.
    """

    def __init__(
        self,
        path: Path | None = None,
        target: str = "",
        *,
        sync_every: float = SYNC_EVERY,
        boot: Path = BOOT_ID,
    ) -> None:
        self._path, self._target = path, target
        self._sync_every, self._boot = sync_every, boot
        super().__init__()
        self._synced_at = time.monotonic()
        self._unsynced: Path | None = None  # file of the last tensor, unless that is synced
        if path is not None:
            self._open(path)

    def add(self, name: str, file: Path, end: int, **facts: Any) -> None:
        """A tensor is finished.

        Args:
            name: of the tensor.
            file: that it was written to; its bytes are out of the process (flushed).
            end: where they end in the file.
            facts: what the writer will want to know of it.
        """
        self[name] = {"done": name, "end": end, **facts}
        self._append(self[name])
        self._unsynced = file
        if time.monotonic() > self._synced_at + self._sync_every:
            self.sync()

    def sync(self) -> None:
        """Have what is finished outlive the machine, too."""
        if self._path is not None and self._unsynced is not None:
            sync(self._unsynced)
            self._append({"synced": True})
            self._unsynced, self._synced_at = None, time.monotonic()

    def cut(self, file: Path) -> bool:
        """Make a file end where its last finished tensor does.

        Returns:
            False where it is to be written from its start: nothing is finished, or it is not as
            long as the ledger says; then the ledger is empty, too.
        """
        end = max((row["end"] for row in self.values()), default=0)
        if end and file.is_file() and file.stat().st_size >= end:
            os.truncate(file, end)
            return True
        if self:
            self._begin()
        return False

    # --- the file ----------------------------------------------------------------------------

    def _open(self, path: Path) -> None:
        lines = list(read_lines(path))
        boots = [row["boot"] for row, _ in lines if "boot" in row]
        if not lines or lines[0][0].get("target") != self._target:
            self._begin()
            return
        if not boots[-1] or boots[-1] != boot_id(self._boot):
            synced = [i for i, (row, _) in enumerate(lines) if "synced" in row]
            lines = lines[: synced[-1] + 1 if synced else 1]
        os.truncate(path, lines[-1][1])
        self.update({row["done"]: row for row, _ in lines if "done" in row})
        self._append({"boot": boot_id(self._boot)})

    def _begin(self) -> None:
        self.clear()
        if self._path is not None:
            self._path.parent.mkdir(exist_ok=True)
            self._path.unlink(missing_ok=True)
        self._append({"target": self._target, "boot": boot_id(self._boot)})

    def _append(self, row: Row) -> None:
        if self._path is not None:
            with self._path.open("ab", buffering=0) as stream:
                stream.write(json.dumps(row).encode() + b"\n")


def has_finished(path: Path) -> bool:
    """Whether a ledger's file tells of any tensor."""
    return any("done" in row for row, _ in read_lines(path))


def read_lines(path: Path) -> Iterator[tuple[Row, int]]:
    """Rows of a ledger's file and where each ends, up to the first that is not whole."""
    if not path.is_file():
        return
    end = 0
    for line in path.read_bytes().splitlines(keepends=True):
        end += len(line)
        try:
            row = json.loads(line)
        except ValueError:  # the page of a file that never came to the disk is zeros
            return
        if not line.endswith(b"\n") or not isinstance(row, dict):
            return
        yield row, end


def boot_id(file: Path) -> str:
    """Another after every start of the machine; empty where there is none to be had."""
    try:
        return file.read_text(encoding="ascii").strip()
    except OSError:
        return ""
