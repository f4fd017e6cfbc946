"""Where files of a build lie, how to run one, and whether that can be done here."""

from __future__ import annotations

from pathlib import Path

from compress.formats import Check


def find(path: Path) -> list[Path]:
    """A ``.toy`` file, or those in a folder or in the folder of a build."""
    if path.is_file():
        return [path] if path.suffix == ".toy" else []
    return sorted((*path.glob("*.toy"), *path.glob("toy/*.toy")))


def how_to_run(path: str) -> list[str]:
    """By nobody."""
    return [f"Play with {path}."]


def checks() -> list[Check]:
    """It is here."""
    return [Check("toy", "in the box", True)]
