"""Files and folders shared by processes: the cache, locks, scratch folders, atomic writes.

Locks are the kernel's (``flock``), which are released with their process, even after ``kill -9``.
(filelock's are of the same kind, but leave their files, and there would be one beside every
output.)
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import TypeVar

from compress.errors import CheckpointError, DiskFullError, UsageError, is_disk_full

__all__ = [
    "LARGEST_CORPUS",
    "LARGEST_GRAPH",
    "LARGEST_TEXT",
    "cache_folder",
    "check_folder",
    "check_place",
    "check_unchanged",
    "computed_once",
    "file_lock",
    "full_disk",
    "is_inside",
    "is_url",
    "open_plain",
    "read_bounded",
    "read_corpus",
    "real_path",
    "scratch_folder",
    "stamps",
    "sync",
    "write_at",
    "write_whole",
]

T = TypeVar("T")

LOCK = "lock"
LARGEST_TEXT = 100_000_000  # most bytes of a file that is read whole
LARGEST_CORPUS = 2_000_000_000  # of a text to calibrate or to score on
LARGEST_GRAPH = 2**31 - 1  # of a message of protobuf, which is its own limit

Stamp = tuple[int, int, int]
"""Size in bytes, time of the last change in nanoseconds, inode."""


def cache_folder(kind: str = "calibration") -> Path:
    """The cache folder of one kind of results: in ``PACKLIGHT_CACHE``, or in the Hub's assets.

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


