"""A folder for work that goes with its process: after kill -9, the next process clears it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["scratch_folder"]

LOCK = "lock"


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """An empty folder below ``parent`` (where ``TMPDIR`` says, for None) until the block is left.

    Folders that killed processes left there are deleted first. Each holds a lock that the kernel
    lets go with its process, so that those of living ones stay, whatever container they are in.
    """
    place = Path(parent or tempfile.gettempdir())
    for folder in place.glob("packlight-*.scratch"):
        clear_abandoned(folder)
    # Locked before it has the name that others look for.
    unnamed = Path(tempfile.mkdtemp(prefix="packlight-", dir=place))
    folder = unnamed.with_name(f"{unnamed.name}.scratch")
    try:
        handle = os.open(unnamed / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            lock(handle)
            unnamed.rename(folder)
            (folder / "work").mkdir()
            yield folder / "work"
        finally:
            os.close(handle)
    finally:
        shutil.rmtree(unnamed, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


def clear_abandoned(folder: Path) -> None:
    """Delete a folder whose process is gone."""
    with suppress(OSError):  # another user's, or another process is at it
        handle = os.open(folder / LOCK, os.O_RDWR)
        try:
            lock(handle)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


def lock(handle: int) -> None:
    """Take the lock of an open file.

    Raises:
        BlockingIOError: another process has it.
    """
    import fcntl

    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
