"""The output folder: refused, locked, written as ``.partial``, checksummed, renamed.

Nothing half-written ever stands under the final name, whatever stops a build.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.console import format_bytes
from compress.errors import DiskFullError, OutputExistsError, UsageError, is_disk_full


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that is there, and never delete what packlight did not make.

    Raises:
        OutputExistsError: it exists and is not empty, without ``overwrite``.
        UsageError: ``overwrite`` of something that is not a packlight output.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise UsageError(f"{output} is a file, not a folder")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise OutputExistsError(f"{output} exists", hint="--overwrite, or another --output")
    if not (output / "plan.json").exists():
        raise UsageError(
            f"{output} was not made by packlight, so it is not overwritten",
            hint="choose another --output",
        )


def check_disk(output: Path, needed: int) -> None:
    """See a full disk before the work starts.

    Raises:
        DiskFullError: fewer bytes free than the artifacts will take.
    """
    folder = output.resolve().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFullError(
            f"not enough room in {folder}: the artifacts take {format_bytes(needed)}, "
            f"{format_bytes(free)} are free",
            hint="free some space, choose another --output, or fewer formats with -f",
        )


@contextmanager
def work_folder(output: Path) -> Iterator[Path]:
    """``OUTPUT.partial``, renamed to ``OUTPUT`` on success and deleted on any failure.

    Raises:
        DiskFullError: the device ran full meanwhile.
        UsageError: another build writes to the same output, or the place is not writable.
    """
    partial = output.with_name(output.name + ".partial")
    lock = output.with_name(output.name + ".lock")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise UsageError(f"cannot write to {output.parent}: {error.strerror}") from error
    try:
        lock_file(handle, output)
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed build
        partial.mkdir()
        try:
            yield partial
            if output.exists():
                retired = output.with_name(output.name + ".old.partial")
                shutil.rmtree(retired, ignore_errors=True)
                output.rename(retired)
                partial.rename(output)
                shutil.rmtree(retired, ignore_errors=True)
            else:
                partial.rename(output)
        except OSError as error:
            if is_disk_full(error):
                raise DiskFullError(
                    f"the disk ran full while writing to {partial.parent} ({error.strerror})",
                    hint="nothing was left behind; free some space and run it again",
                ) from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def lock_file(handle: int, output: Path) -> None:
    """Take the lock of an output folder; it goes with the process, even after kill -9."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"another build is writing to {output}", hint="wait for it, or another --output"
        ) from error


def write_checksums(folder: Path) -> None:
    """``SHA256SUMS`` of every file but itself, sorted; ``sha256sum -c`` reads it."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "SHA256SUMS":
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder).as_posix()}\n")
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