def write_at(stream: RawIOBase, offset: int, data: bytes | memoryview) -> None:
    """Write bytes at an offset; the file is unbuffered, because closing a buffer would retry.

    Raises:
        DiskFullError: the disk is full.
    """
    rest = memoryview(data).cast("B")
    try:
        stream.seek(offset)
        while rest:
            rest = rest[stream.write(rest) :]
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise DiskFullError(f"packed weights could not be written: {error.strerror}") from error


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically, also with concurrent writers and ``kill -9``."""
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_bounded(path: Path, most: int = LARGEST_TEXT) -> bytes:
    """The bytes of a regular file of limited size: no device, no pipe.

    Raises:
        OSError: it cannot be read, is not regular, or is too large.
    """
    with open_plain(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size <= most:
            return stream.read(size)
    raise OSError(errno.EFBIG, f"{size:,} bytes are more than {most:,}", str(path))


def read_corpus(path: Path, encoding: str = "utf-8") -> str:
    """The text of a file of the user's; see ``read_bounded``. Line ends become ``\\n``.

    Raises:
        OSError: see ``read_bounded``.
        UnicodeDecodeError: another encoding.
    """
    text = read_bounded(path, LARGEST_CORPUS).decode(encoding)
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def open_plain(path: Path) -> BufferedReader:
    """Open a regular file for reading: no device, no pipe.

    Raises:
        OSError: it cannot be opened, or is not regular.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would wait
    kind = os.fstat(handle).st_mode
    if stat.S_ISREG(kind):
        return open(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(kind):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a plain file", str(path))


def stamps(files: Iterable[Path]) -> dict[Path, Stamp | None]:
    """Size, time and inode of files, to detect changes; None for a missing one."""
    found: dict[Path, Stamp | None] = {}
    for file in files:
        with suppress(OSError):
            now = file.stat()
            found[file] = (now.st_size, now.st_mtime_ns, now.st_ino)
        found.setdefault(file, None)
    return found


def check_unchanged(before: Mapping[Path, Stamp | None]) -> None:
    """Refuse results of files that have changed since ``stamps``.

    Raises:
        CheckpointError: names the first changed file.
    """
    now = stamps(before)
    if changed := next((file for file in before if now[file] != before[file]), None):
        raise CheckpointError(
            f"{changed.name} has changed since it was opened: nobody can say what this is made of",
            hint="begin again, once nothing writes to it",
        )


def check_place(
    option: str,
    path: Path,
    output: Path | None = None,
    *,
    folder: bool = False,
    begins: bytes = b"",
) -> None:
    """Check, before a long build, that a path can be written at its end.

    Args:
        option: that named it.
        path: of a file, or of a ``folder`` that is created if missing.
        output: of the build, which may not hold other files than its own.
        begins: first bytes of a file of its kind; one that begins otherwise is not replaced.

    Raises:
        UsageError: a folder that is missing or not writable, a folder in place of a file or the
            reverse, a pipe, a file of another kind, or a path inside the output.
    """
    place = real_path(path)
    if place.is_fifo() or place.is_socket():
        raise UsageError(f"{option} {path} is a pipe, and would wait for a reader")
    if output is not None and place.is_relative_to(real_path(output)):
        raise UsageError(
            f"{option} {path} is inside the output {output}",
            hint=f"beside it, such as {option} {path.name}",
        )
    if place.exists() and place.is_dir() != folder:
        what = "a folder, not a file" if place.is_dir() else "a file, not a folder"
        raise UsageError(f"{option} {path} is {what}")
    if begins and place.is_file() and read_start(place, len(begins)) not in (b"", begins):
        raise UsageError(
            f"{option} {path} exists and is a file of another kind, which would be lost",
            hint="another name, or move that file",
        )
    if not folder and not place.parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.parent}")
    near = place if folder else place.parent
    while not near.exists():
        near = near.parent
    try:
        with tempfile.TemporaryFile(dir=near):  # permissions alone do not decide
            pass
        writable = not place.exists() or os.access(place, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UsageError(f"{option} {path} is not writable")


def read_start(path: Path, count: int) -> bytes:
    """The first bytes of a regular file; ``b""`` where it cannot be read."""
    try:
        with open_plain(path) as stream:
            return stream.read(count)
    except OSError:
        return b""


def full_disk(folder: Path) -> tuple[Path, str]:
    """The fullest of the disks that packlight writes to, and a hint.

    Args:
        folder: that is written to, in addition to the cache and ``TMPDIR``.
    """
    from huggingface_hub.constants import HF_ASSETS_CACHE

    places = (
        (folder, "free some space"),
        (Path(os.environ.get("PACKLIGHT_CACHE") or HF_ASSETS_CACHE), "set PACKLIGHT_CACHE"),
        (Path(tempfile.gettempdir()), "set TMPDIR"),
    )
    disks: dict[int, tuple[Path, str]] = {}
    for place, hint in places:
        while not place.exists():
            place = place.parent
        disks.setdefault(place.stat().st_dev, (place, hint))
    return min(disks.values(), key=lambda disk: shutil.disk_usage(disk[0]).free)


def computed_once(lock: Path, load: Callable[[], T | None], compute: Callable[[], T]) -> T:
    """Load a cached result, or compute it; other processes of this machine that need the same
    result wait, and load it.

    Args:
        lock: a file that exists while one of them computes.
        load: returns None where the result is missing or damaged.
        compute: also saves the result for ``load``.
    """
    if (found := load()) is not None:
        return found
    with file_lock(lock):
        if (found := load()) is not None:
            return found
        return compute()


@contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock file, which is removed afterwards.

    Args:
        path: of the file; the kernel releases the lock with its process.
        wait: until its holder releases it.

    Raises:
        BlockingIOError: without ``wait``, another process holds it or has just released it.
        OSError: the file cannot be made, or another file than an empty one is there, which would
            be removed.
    """
    flags = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode) or found.st_size:
                raise OSError(errno.EEXIST, "it was not made by packlight", str(path))
            fcntl.flock(handle, flags)
            if not is_same_file(handle, path):  # removed by its owner just now
                if wait:
                    continue
                raise BlockingIOError(f"{path} has just been let go of")
            try:
                yield
            finally:
                path.unlink(missing_ok=True)  # only its owner removes it
            return
        finally:
            os.close(handle)


def is_same_file(handle: int, path: Path) -> bool:
    """Whether a path is still that of an open file."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def real_path(path: Path) -> Path:
    """The absolute path with links resolved, even one without a target."""
    return Path(os.path.realpath(path))


def is_url(location: str) -> bool:
    """Whether a location is a URL for fsspec rather than a folder or a Hub id."""
    return "://" in location


def sync(file: Path) -> None:
    """Sync a file to the disk."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """Yield an empty folder below ``parent`` (None: in ``TMPDIR``), deleted afterwards.

    Folders of killed processes are deleted first. Each holds a lock that the kernel releases with
    its process, so that those of running ones are kept, in whatever container they run.
    """
    place = Path(parent or tempfile.gettempdir())
    for folder in place.glob("packlight-*.scratch"):
        clear_abandoned(folder)
    # Locked before it gets the name that other processes look for.
    unnamed = Path(tempfile.mkdtemp(prefix="packlight-", dir=place))
    folder = unnamed.with_name(f"{unnamed.name}.scratch")
    try:
        handle = os.open(unnamed / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unnamed.rename(folder)
            (folder / "work").mkdir()
            yield folder / "work"
        finally:
            os.close(handle)
    finally:
        shutil.rmtree(unnamed, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


def clear_abandoned(folder: Path) -> None:
    """Delete a scratch folder whose process has ended; nothing else with such a name."""
    with suppress(OSError):  # another user's, or another process holds it
        ours = {LOCK, "work"} >= set(os.listdir(folder)) and not folder.is_symlink()
        if not ours or (folder / LOCK).lstat().st_size or (folder / "work").is_symlink():
            return
        handle = os.open(folder / LOCK, os.O_RDWR)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


# --- untrusted folders ----------------------------------------------------------------------------
#
# Files of a checkpoint's folder are read, copied into artifacts and published. So links must point
# into the folder itself or to blobs of the Hub's cache, files must be regular, and those that are
# read whole are of limited size.

# Read whole, by packlight or transformers.
TEXTS = re.compile(
    r".*\.(json|jinja|model|bpe|tiktoken)|(merges|vocab)\.txt|README\.md|LICENSE.*", re.IGNORECASE
)
TEMPLATES = "additional_chat_templates"  # the only subfolder that transformers reads


def check_folder(folder: Path, within: Path | None = None) -> None:
    """Refuse links that point elsewhere, files that are not regular, and texts that are too large.

    Hidden files and subfolders are not checked: nothing reads them.

    Args:
        within: the folder that links may not lead out of; default: ``folder``.

    Raises:
        CheckpointError: the first file that is refused.
    """
    home = os.path.realpath(within or folder)
    if not f"{os.path.realpath(folder)}/".startswith(f"{home}/"):
        raise CheckpointError(f"{folder.name} is a link that leads out of the checkpoint's folder")
    there = os.scandir(folder) if folder.is_dir() else ()  # none: a repository of other files
    for entry in sorted(there, key=lambda entry: entry.name):
        name, place = entry.name, os.path.realpath(entry.path)
        try:
            found = os.stat(place)
        except FileNotFoundError:  # a dangling link: treated as missing
            continue
        except OSError as error:  # a cycle of links, among others
            raise CheckpointError(f"{name} cannot be read: {error.strerror}") from error
        is_folder = stat.S_ISDIR(found.st_mode)
        if name.startswith(".") or (is_folder and name != TEMPLATES):
            continue
        if entry.is_symlink() and not is_inside(home, entry.path):
            raise CheckpointError(
                f"{name} is a link that leads out of the checkpoint's folder",
                hint="packlight would publish what it leads to; put the file itself there",
            )
        if is_folder:
            check_folder(folder / name)
        elif not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{name} is not a plain file", hint="a pipe, or a device?")
        elif found.st_size > LARGEST_TEXT and TEXTS.fullmatch(name):
            raise CheckpointError(
                f"{name} has {found.st_size:,} bytes, more than the {LARGEST_TEXT:,} that it may"
            )


def is_inside(home: str, path: str) -> bool:
    """Whether a path, its links resolved, is in a folder or among the blobs of its Hub cache.

    Args:
        home: real path of the folder.
        path: existing.
    """
    place = os.path.realpath(path)
    return place.startswith(f"{home}/") or is_blob(home, place)


def is_blob(home: str, place: str) -> bool:
    """Whether a link points into the Hub's cache, where snapshots/COMMIT/NAME points to
    blobs/DIGEST: that of the same repository, or any from a folder of links.
    """
    above, blobs = os.path.split(os.path.dirname(place))
    snapshots = os.path.dirname(home) == os.path.join(above, "snapshots")
    return blobs == "blobs" and (snapshots or os.path.basename(above).startswith("models--"))
