"""Copies of this tree that need not be compiled again.

warm(tree)    give a copy the bytecode and the machine code of the files that it has from here
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("compress", "exporters", "packlight", "recipes")


def warm(tree: Path) -> None:
    """Python and numba take what is in ``__pycache__`` where a source's size and time are those
    that are noted in it, so an unchanged file of the copy gets the time of its original.

    A cold start is what the first run of a fresh checkout is.
    """
    for package in PACKAGES:
        for source in (ROOT / package).rglob("*.py"):
            copy = tree / source.relative_to(ROOT)
            if copy.exists() and copy.read_bytes() == source.read_bytes():
                times = source.stat()
                os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))
        for cache in (ROOT / package).rglob("__pycache__"):
            place = tree / cache.relative_to(ROOT)
            if place.parent.exists():
                # Another worker may be compiling: files come by renaming, some are gone at once.
                for file in cache.iterdir():
                    if file.suffix in (".pyc", ".nbi", ".nbc"):
                        place.mkdir(exist_ok=True)
                        shutil.copy2(file, place / file.name)
