"""Files and folders that builds share: the cache, locks between processes, scratch folders.

A lock is the kernel's (``flock``), which lets go of it with its process, so that none outlives a
``kill -9``.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compress.errors import UsageError

__all__ = ["cache_folder", "is_same_file", "scratch_folder", "sync", "taking_turns"]

LOCK = "lock"


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


def sync(file: Path) -> None:
    """Wait until what was written to a file is on the disk."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
