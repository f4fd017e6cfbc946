"""Reads the Dockerfile without docker: its instructions, and the files of its COPY lines."""

from __future__ import annotations

import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def instructions() -> list[tuple[str, str]]:
    """``(FROM, python:3.11…)`` and so on; comments gone, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined)]


def is_sent(path: str) -> bool:
    """Whether ``.dockerignore`` lets a top-level file or folder into the context."""
    rules = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    sent = True
    for rule in (rule for rule in rules if rule and not rule.startswith(("#", "**/"))):
        if fnmatch(path, rule.removeprefix("!")):
            sent = rule.startswith("!")
    return sent


def copy_sources(folder: Path) -> Path:
    """Copy the files of the COPY lines into ``folder``."""
    folder.mkdir()
    for word, rest in instructions():
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                assert is_sent(source), f"{source} is not in the context"
                place = folder / target
                if (ROOT / source).is_dir():
                    ignore = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(ROOT / source, place, ignore=ignore)
                else:
                    shutil.copy(ROOT / source, place / source if target == "./" else place)
    return folder
