"""The display of a running batch: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from compress.batch.engine import Work
from compress.batch.state import Record, State
from compress.console import Console, color, format_bytes
from compress.progress import clock_time
from compress.report.report import Report
from compress.report.words import short_size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.text import Text

__all__ = ["Board"]

WORDS = {
    "passed": ("passed", "green"),
    "failed": ("FAILED", "red"),
    "written": ("not verified", "yellow"),
    "error": ("could not run", "red"),
    "killed": ("killed", "red"),
    "interrupted": ("interrupted", "yellow"),
}
LIVE = ("job", "result", "time", "size", "KL up to", "phase")
SHOWN = 12  # ended jobs, and waiting ones, that a table names
TAIL = 4096  # bytes at the end of a progress file that are searched for its last line


class Named(Protocol):
    """The attributes of a planned job that are shown."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def error(self) -> str: ...
    @property
    def hint(self) -> str: ...
    @property
    def prediction(self) -> Any: ...


class Board:
    """Tracks every job: records and shows it, and tells the engine when to stop.

    Attributes:
        records: of jobs that ended, in this batch or earlier, by name.
        fresh: names of those that ended in this batch.
        seconds: since the batch started.
    """

    def __init__(
        self, planned: Sequence[Named], state: State, console: Console, *, fail_fast: bool
    ) -> None:
        self._planned = {one.name: one for one in planned}
        self._state, self._console, self._fail_fast = state, console, fail_fast
        self._started: dict[str, float] = {}
        self._begun = time.monotonic()
        self._live: Live | None = None
        self.records: dict[str, Record] = {}
        self.fresh: list[str] = []
        self._failed = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun

    # --- events of the engine ---------------------------------------------------------------

    def started(self, work: Work) -> None:
        """See ``Watch.started``."""
        one = self._planned[work.name]
        self._state.begin(work.name, one.fingerprint)
        self._started[work.name] = time.monotonic()
        if self._live is None:
            threads = f"{work.threads} thread{'s' * (work.threads != 1)}"
            memory = format_bytes(work.memory).partition(" (")[0]
            self._console.say(f"started  {work.name}  ({memory}, {threads})")

    def wanted(self) -> bool:
        """See ``Watch.wanted``: until the first failure, with ``fail_fast``."""
        return not (self._fail_fast and self._failed)

    def settle(self, one: Named, record: Record | None, *, fresh: bool = False) -> None:
        """Note an ended job; without ``fresh``, one that is not started: finished or impossible."""
        self._started.pop(one.name, None)
        if one.error:  # planned anew each time
            record = Record("", "error", one.error, one.hint)
        assert record is not None
        self.records[one.name] = record
        if fresh:
            self.fresh.append(one.name)
        if fresh and record.status not in ("passed", "written"):
            self._failed = True
        if self._live is None:
            earlier = "" if fresh or one.error else "  (before)"
            words = f"{WORDS[record.status][0]}  {one.name}  {self.result(one.name)}"
            self._console.say(f"{words.rstrip()}{earlier}")

    def interrupt(self) -> None:
        """Record running jobs as interrupted, except those that finished meanwhile."""
        for name in self._started:
            record = self._state.read(name)
            if record is None or not record.finished:
                record = Record(self._planned[name].fingerprint, "interrupted")
            self.records[name] = record

    # --- display ------------------------------------------------------------------------------

    def __enter__(self) -> Board:
        if self._console.mode == "human" and sys.stderr.isatty():
            from rich.console import Console as RichConsole
            from rich.live import Live

            plain = RichConsole(stderr=True, no_color=color() is False)
            self._live = Live(
                get_renderable=self.table, console=plain, refresh_per_second=4,
                redirect_stdout=False, transient=True, vertical_overflow="ellipsis",
            )  # fmt: skip
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def result(self, name: str) -> str:
        """A short text on the result of an ended job."""
        record = self.records[name]
        if record.error:
            return record.error
        took = clock_time(record.seconds) if record.seconds else ""
        size, divergence = figures(self._state.report(name))
        return "  ".join(filter(None, [took, size, divergence and f"KL up to {divergence}"]))

    def table(self) -> RenderableType:
        """The current table; ``rich`` calls it several times a second."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        rows = Table(box=None, pad_edge=False, header_style="dim")
        for header in LIVE:
            rows.add_column(header, overflow="fold")
        ended = list(self.records)[-SHOWN:]
        for name in ended:
            record = self.records[name]
            word, shade = WORDS[record.status]
            took = clock_time(record.seconds) if record.seconds else ""
            size, divergence = figures(self._state.report(name))
            rows.add_row(name, Text(word, shade), took, size, divergence)
        for name, begun in list(self._started.items()):
            phase = describe_phase(last_line(self._state.file(name, "progress")))
            took = clock_time(time.monotonic() - begun)
            rows.add_row(name, Text("running", "cyan"), took, "", "", Text(phase))
        waiting = [n for n in self._planned if n not in self.records and n not in self._started]
        for name in waiting[:SHOWN]:
            rows.add_row(name, Text("queued", "dim"))
        errors = [f"{name}: {self.records[name].error}" for name in ended
                  if self.records[name].error]  # fmt: skip
        return Group(rows, *(Text(error, "red") for error in errors), self.counts(len(waiting)))

    def counts(self, waiting: int) -> Text:
        """The line of counts below the table."""
        from rich.text import Text

        done = [record.status for record in self.records.values()]
        words = [f"{len(done)} of {len(self._planned)} done"]
        words += [f"{done.count(status)} {WORDS[status][0]}" for status in WORDS if status in done]
        words += [f"{len(self._started)} running", f"{waiting} queued", clock_time(self.seconds)]
        return Text("  ".join(words), "dim")


def last_line(progress: Path) -> Mapping[str, Any]:
    """The last complete line of a progress file (``compress.progress.ProgressFile``)."""
    try:
        with progress.open("rb") as stream:
            stream.seek(max(progress.stat().st_size - TAIL, 0))
            lines = stream.read().split(b"\n")[:-1]
        found = json.loads(lines[-1])
    except (OSError, ValueError, IndexError):
        return {}
    return found if isinstance(found, dict) else {}


def describe_phase(line: Mapping[str, Any]) -> str:
    """Phase, share and time left: ``write gguf Q4_K_M  43 %  0:12 left``."""
    words = [str(line.get("phase", "starting"))]
    if line.get("total"):
        words.append(f"{100 * line['done'] // line['total']} %")
    if line.get("eta_s"):
        words.append(f"{clock_time(line['eta_s'])} left")
    return "  ".join(words)


def figures(report: Report | None) -> tuple[str, str]:
    """Bytes of all artifacts of a finished job, and their worst divergence; empty where there is
    none.
    """
    artifacts = report.artifacts if report else []
    divergences = [found.kl_divergence.mean for found in artifacts if found.kl_divergence]
    known = [value for value in divergences if value is not None]
    size = short_size(sum(found.bytes for found in artifacts)) if artifacts else ""
    return size, f"{max(known):.4f}" if known else ""
