"""Turns among processes: a measurement of speed runs alone, everything else may run together.

Locks of the kernel on two files of the baseline's folder, which end with their process. Whoever
wants a turn holds the first file until it has the second, so that a measurement waits for what has
begun and not for what comes after it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def turn(folder: Path, *, alone: bool = False) -> Iterator[None]:
    """Run the block when no other process's turn is ``alone``; with ``alone``, when no other runs.

    Args:
        folder: that all of them name.
        alone: whether the block must not share the processor.
    """
    flags = os.O_CREAT | os.O_RDWR
    queue = os.open(folder / "next.lock", flags, 0o600)
    held = os.open(folder / "turn.lock", flags, 0o600)
    try:
        fcntl.flock(queue, fcntl.LOCK_EX)
        fcntl.flock(held, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        yield
    finally:
        os.close(held)
        os.close(queue)
