"""How far a phase is, how fast, and how long it will take: arithmetic, and one line of JSON.

The time left is told by kinds of work. A tensor on a costly grid takes longer than one of as many
bytes on a cheap one, so a phase may come with its ``Step`` s and what is expected of them, and an
``Estimate`` corrects that by the seconds that each kind took: all kinds by what came by in all, and
each by what came by of it. What came by has its say by its share of the work, so that the hiccup
of one small tensor does not decide about the whole. Where a phase tells when its first unit begins,
what comes before is foretold apart; and some of its steps may be left out for want of time.
"""

from __future__ import annotations

import json
import math
import os
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from compress.errors import UsageError

__all__ = ["Estimate", "ProgressFile", "Step", "clock_time", "rough_time"]

EVERY = 0.4  # seconds between two lines of a progress file
TRUST = 0.01  # share of all expected seconds that must come by to count as much as expectation
TRUST_KIND = 0.005  # the same for what one kind takes, beside what all take


@dataclass(frozen=True)
class Step:
    """A stretch of a phase whose units cost alike, such as a tensor.

    Attributes:
        units: of the phase's ``done`` and ``total``: bytes, tokens, blocks.
        kind: what costs the same per unit goes by the same name.
        cost: expected seconds per unit.
        paid_first: all its time goes by before its first unit is done.
        until: seconds after the phase's first unit began, from when on it is left out.
    """

    units: int
    kind: str = ""
    cost: float = 1.0
    paid_first: bool = False
    until: float = math.inf


class Estimate:
    """Seconds left of one phase, from what its units took so far.

    Args:
        steps: in their order; where there are none, every unit costs the same.
        clock: seconds.
        start: expected seconds until the first unit begins, which then is told by ``update(0, …)``;
            costs of the steps are right from their first unit on. None where neither is so.

    Attributes:
        done, total: units, as last told; ``total`` 0 until the first is told.
    """

    def __init__(
        self,
        steps: Sequence[Step] = (),
        clock: Callable[[], float] = time.monotonic,
        start: float | None = None,
    ) -> None:
        self._clock, self._start = clock, start
        self._announce(steps)
        self.begun = self._last = clock()
        self._units_begun: float | None = None
        self.done = self.total = 0
        self._position = 0  # units paid for
        self._expected: dict[str, float] = {}  # seconds of what came by, by kind ...
        self._took: dict[str, float] = {}  # ... and what it took
        # What came by until the first news: it also paid for imports and compiled kernels.
        self._first: tuple[Counter[str], float] | None = None

    def update(self, done: int, total: int) -> None:
        """So many units of so many are done by now.

        A total that is less than was announced tells that what is missing was left out: units
        from ``done`` on, whose ``Step.until`` allows it.
        """
        announced = self._ends[-1] if self._ends else 0
        if not self._steps or announced != total:
            # Otherwise nothing is known of its kinds.
            self._announce(leave_out(self._steps, done, announced - total) or [Step(total)])
        now, position = self._clock(), self._paid(done)
        if self._units_begun is None:
            self._units_begun = self._last if done else now
        passed = self._between(self._position, position)
        if passed:
            seconds = now - self._last
            if self._first is not None or self._start is not None:
                self._learn(passed, seconds)
            if self._first is None:
                self._first = passed, seconds
            self._last, self._position = now, position
        elif self._first is None:  # the units begin only now; what came before is not theirs
            self._last = now
        self.done, self.total = done, total

    @property
    def seconds(self) -> float:
        """Since the phase began."""
        return self._clock() - self.begun

    @property
    def seconds_left(self) -> float | None:
        """None as long as nothing is known or expected."""
        if self._first is None and self._start is None:
            return None
        if self._units_begun is None:
            assert self._start is not None
            return max(self._start - self.seconds, 0.0) + self._seconds_ahead(0.0)
        left = self._seconds_ahead(self._last - self._units_begun)
        return max(left - (self._clock() - self._last), 0.0)

    @property
    def steps_done(self) -> tuple[int, int]:
        """Steps that are done, and all of them."""
        return bisect_left(self._ends, self.done + 1), len(self._steps)

    def _announce(self, steps: Sequence[Step]) -> None:
        """What the phase is made of."""
        self._steps = list(steps)
        self._ends = list(accumulate(step.units for step in steps))
        self._costs = {step.kind: step.cost for step in steps}
        self._whole = sum(step.units * step.cost for step in steps)

    def _seconds_ahead(self, begun: float) -> float:
        """Of the steps from the position on, ``begun`` seconds after the first unit did."""
        rates = {kind: self._rate(kind) for kind in self._costs}
        now = begun
        for step, end in zip(self._steps, self._ends, strict=True):
            units = max(min(end - self._position, step.units), 0)
            now += min(units * rates[step.kind], max(step.until - now, 0.0))
        return now - begun

    def _paid(self, done: int) -> int:
        """Units that the time until now has paid for."""
        index = bisect_left(self._ends, done)
        if index < len(self._steps) and self._steps[index].paid_first:
            begun = self._ends[index] - self._steps[index].units
            return self._ends[index] if done > begun else done
        return done

    def _between(self, start: int, end: int) -> Counter[str]:
        """Units by kind from one position to another."""
        found: Counter[str] = Counter()
        index = bisect_left(self._ends, start + 1)
        while start < end and index < len(self._steps):
            stop = min(self._ends[index], end)
            found[self._steps[index].kind] += stop - start
            start, index = stop, index + 1
        return found

    def _learn(self, passed: Counter[str], seconds: float) -> None:
        """Share seconds out to the kinds that went by, as was expected of them."""
        expected = {kind: units * self._costs[kind] for kind, units in passed.items()}
        whole = sum(expected.values()) or 1.0  # nothing for what only had to be found
        for kind, cost in expected.items():
            if kind not in self._expected and len(self._costs) > 1 and self._start is None:
                # Its first one also paid for imports and compiled kernels.
                self._expected[kind] = self._took[kind] = 0.0
                continue
            self._expected[kind] = self._expected.get(kind, 0.0) + cost
            self._took[kind] = self._took.get(kind, 0.0) + seconds * cost / whole

    def _rate(self, kind: str) -> float:
        """Seconds per unit."""
        cost, expected, took = self._costs[kind], sum(self._expected.values()), self._took
        if len(self._costs) == 1 and self._first is not None:
            passed, seconds = self._first
            return took[kind] * cost / expected if expected else seconds / passed.total()
        if not self._whole:
            return cost
        pace = (sum(took.values()) + TRUST * self._whole) / (expected + TRUST * self._whole)
        known = TRUST_KIND * self._whole
        own = (took.get(kind, 0.0) + known * pace) / (self._expected.get(kind, 0.0) + known)
        return cost * own


