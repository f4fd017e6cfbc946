"""The output folder: refused, locked, written as ``.partial``, renamed.

Nothing half-written ever stands under the final name, whatever stops a build.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compress.console import format_bytes
from compress.errors import DiskFullError, OutputExistsError, UsageError, is_disk_full


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that is there, and never delete what packlight did not make.

    Raises:
        OutputExistsError: it exists and is not empty, without ``overwrite``.
        UsageError: ``overwrite`` of something that is not a packlight output, or holds anything
            else; a folder that cannot be replaced: the current one, or a mount point.
    """
    place = real_path(output)
    if Path.cwd().is_relative_to(place):
        raise UsageError(
            f"the output {output} would replace the folder that you are in",
            hint="name a folder inside it, such as -o out",
        )
    if not place.exists():
        return
    if not place.is_dir():
        raise UsageError(f"{output} is a file, not a folder")
    if place.is_mount():
        raise UsageError(
            f"{output} is a mount point, which cannot be replaced",
            hint=f"name a folder inside it, such as -o {output / 'out'}",
        )
    if not any(place.iterdir()):
        return
    if not overwrite:
        raise OutputExistsError(f"{output} exists", hint="--overwrite, or another --output")
    if not all((place / name).is_file() for name in ("plan.json", "SHA256SUMS")):
        raise UsageError(
            f"{output} was not made by packlight, so it is not overwritten",
            hint="choose another --output",
        )
    if stranger := find_stranger(place):
        raise UsageError(
            f"{output} holds {stranger}, which packlight did not make, so it is not overwritten",
            hint="move it elsewhere, or choose another --output",
        )


def real_path(output: Path) -> Path:
    """Where an output really is: absolute, through links (one that leads nowhere yet, too)."""
    return Path(os.path.realpath(output))


def find_stranger(folder: Path) -> str:
    """The first file of a build's folder that its ``SHA256SUMS`` does not list, or ``""``."""
    sums = (folder / "SHA256SUMS").read_text(encoding="utf-8", errors="replace")
    known = {"SHA256SUMS", *(line.partition("  ")[2] for line in sums.splitlines())}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        harmless = path.name == ".DS_Store" or (path.is_dir() and not path.is_symlink())
        if name not in known and not harmless:
            return name
    return ""


def check_disk(output: Path, needed: int) -> None:
    """See a full disk before the work starts.

    Raises:
        DiskFullError: fewer bytes free than the artifacts will take.
    """
    folder = real_path(output).parent
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
    place = real_path(output)
    partial = place.with_name(place.name + ".partial")
    with locked(place):
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed build
        try:
            partial.mkdir()
            yield partial
            replace(place, partial)
        except OSError as error:
            if is_disk_full(error):
                raise DiskFullError(
                    f"the disk ran full while writing to {output.parent} ({error.strerror})",
                    hint="nothing was left behind; free some space and run it again",
                ) from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def replace(output: Path, partial: Path) -> None:
    """Put ``partial`` in the place of ``output``; on a failure, the old output is still there."""
    retired = output.with_name(output.name + ".old.partial")
    shutil.rmtree(retired, ignore_errors=True)
    if not output.exists():
        partial.rename(output)
        return
    try:
        output.rename(retired)
        partial.rename(output)
    except BaseException:  # Ctrl-C between the two as well
        if not output.exists():
            retired.rename(output)
        raise
    shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold ``OUTPUT.lock``, which the kernel lets go with the process, even after kill -9.

    Missing parent folders are made, and removed again if they are still empty at the end.

    Raises:
        UsageError: another process holds it, or the place is not writable.
    """
    lock = output.with_name(output.name + ".lock")
    missing = [folder for folder in output.parents if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise UsageError(f"cannot write to {output.parent}: {error.strerror}") from error
    try:
        take_lock(handle, lock)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # by its holder only
    finally:
        os.close(handle)
        for folder in missing:
            with suppress(OSError):  # not empty: the build succeeded
                folder.rmdir()


def take_lock(handle: int, lock: Path) -> None:
    """Lock an open lock file.

    Raises:
        UsageError: another process has it, or has just unlinked the file that we opened.
    """
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = os.path.samestat(os.fstat(handle), lock.stat())
    except (BlockingIOError, FileNotFoundError):
        ours = False
    if not ours:
        raise UsageError(
            f"another build is writing to {lock.with_suffix('')}",
            hint="wait for it, or another --output",
        )
