"""Progress of a phase, its speed and the time left: as a bar, as lines, or as JSON for a program.

Rates are measured in this run alone.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from compress.errors import UsageError

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = [
    "Callback", "Listener", "Phase", "ProgressFile", "Rate", "clock_time", "describe_progress",
]  # fmt: skip

EVERY = 0.4  # seconds between two lines of a progress file, and between two samples of a rate
BEGINNING = b'{"phase": '  # of a progress file
LINE_EVERY = 60.0  # seconds between two lines of a phase without a terminal


class Rate:
    """Units per second of a phase, and the estimated time left.

    The rate is the mean over the last half of the time since the first unit began: bursts (blocks
    that are solved at once) are averaged, and work of an earlier run, or loading, soon drops out.

    Args:
        clock: returns seconds.

    Attributes:
        done, total: units at the last ``update``; ``total`` is 0 before the first.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun = self._units_begun = clock()
        self._samples: deque[tuple[float, int]] = deque()  # seconds, and units done by then
        self._sampled = 0.0  # when the last permanent sample was added
        self.done = self.total = 0

    def update(self, done: int, total: int) -> None:
        """Set the units done; ``update(0, total)`` marks the start of the first."""
        self.done, self.total = done, total
        now = self._clock()
        if not done:
            self._units_begun = now
        if not done or not self._samples:
            self._samples = deque([(self._units_begun, 0)])
        if len(self._samples) > 1 and now < self._sampled + EVERY:
            self._samples[-1] = now, done
        else:
            self._samples.append((now, done))
            self._sampled = now
        half = (self._units_begun + now) / 2
        while len(self._samples) > 1 and self._samples[1][0] <= half:
            self._samples.popleft()

    @property
    def seconds(self) -> float:
        """Seconds since the phase began."""
        return self._clock() - self._begun

    @property
    def per_second(self) -> float | None:
        """Units per second; None before anything was measured."""
        if not self._samples:
            return None
        (begin, before), (end, after) = self._samples[0], self._samples[-1]
        return (after - before) / (end - begin) if after > before and end > begin else None

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds left; None before anything was measured."""
        rate = self.per_second
        if rate is None:
            return None
        waited = self._clock() - self._samples[-1][0]
        return max((self.total - self.done) / rate - waited, 0.0)


class Listener(Protocol):
    """Gets the progress of every phase, in addition to the screen."""

    def write(
        self, phase: str, unit: str, rate: Rate, *, begun: bool = False, ended: bool = False
    ) -> None:
        """Called when a phase begins, advances or ends; ``rate`` has its units done and total."""
        ...

    def close(self) -> None:
        """Called after the last phase."""
        ...


class Callback:
    """Calls a function of a program with every update.

    Args:
        call: ``call(phase, done, total, unit)``: when a phase begins, with 0 of 0, at every step,
            and when it ends, with ``done`` = ``total``. An exception that it raises ends the work.
    """

    def __init__(self, call: Callable[[str, int, int, str], object]) -> None:
        self._call = call

    def write(
        self, phase: str, unit: str, rate: Rate, *, begun: bool = False, ended: bool = False
    ) -> None:
        """Call the function."""
        self._call(phase, rate.total if ended else rate.done, rate.total, unit)

    def close(self) -> None:
        """Does nothing."""


class Phase:
    """A running phase.

    Args:
        name: for users.
        unit: that it counts; empty for none.
        file: also gets every update.
        say: prints a line at intervals, or None.
        bar: draw a bar on stderr.
        clock: returns seconds.
    """

    def __init__(
        self,
        name: str,
        unit: str,
        file: Listener | None,
        say: Callable[[str], None] | None,
        *,
        bar: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.rate = name, Rate(clock)
        self._unit, self._file, self._say = unit, file, say
        self._next_line = LINE_EVERY
        self._bar: Progress | None = None
        if bar:
            self._bar = make_bar(lambda: describe_progress(self.rate, unit), transient=not unit)
            self._task = self._bar.add_task(name, total=None)
            self._bar.start()
        if file:
            file.write(name, unit, self.rate, begun=True)

    def update(self, done: int, total: int) -> None:
        """Set the units done, of a total."""
        self.rate.update(done, total)
        if self._bar:
            self._bar.update(self._task, completed=done, total=total)
        if self._file:
            self._file.write(self.name, self._unit, self.rate)
        if self._say and self.rate.seconds >= self._next_line:
            self._next_line = self.rate.seconds + LINE_EVERY
            self._say(f"{self.name}: {describe_progress(self.rate, self._unit)}")

    def close(self) -> None:
        """Mark the phase as complete."""
        self.hide()
        if self._file:
            self._file.write(self.name, self._unit, self.rate, ended=True)

    def hide(self) -> None:
        """Stop the bar; its last state stays on the screen where it counted units."""
        if self._bar:
            self._bar.stop()


class ProgressFile:
    """``--progress-file``: the progress of a command, for the program that started it.

    JSON lines are appended, one object each with exactly these keys::

        {"phase": "write gguf Q4_K_M", "done": 8388608, "total": 397807104, "unit": "bytes",
         "eta_s": 41.2}

    ``phase`` (str) is its name; ``unit`` (str) is what ``done`` and ``total`` (int) count: bytes,
    tokens, windows, blocks, steps, tensors. ``total`` and ``eta_s`` (float, estimated seconds
    until the end of this phase) are null while unknown. There is one line when
    a phase begins, with ``done`` 0, at most one in ``EVERY`` seconds after that, and one
    when it ends, with ``done`` at ``total`` (0 and null for a phase that counts nothing) and
    ``eta_s`` 0. A phase that fails has no end. Phases do not overlap; the last line is where the
    command is. Every line is one ``write``, so that a reader sees whole lines but perhaps a last
    one without its line break.
    """

    def __init__(self, path: Path) -> None:
        """Open for appending.

        Raises:
            UsageError: it cannot be written.
        """
        if path.is_file() and not str(path).startswith("/dev/"):
            with path.open("rb") as there:
                if there.read(len(BEGINNING)) not in (b"", BEGINNING):
                    raise UsageError(f"--progress-file {path} is a file of another kind")
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        try:  # without waiting for a pipe's reader: one without is an error
            self._file = os.open(path, flags | os.O_NONBLOCK, 0o644)
            os.set_blocking(self._file, True)
        except OSError as error:
            raise UsageError(
                f"--progress-file: cannot write to {path}: {error.strerror}"
            ) from error
        self._written = 0.0  # time of the last line

    def write(
        self, phase: str, unit: str, rate: Rate, *, begun: bool = False, ended: bool = False
    ) -> None:
        """Append a line where one is due."""
        now = time.monotonic()
        if not (begun or ended or now > self._written + EVERY):
            return
        self._written = now
        left = 0.0 if ended else rate.seconds_left
        line = {
            "phase": phase,
            "done": rate.total if ended else rate.done,
            "total": rate.total or None,
            "unit": unit,
            "eta_s": None if left is None else round(left, 1),
        }
        os.write(self._file, (json.dumps(line) + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def make_bar(describe: Callable[[], str], *, transient: bool) -> Progress:
    """A bar on stderr, with the text of ``describe`` beside it, called at each drawing.

    ``transient``: it is removed from the screen at the end.
    """
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.table import Column
    from rich.text import Text

    class Description(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(describe())

    whole = Column(no_wrap=True)  # in a narrow terminal the bar is shortened
    return Progress(
        TextColumn("{task.description:<25}", table_column=whole),
        BarColumn(table_column=Column(ratio=1)),
        Description(table_column=Column(no_wrap=True)),
        console=RichConsole(stderr=True),
        redirect_stdout=False,  # data stays on stdout
        transient=transient,
    )


def describe_progress(rate: Rate, unit: str) -> str:
    """``0.12/0.40 GB  31.0 MB/s  0:09 left``, ``512/2048 tokens  85.30 tokens/s  0:18 left``."""
    if not rate.total:
        return clock_time(rate.seconds)
    speed, left = rate.per_second, rate.seconds_left
    if unit == "bytes":
        size, name = next((s, n) for s, n in SIZES if rate.total >= s or s == 1)
        words = [f"{rate.done / size:.2f}/{rate.total / size:.2f} {name}"]
        words += [f"{speed / 1e6:.1f} MB/s"] if speed else []
    else:
        words = [f"{rate.done}/{rate.total} {unit}"]
        words += [f"{speed:.{0 if speed >= 100 else 2}f} {unit}/s"] if speed else []
    if left is not None and rate.done < rate.total:
        words.append(f"{clock_time(left)} left")
    return "  ".join(words)


SIZES = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "B"))


def clock_time(seconds: float) -> str:
    """Seconds in clock format: ``0:07``, ``12:40``, ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
