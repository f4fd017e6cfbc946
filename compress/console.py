"""The console: all output of a command, for users or scripts.

Data goes to stdout, messages go to stderr. ``human`` shows both, ``json`` prints one document on
stdout and nothing else there, ``quiet`` prints paths only, ``silent`` nothing: its messages go to
the logger ``packlight`` (``compress.api``). Progress (``compress.progress``) is a
bar on stderr, and a line once a minute where that is not a terminal. ``NO_COLOR`` applies.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from compress.errors import PacklightError, printable_line, without_secrets
from compress.progress import Listener, Phase, clock_time

Update = Callable[[int, int], None]
CELL = 120  # characters that one cell of a table has at most
WIDTH = 80  # characters of a table's line, where its columns allow it
NOT_ASCII = re.compile(r"[^\x20-\x7e\n]")
LOG = logging.getLogger("packlight")
LOG.addHandler(logging.NullHandler())  # no output in a program without a handler


class Console:
    """Prints the output of a command.

    Args:
        mode: ``human``, ``json``, ``quiet`` or ``silent``.
        verbose: also show ``detail`` lines.
        listener: gets the progress of each phase.

    Example:
        >>> console = Console("quiet")
        >>> console.say("writing")
        >>> console.path("out/report.json")
        out/report.json
    """

    def __init__(
        self, mode: str = "human", verbose: bool = False, listener: Listener | None = None
    ) -> None:
        self.mode = mode
        self.verbose = verbose
        self._listener = listener
        self._shows_phases = mode in ("human", "silent") or verbose or listener is not None
        self._phase: Phase | None = None
        self.warned: set[str] = set()  # warnings that were printed

    # --- data, to stdout ---------------------------------------------------------------------

    def data(self, text: str) -> None:
        """Print a line of data; not in json or quiet mode."""
        if self.mode == "human":
            click.echo(printable_line(text))

    def result(self, document: Any) -> None:
        """Print the JSON document of ``--json``."""
        if self.mode == "json":
            text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
            click.echo(NOT_ASCII.sub(escaped, text))

    def path(self, path: object) -> None:
        """Print a written path, the only output of ``-q``."""
        if self.mode == "quiet":
            click.echo(without_secrets(str(path)))

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print aligned columns: the first left-aligned, columns of numbers right-aligned."""
        if self.mode == "human":
            click.echo(format_table(headers, rows))

    # --- messages, to stderr -----------------------------------------------------------------

    def say(self, text: str) -> None:
        """Print a message."""
        if self.mode == "human":
            click.echo(printable_line(text), err=True, color=color())
        elif self.mode == "silent":
            LOG.info(printable_line(text))

    def detail(self, text: str) -> None:
        """Print a message only with ``-v``."""
        if self.mode == "silent":
            LOG.debug(printable_line(text))
        elif self.verbose:
            click.echo(click.style(printable_line(text), dim=True), err=True, color=color())

    def warning(self, text: str) -> None:
        """Print a warning, in every mode but silent."""
        self.warned.add(text)
        if self.mode == "silent":
            LOG.warning(printable_line(text))
            return
        click.echo(
            click.style("warning: ", fg="yellow") + printable_line(text), err=True, color=color()
        )

    def hint(self, text: str) -> None:
        """Print what to type next."""
        if self.mode == "human" and text:
            click.echo(click.style("hint: ", fg="cyan") + printable_line(text), err=True,
                       color=color())  # fmt: skip

    def verdict(self, passed: bool, text: str) -> None:
        """Print the last line of a run."""
        if self.mode == "human":
            mark = click.style("passed", fg="green") if passed else click.style("FAILED", fg="red")
            click.echo(f"{mark}  {printable_line(text)}", err=True, color=color())

    @contextmanager
    def progress(self, phase: str, unit: str = "bytes") -> Iterator[Update]:
        """Show the progress of a phase: ``with … as update: update(done, total)``.

        Args:
            phase: its name.
            unit: what ``done`` and ``total`` count.
        """
        self.begin(phase, unit)
        begun = self._phase
        yield begun.update if begun else lambda done, total: None
        if self._phase is begun:
            self.end()

    def begin(self, phase: str, unit: str = "") -> None:
        """Begin a phase that lasts until the next one, or until ``end``; without a unit it has no
        count.
        """
        self.end()
        if not self._shows_phases:
            return
        self.detail(phase)
        bar = self.mode == "human" and sys.stderr.isatty()
        self._phase = Phase(phase, unit, self._listener, None if bar else self.say, bar=bar)

    def end(self) -> None:
        """End the current phase, complete or not."""
        phase, self._phase = self._phase, None
        if phase is not None:
            phase.close()
            self.detail(f"{phase.name}: {clock_time(phase.rate.seconds)}")

    def abandon(self) -> None:
        """At the end of the command, even by an error: remove the bar from the screen."""
        phase, self._phase = self._phase, None
        if phase is not None:
            phase.hide()
        if self._listener is not None:
            self._listener.close()


