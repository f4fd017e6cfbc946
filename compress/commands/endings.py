"""Error messages of the command line for exceptions of Python and of libraries."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from compress.errors import (
    DiskFullError,
    PacklightError,
    RuntimeMissingError,
    first_line,
    is_disk_full,
)
from compress.files import full_disk

# Parts of library messages for refused memory or threads.
NO_MEMORY = (
    "can't allocate memory", "cannot allocate memory", "unable to allocate", "bad_alloc",
    "failed to map segment", "can't start new thread",
)  # fmt: skip
OWN = ("compress", "exporters", "packlight")  # a missing module of these is a bug


def in_words(error: Exception) -> PacklightError:
    """The error line for an unexpected exception or a resource that the system refused."""
    said = first_line(error)
    code = error.errno if isinstance(error, OSError) else None
    no_memory = isinstance(error, MemoryError) or code == errno.ENOMEM
    if no_memory or any(words in said.lower() for words in NO_MEMORY):
        what = "" if said == type(error).__name__ else f": {said}"
        hint = "fewer --threads, a smaller --max-memory, or a higher limit (ulimit -v, -u)"
        return PacklightError(f"the system gives no more memory{what}", hint)
    if code in (errno.EMFILE, errno.ENFILE):
        return PacklightError("the system opens no more files", "a higher limit: ulimit -n 1024")
    if isinstance(error, OSError) and is_disk_full(error) and not error.filename:
        full, hint = full_disk(Path.cwd())
        if shutil.disk_usage(full).free > 1 << 20:  # perhaps stdout's disk is the full one
            return DiskFullError(f"no room left to write: {error.strerror or said}")
        return DiskFullError(f"the disk of {full} ran full ({error.strerror or said})", hint)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return PacklightError(f"{where}{error.strerror or error}")
    if isinstance(error, ValueError) and "embedded null" in said:
        return PacklightError("a path or a name has a NUL character")
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if package not in OWN:
            hint = f"pip install {package}; packlight doctor lists what is missing"
            return RuntimeMissingError(f"{package} is not installed", hint)
    if isinstance(error, UnicodeError):
        return PacklightError(f"a name or a text is not UTF-8: {said}")
    hint = "this is a bug in packlight; PACKLIGHT_DEBUG=1 shows where"
    return PacklightError(f"{type(error).__name__}: {said}", hint)
