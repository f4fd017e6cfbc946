"""One sink for everything a person or a script reads.

Data goes to stdout, talk goes to stderr. ``human`` shows both, ``json`` prints one document on
stdout and nothing else there, ``quiet`` prints paths only. Progress bars live on stderr and are
silent when it is not a terminal. ``NO_COLOR`` is honoured.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from compress.errors import PacklightError
from compress.progress import Estimate, ProgressFile, Step, clock_time

if TYPE_CHECKING:
    from rich.progress import Progress

Update = Callable[[int, int], None]


class Console:
    """Where output goes.

    Args:
        mode: ``human``, ``json`` or ``quiet``.
        verbose: also show ``detail`` lines.
        progress_file: where to tell another program how far the work is.
    """

    def __init__(
        self, mode: str = "human", verbose: bool = False, progress_file: ProgressFile | None = None
    ) -> None:
        self.mode = mode
        self.verbose = verbose
        self._progress_file = progress_file
        self._phase: Phase | None = None

    # --- data, to stdout ---------------------------------------------------------------------

    def data(self, text: str) -> None:
        """A line that a script may want; not in json or quiet mode."""
        if self.mode == "human":
            click.echo(text)

    def result(self, document: Any) -> None:
        """The one JSON document of ``--json``."""
        if self.mode == "json":
            click.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))

    def path(self, path: object) -> None:
        """A written path: all that ``-q`` prints."""
        if self.mode == "quiet":
            click.echo(str(path))

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Plain aligned columns; the first is left-aligned, columns of numbers right-aligned."""
        if self.mode == "human":
            click.echo(format_table(headers, rows))

    # --- talk, to stderr ---------------------------------------------------------------------

    def say(self, text: str) -> None:
        """A line about what is going on."""
        if self.mode == "human":
            click.echo(text, err=True, color=color())

    def detail(self, text: str) -> None:
        """A line for ``-v``."""
        if self.verbose:
            click.echo(click.style(text, dim=True), err=True, color=color())

    def warning(self, text: str) -> None:
        """Something that is not as it should be, but goes on; shown in every mode."""
        click.echo(click.style("warning: ", fg="yellow") + text, err=True, color=color())

    def verdict(self, passed: bool, text: str) -> None:
        """The last line of a run."""
        if self.mode == "human":
            mark = click.style("passed", fg="green") if passed else click.style("FAILED", fg="red")
            click.echo(f"{mark}  {text}", err=True, color=color())

    @contextmanager
    def progress(
        self,
        phase: str,
        unit: str = "bytes",
        steps: Sequence[Step] = (),
        start: float | None = None,
    ) -> Iterator[Update]:
        """One phase of the work, with a bar where a person looks on, what is done per second and
        the time left: ``with … as update: update(done, total)``.

        Args:
            phase: its name.
            unit: what ``done`` and ``total`` count.
            steps: its tensors in their order, where it has some that cost more than others.
            start: seconds until the first unit begins, where that is told (``Estimate``).
        """
        self.begin(phase, unit, steps, start)
        begun = self._phase
        assert begun is not None
        yield begun.update
        if self._phase is begun:
            self.end()

    def begin(
        self,
        phase: str,
        unit: str = "",
        steps: Sequence[Step] = (),
        start: float | None = None,
    ) -> None:
        """A phase that lasts until the next one begins, or ``end``."""
        self.end()
        self.detail(phase)
        shown = self.mode == "human" and sys.stderr.isatty()
        estimate = Estimate(steps, start=start)
        self._phase = Phase(phase, unit, estimate, self._progress_file, shown=shown)

    def end(self) -> None:
        """The phase is over, whether or not it came to its end."""
        phase, self._phase = self._phase, None
        if phase is not None:
            phase.close()
            self.detail(f"{phase.name}: {clock_time(phase.estimate.seconds)}")

    def abandon(self) -> None:
        """The command is over, perhaps by an error: take the bar off the screen."""
        phase, self._phase = self._phase, None
        if phase is not None:
            phase.hide()
        if self._progress_file is not None:
            self._progress_file.close()


