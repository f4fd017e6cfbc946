"""The charts of ``batch.html``, which compare many artifacts; drawn with ``report.charts``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from compress.report import charts
from compress.report.charts import CHARACTER, WIDTH, line, text

__all__ = ["Dot", "Row", "cloud", "rows"]

WIDE = 20.0  # a range beyond this factor is drawn on a logarithmic axis


@dataclass(frozen=True)
class Dot:
    """The mark of one artifact: its style, its position, and its name and figures as tooltip."""

    style: str
    x: float
    title: str
    y: float = 0.0


@dataclass(frozen=True)
class Row:
    """The marks of one job's artifacts on a line."""

    label: str
    dots: Sequence[Dot]


@dataclass(frozen=True)
class Axis:
    """Maps values to picture units, linear from zero or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    marks: Sequence[float]

    @classmethod
    def of(cls, values: Sequence[float], start: float, end: float) -> Axis:
        """An axis for positive values (zero is drawn at its start)."""
        positive = [value for value in values if value > 0]
        least, most = min(positive, default=1.0), max(positive, default=1.0)
        if most / least <= WIDE:
            marks = charts.ticks(0.0, most, 4)
            return cls(0.0, marks[-1], start, end, marks)
        powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
        steps = (1, 2, 5) if len(powers) <= 2 else (1, 3) if len(powers) <= 3 else (1,)
        marks = [step * 10.0**power for power in powers for step in steps]
        low = max((mark for mark in marks if mark <= least), default=least)
        high = min((mark for mark in marks if mark >= most), default=most)
        return cls(low, high, start, end, [mark for mark in marks if low <= mark <= high])

    def place(self, value: float) -> float:
        if self.low > 0:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = value / self.high
        return self.start + share * (self.end - self.start)


def marked(dot: Dot, x: float, y: float) -> Markup:
    """A mark with its name as a tooltip."""
    return charts.element("g", charts.element("title", dot.title), charts.marker(x, y, dot.style))


def cloud(
    dots: Sequence[Dot],
    series: Sequence[Sequence[Dot]],
    title: str,
    x_axis: str,
    y_axis: str,
    divisor: float,
) -> Markup:
    """A scatter plot of all artifacts: size to the right, divergence up.

    Args:
        dots: not empty.
        series: runs of them that are joined by a line in the style of the first.
        title: for screen readers.
        x_axis, y_axis: labels of the axes, with the unit.
        divisor: from ``x`` to the unit of its axis.
    """
    left, right, top, bottom = 52.0, WIDTH - 14, 26.0, 280.0
    across = Axis.of([dot.x / divisor for dot in dots], left, right)
    up = Axis.of([dot.y for dot in dots], bottom, top)
    marks: list[Markup] = []
    for value in up.marks:
        y = up.place(value)
        marks += [
            line(left, y, right, y, "grid"),
            text(left - 6, y + 4, charts.plain(value), "end", "tick"),
        ]
    for value in across.marks:
        x = across.place(value)
        marks.append(text(x, bottom + 17, charts.plain(value), "middle", "tick"))
    marks.append(text((left + right) / 2, bottom + 36, x_axis, "middle", "axis"))
    marks.append(text(0, top - 14, y_axis, "start", "axis"))
    for run in series:
        path = " ".join(f"{across.place(dot.x / divisor):.1f},{up.place(dot.y):.1f}" for dot in run)
        marks.append(charts.element("polyline", points=path, class_=f"curve {run[0].style}"))
    marks += [marked(dot, across.place(dot.x / divisor), up.place(dot.y)) for dot in dots]
    return charts.picture(bottom + 44, title, *marks)


def rows(items: Sequence[Row], title: str, axis: str, divisor: float = 1.0) -> Markup:
    """A line for each job with a mark for each of its artifacts, on one scale.

    Args:
        items: in order; at least one has dots.
        title: for screen readers.
        axis: label of the axis, with the unit.
        divisor: from values to that unit.
    """
    left = min(10 + max(len(row.label) for row in items) * CHARACTER * 0.8, WIDTH / 2)
    right, height = WIDTH - 10, 17.0
    bottom = len(items) * height + 4
    values = [dot.x / divisor for row in items for dot in row.dots]
    scale = Axis.of(values, left + 6, right)
    marks: list[Markup] = []
    for value in scale.marks:
        x = scale.place(value)
        marks.append(line(x, 0.0, x, bottom, "grid"))
        marks.append(text(x, bottom + 15, charts.plain(value), "middle", "tick"))
    for place, row in enumerate(items):
        y = (place + 0.5) * height
        marks.append(text(left - 4, y + 4, row.label, "end", "tick"))
        marks += [marked(dot, scale.place(dot.x / divisor), y) for dot in row.dots]
    marks.append(text((left + right) / 2, bottom + 32, axis, "middle", "axis"))
    return charts.picture(bottom + 40, title, *marks)
