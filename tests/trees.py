"""Copies of this tree, and of its compiled code.

copy_sources(folder)    what building the wheel needs
warm(tree)              bytecode and machine code for the unchanged files of a copy
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("compress", "exporters", "packlight", "recipes")


def copy_sources(folder: Path) -> None:
    """Copy the packages and pyproject.toml with its files: building writes beside the sources."""
    folder.mkdir()
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)


def warm(tree: Path) -> None:
    """Copy ``__pycache__`` of this tree, and the times of unchanged sources, to a copy of it.

    Python and numba use a cache file only if it records the size and time of its source.
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
                # Another worker may be compiling: files are renamed or removed meanwhile.
                for file in cache.iterdir():
                    if file.suffix in (".pyc", ".nbi", ".nbc"):
                        place.mkdir(exist_ok=True)
                        shutil.copy2(file, place / file.name)