class Phase:
    """A phase that is under way.

    Args:
        name: what a person is told.
        unit: what it counts.
        estimate: of its time.
        file: told of everything, too.
        shown: as a bar on stderr.
    """

    def __init__(
        self, name: str, unit: str, estimate: Estimate, file: ProgressFile | None, *, shown: bool
    ) -> None:
        self.name, self.estimate = name, estimate
        self._unit, self._file = unit, file
        self._bar: Progress | None = None
        if shown:
            told = partial(describe_progress, estimate, unit)
            self._bar = make_bar(told, passing=not unit)
            self._task = self._bar.add_task(name, total=None)
            self._bar.start()
        if file:
            file.tell(name, unit, estimate, begun=True)

    def update(self, done: int, total: int) -> None:
        """So many units of so many are done."""
        self.estimate.update(done, total)
        if self._bar:
            self._bar.update(self._task, completed=done, total=total)
        if self._file:
            self._file.tell(self.name, self._unit, self.estimate)

    def close(self) -> None:
        """It came to its end."""
        self.hide()
        if self._file:
            self._file.tell(self.name, self._unit, self.estimate, ended=True)

    def hide(self) -> None:
        """No more bar; what it came to stays on the screen, where it counted something."""
        if self._bar:
            self._bar.stop()


def make_bar(describe: Callable[[], str], *, passing: bool) -> Progress:
    """A bar on stderr, with a line of text beside it that is asked for as it is drawn.

    ``passing``: it leaves nothing on the screen.
    """
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.table import Column
    from rich.text import Text

    class Told(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(describe())

    whole = Column(no_wrap=True)  # in a narrow terminal it is the bar that gives way
    return Progress(
        TextColumn("{task.description:<25}", table_column=whole),
        BarColumn(table_column=Column(ratio=1)),
        Told(table_column=Column(no_wrap=True)),
        console=RichConsole(stderr=True),
        redirect_stdout=False,  # data is not talk
        transient=passing,
    )


def describe_progress(estimate: Estimate, unit: str) -> str:
    """``0.12/0.40 GB  17/290 tensors  31.0 MB/s  0:09 left``."""
    left = estimate.seconds_left
    words = []
    if not estimate.total:
        words.append(clock_time(estimate.seconds))
    elif unit == "bytes":
        size, name = next((s, n) for s, n in SIZES if estimate.total >= s or s == 1)
        words.append(f"{estimate.done / size:.2f}/{estimate.total / size:.2f} {name}")
        done, count = estimate.steps_done
        if count > 1:
            words.append(f"{done}/{count} tensors")
        words.append(f"{estimate.done / max(estimate.seconds, 1e-9) / 1e6:.1f} MB/s")
    else:
        words.append(f"{estimate.done}/{estimate.total} {unit}")
    if left is not None and (estimate.done < estimate.total or not estimate.total):
        words.append(f"{clock_time(left)} left")
    return "  ".join(words)


SIZES = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "B"))


def print_error(error: PacklightError) -> None:
    """The one clear line, and the hint below it; to stderr.

    One line even where a name has line breaks in it, or a checkpoint escapes for the terminal.
    """
    for label, shade, text in (("error", "red", error.message), ("hint", "cyan", error.hint)):
        if text:
            line = "".join(char if char.isprintable() else " " for char in text)
            click.echo(click.style(f"{label}: ", fg=shade) + line, err=True, color=color())


def color() -> bool | None:
    """False under ``NO_COLOR``, else what the stream allows (https://no-color.org)."""
    return False if os.environ.get("NO_COLOR") else None


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell, two spaces apart, readable without colour."""
    cells = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    lines = []
    for row in cells:
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)


def format_bytes(count: float) -> str:
    """Both units, since people mean either: ``2.40 GB (2.23 GiB)``."""
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
