"""Markdown in which strings of a checkpoint show as they are: escaped for where they stand."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["fenced", "pipe_table", "sentence"]


def sentence(text: str) -> str:
    """Text that Markdown shows as it is, on one line and within one table cell."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*{}\[\]<>#|~&$!])|(?<!\w)_|_(?!\w)", lambda m: "\\" + m.group(0), line)


def fenced(code: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def pipe_table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table of cells that are Markdown already; columns after the first ``left`` are numbers."""
    rule = ["---"] * left + ["---:"] * (len(headers) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (headers, rule, *rows))
