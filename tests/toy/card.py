"""Finds the files of a build, and describes how to run one and whether that is possible here."""

from __future__ import annotations

import shlex
from pathlib import Path

from compress.formats import Check, Usage

USAGE = (Usage("Play with it:", "play {path}", "sh", shlex.quote),)


def find(path: Path) -> list[Path]:
    """A ``.toy`` file, or those in a folder or in the folder of a build."""
    if path.is_file():
        return [path] if path.suffix == ".toy" else []
    return sorted((*path.glob("*.toy"), *path.glob("toy/*.toy")))


def checks() -> list[Check]:
    """It is here."""
    return [Check("toy", "in the box", True)]
