"""Where work is kept that another build would do again."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import UsageError


def cache_folder(kind: str = "calibration") -> Path:
    """The folder of one kind of work: in ``PACKLIGHT_CACHE``, or below the Hub's assets.

    Raises:
        UsageError: not writable.
    """
    from huggingface_hub import cached_assets_path

    chosen = os.environ.get("PACKLIGHT_CACHE")
    try:
        if not chosen:
            return Path(cached_assets_path("packlight", namespace=kind))
        folder = Path(chosen) / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except OSError as error:
        raise UsageError(
            f"cannot write to {error.filename}: {error.strerror}",
            hint="set PACKLIGHT_CACHE to a folder for such work",
        ) from error


@contextmanager
def taking_turns(lock: Path) -> Iterator[None]:
    """One process of this machine at a time, for work that the next one then finds done.

    Args:
        lock: a file that is there meanwhile; the kernel lets go of it with its process.
    """
    while True:
        handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not is_same_file(handle, lock):  # its holder has just ended, and taken it away
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def is_same_file(handle: int, path: Path) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