def escaped(char: re.Match[str]) -> str:
    """The JSON escape of a character that controls a terminal."""
    return char[0] if char[0].isprintable() else json.dumps(char[0])[1:-1]


def print_error(error: PacklightError, as_json: bool = False) -> None:
    """Print an error and its hint, to stderr; with ``--json`` also as a document, to stdout."""
    if as_json:
        print_json_error(error)
    for label, shade, text in (("error", "red", error.message), ("hint", "cyan", error.hint)):
        if text:
            click.echo(
                click.style(f"{label}: ", fg=shade) + printable_line(text), err=True, color=color()
            )


def print_json_error(error: PacklightError) -> None:
    """Print the document that ``--json`` prints in place of a result: ``error`` and ``hint``."""
    Console("json").result(
        {"error": printable_line(error.message), "hint": printable_line(error.hint)}
    )


def color() -> bool | None:
    """False with ``NO_COLOR`` (https://no-color.org), else None: decided by the stream."""
    return False if os.environ.get("NO_COLOR") else None


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int = WIDTH) -> str:
    """Format columns padded to their widest cell, two spaces apart.

    Columns that do not fit the width follow in a second table, which begins with the first column
    again.
    """
    cells = [[printable_line(cell, CELL) for cell in row] for row in (headers, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    tables, used = [[0]], widths[0]
    for column in range(1, len(headers)):
        if used + 2 + widths[column] > width and len(tables[-1]) > 1:
            tables.append([0])
            used = widths[0]
        tables[-1].append(column)
        used += 2 + widths[column]
    lines = []
    for columns in tables:
        for row in cells:
            rest = [row[column].rjust(widths[column]) for column in columns[1:]]
            lines.append("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
    return "\n".join(lines)


def short_bytes(count: float) -> str:
    """Bytes with three digits, in the decimal unit: ``3.86 MB``, ``741 MB``."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit * 0.9995:
            value = count / limit
            return f"{value:.{max(0, 3 - len(str(int(value * 1.0005))))}f} {unit}"
    return f"{count:.0f} B"


def format_bytes(count: float) -> str:
    """Bytes in both units: ``2.40 GB (2.23 GiB)``."""
    for limit, decimal, binary in ((1e9, "GB", "GiB"), (1e6, "MB", "MiB"), (1e3, "kB", "KiB")):
        if count >= limit:
            power = {"GB": 3, "MB": 2, "kB": 1}[decimal]
            return f"{count / limit:.2f} {decimal} ({count / 1024**power:.2f} {binary})"
    return f"{count:.0f} B"


def parse_bytes(text: str) -> int:
    """``1.8GiB`` → bytes; GB is 10^9 and GiB is 2^30.

    Raises:
        ValueError: not a size.
    """
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", start=1):
        units[f"{letter}B"] = 1000**power
        units[f"{letter}IB"] = 1024**power
    stripped = text.strip().replace(" ", "")
    number = stripped.rstrip("BGIKMTbgikmt")
    unit = stripped[len(number) :].upper()
    if unit not in units:
        raise ValueError(f"{text!r} is not a size: write 1.8GB or 1.8GiB")
    try:
        size = float(number) * units[unit]
    except ValueError as error:
        raise ValueError(f"{text!r} is not a size: write 1.8GB or 1.8GiB") from error
    if not 0 < size < float("inf"):
        raise ValueError(f"{text!r} is not a size: must be more than zero")
    return int(size)
