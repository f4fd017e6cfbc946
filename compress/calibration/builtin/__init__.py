"""The built-in calibration set: a mixed text, written for packlight.

Statistics taken on one domain (only an encyclopedia, only code) hurt the others, so the set mixes
English prose, chat turns, source code, numbers and tables, and nineteen other languages. README.md
beside this file says what each file is.
"""

from importlib.resources import files
from pathlib import Path

__all__ = ["paths"]

FILES = ("prose.txt", "chat.jsonl", "code.txt", "numbers.txt", "languages.txt")


def paths() -> list[Path]:
    """The data files, always in the same order. UTF-8; `.jsonl` has one conversation per line."""
    return [Path(str(files(__name__) / name)) for name in FILES]