def leave_out(steps: Sequence[Step], begin: int, count: int) -> list[Step] | None:
    """Steps less ``count`` units from ``begin`` on; None where some of these must be done."""
    kept, end = [], 0
    for step in steps:
        start, end = end, end + step.units
        gone = min(end, begin + count) - max(start, begin)
        if gone <= 0:
            kept.append(step)
        elif step.until == math.inf:
            return None
        elif gone < step.units:
            kept.append(replace(step, units=step.units - gone))
    return kept if 0 < count <= end - begin else None


class ProgressFile:
    """``--progress-file``: how far a command is, for the program that started it.

    JSON lines are appended, one object each with exactly these keys::

        {"phase": "write gguf Q4_K_M", "done": 8388608, "total": 397807104, "unit": "bytes",
         "eta_s": 41.2}

    ``phase`` (str) is what a person is shown; ``unit`` (str) is what ``done`` and ``total`` (int)
    count: bytes, tokens, windows, blocks, steps, tensors. ``total`` and ``eta_s`` (float, seconds
    until the end of this phase) are null while unknown; ``total`` shrinks where part of the work is
    left out. There is one line when a phase begins, with ``done`` 0, at most one in ``EVERY``
    seconds after that, and one when it ends, with ``done`` at ``total`` (0 and null for a phase
    that counts nothing) and ``eta_s`` 0. A phase that fails has no end. Phases do not overlap; the
    last line is where the command is. Every line is one ``write``, so that a reader sees whole
    lines but perhaps a last one without its line break.
    """

    def __init__(self, path: Path) -> None:
        """Open for appending.

        Raises:
            UsageError: cannot be written to.
        """
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise UsageError(
                f"--progress-file: cannot write to {path}: {error.strerror}"
            ) from error
        self._told = 0.0

    def tell(
        self, phase: str, unit: str, estimate: Estimate, *, begun: bool = False, ended: bool = False
    ) -> None:
        """A line, where it is due."""
        now = time.monotonic()
        if not (begun or ended or now > self._told + EVERY):
            return
        self._told = now
        left = 0.0 if ended else estimate.seconds_left
        line = {
            "phase": phase,
            "done": estimate.total if ended else estimate.done,
            "total": estimate.total or None,
            "unit": unit,
            "eta_s": None if left is None else round(left, 1),
        }
        os.write(self._file, (json.dumps(line) + "\n").encode())

    def close(self) -> None:
        """No more lines."""
        os.close(self._file)


def clock_time(seconds: float) -> str:
    """Seconds as people read a clock: ``0:07``, ``12:40``, ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rough_time(seconds: float) -> str:
    """Seconds that are an estimate: ``40 s``, ``13 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{max(round(seconds / 5), 1) * 5} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
