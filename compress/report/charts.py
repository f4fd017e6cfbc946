"""The charts of the HTML report: plain SVG, drawn from an artifact's entries in report.json.

Every picture is 400 units wide and scales with its column, so that text stays near 12 px on a
phone and on a desktop. Colours come from the page's CSS variables through classes (``c0``, ``c1``
…, one per artifact, ``float`` for the baseline), so one picture works in the light and the dark
theme. Strings are escaped by ``markupsafe``: a checkpoint's name cannot become markup.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from compress.report.report import TensorReport

WIDTH = 400.0
ROLES = [  # rows of the depth picture, in order of execution
    "embed_tokens",
    "in_proj",
    "out_proj",
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
    "router",
    "shared.gate_proj",
    "shared.up_proj",
    "shared.down_proj",
    "experts.gate_proj",
    "experts.up_proj",
    "experts.gate_up_proj",
    "experts.down_proj",
    "lm_head",
]
CHARACTER = 8.8  # width to allow for a character; phones show text at 14.5 units


@dataclass(frozen=True)
class Point:
    """One artifact of the scatter plot; ``error`` is one standard error of ``y``."""

    label: str
    style: str
    x: float
    y: float
    error: float | None


@dataclass(frozen=True)
class Bar:
    """A bar: its name, its value as text, and its parts from left to right (value, style)."""

    label: str
    text: str
    parts: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Group:
    """Bars under one heading (``""``: no heading)."""

    heading: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Curve:
    """The mean of each bin; None where it is not finite."""

    label: str
    style: str
    mean: Sequence[float | None]


def element(name: str, *children: object, **attributes: object) -> Markup:
    """An SVG element; children and values are escaped unless they are markup already."""
    # `class_` for the keyword, `stroke_width` for `stroke-width`.
    parts = []
    for key, value in attributes.items():
        # Coordinates with one digit, so that pages are small and the same everywhere.
        short = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
        parts.append(f' {key.rstrip("_").replace("_", "-")}="{escape(short)}"')
    inner = Markup("").join(escape(child) for child in children)
    return Markup(f"<{name}{''.join(parts)}>{inner}</{name}>")


def picture(height: float, title: str, *children: Markup) -> Markup:
    """The ``svg`` element around a picture, with a title for screen readers."""
    return element(
        "svg",
        element("title", title),
        *children,
        viewBox=f"0 0 {WIDTH:g} {height:g}",
        role="img",
        aria_label=title,
    )


def text(x: float, y: float, content: str, anchor: str = "start", style: str = "") -> Markup:
    """A line of text with its baseline at ``y``."""
    return element("text", content, x=x, y=y, text_anchor=anchor, class_=style or "label")


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=style)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover ``[low, high]`` with about ``count`` steps of 1, 2, 2.5 or 5."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power * count >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def plain(value: float) -> str:
    """A tick's number: no exponent, no trailing zeros."""
    return f"{value:.6f}".rstrip("0").rstrip(".") if abs(value) < 100 else f"{value:.0f}"


def unit_of(largest: float) -> tuple[float, str]:
    """The decimal byte unit for an axis that ends at ``largest``: divisor and name."""
    for divisor, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= divisor:
            return divisor, name
    return 1.0, "B"


def scatter(
    points: Sequence[Point],
    title: str,
    limit: float | None,
    budget: float | None,
) -> Markup:
    """A scatter plot of size and KL divergence, with ±2 standard errors; gate and budget as lines.

    A gate or a budget far from all points would compress the plot: it is left out, or named at
    the edge.

    Args:
        points: ``x`` in bytes, ``y`` in nats per token.
        title: for screen readers.
        limit: of the mean KL divergence, or None.
        budget: in bytes, or None.
    """
    left, right, top, bottom = 48.0, WIDTH - 14, 26.0, 240.0
    sizes = [point.x for point in points]
    if budget and min(sizes) / 1.5 < budget < max(sizes) * 1.5:
        sizes.append(budget)
    divisor, unit = unit_of(max(sizes))
    margin = (max(sizes) - min(sizes)) * 0.15 or max(sizes) * 0.1
    x_ticks = ticks(max(0.0, min(sizes) - margin) / divisor, (max(sizes) + margin) / divisor, 4)
    highest = max(point.y + 2 * (point.error or 0) for point in points)
    near = limit is not None and limit < 2 * highest
    y_ticks = ticks(0.0, max(highest, limit or 0.0 if near else 0.0) * 1.1 or 1.0, 4)

    def x_of(size: float) -> float:
        share = (size / divisor - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return left + share * (right - left)

    def y_of(kl: float) -> float:
        return bottom - kl / y_ticks[-1] * (bottom - top)

    marks: list[Markup] = []
    for tick in y_ticks:
        y = y_of(tick)
        marks += [
            line(left, y, right, y, "grid"),
            text(left - 6, y + 4, plain(tick), "end", "tick"),
        ]
    for tick in x_ticks:
        marks.append(text(x_of(tick * divisor), bottom + 17, plain(tick), "middle", "tick"))
    marks.append(text((left + right) / 2, bottom + 36, f"file size, {unit}", "middle", "axis"))
    marks.append(text(0, top - 14, "mean KL divergence, nats per token", "start", "axis"))
    if limit is not None and near:
        marks.append(line(left, y_of(limit), right, y_of(limit), "limit"))
        marks.append(text(right, y_of(limit) - 4, f"gate {plain(limit)}", "end", "limit-label"))
    elif limit is not None:
        marks.append(text(right, top - 14, f"gate {plain(limit)}, above", "end", "limit-label"))
    if budget in sizes:
        x = x_of(budget or 0.0)
        marks.append(line(x, top, x, bottom, "limit"))
        marks.append(text(x - 4, top + 10, "budget", "end", "limit-label"))
    places = [(x_of(point.x), y_of(point.y)) for point in points]
    taken = [(x - 7, x + 7, y + 4) for x, y in places]
    for point, (x, y) in zip(points, places, strict=True):
        if point.error:
            low, high = y_of(max(point.y - 2 * point.error, 0)), y_of(point.y + 2 * point.error)
            marks.append(line(x, low, x, high, f"error {point.style}"))
        marks.append(marker(x, y, point.style))
        label_x, label_y, anchor = free_place(
            x, y, len(point.label) * CHARACTER, taken, (left, right)
        )
        marks.append(text(label_x, label_y, point.label, anchor, f"name {point.style}"))
    return picture(bottom + 44, title, *marks)


def free_place(
    x: float,
    y: float,
    width: float,
    taken: list[tuple[float, float, float]],
    edges: tuple[float, float],
) -> tuple[float, float, str]:
    """Position of a mark's label: beside it if that is free, else a little above or below.

    Args:
        x, y: of the mark.
        width: of the name.
        taken: boxes (left, right, baseline) of marks and labels so far; the new one is added.
        edges: of the plot, left and right, so that the numbers of the axis stay free.
    """
    for shift in (0, -15, 15, -30, 30, -45, 45, -60, 60):
        for anchor, start in (("start", x + 10), ("end", x - 10 - width)):
            box = (start, start + width, y + 4 + shift)
            clear = all(
                box[1] < low or box[0] > high or abs(box[2] - base) >= 14
                for low, high, base in taken
            )
            if clear and edges[0] <= start and start + width <= edges[1]:
                taken.append(box)
                return (x + 10 if anchor == "start" else x - 10), box[2], anchor
    return x + 10, y + 4, "start"


def marker(x: float, y: float, style: str) -> Markup:
    """A mark whose shape depends on the style, so that colour is not the only difference."""
    shape = int(style.removeprefix("c")) % 3 if style.startswith("c") else 0
    if shape == 0:
        return element("circle", cx=x, cy=y, r=5.5, class_=f"mark {style}")
    if shape == 1:
        return element("rect", x=x - 5, y=y - 5, width=10, height=10, class_=f"mark {style}")
    corners = f"{x:.1f},{y - 7:.1f} {x + 7:.1f},{y:.1f} {x:.1f},{y + 7:.1f} {x - 7:.1f},{y:.1f}"
    return element("polygon", points=corners, class_=f"mark {style}")


def bars(
    groups: Sequence[Group],
    title: str,
    axis: str,
    *,
    divisor: float = 1.0,
    limit: tuple[float, str] | None = None,
) -> Markup:
    """Horizontal bars from zero on one scale, each with its name above and its value as text.

    Args:
        groups: bars in order.
        title: for screen readers.
        axis: label of the axis, with the unit.
        divisor: from values to that unit.
        limit: a vertical line with its label.
    """
    longest = max(sum(v for v, _ in bar.parts) for group in groups for bar in group.bars)
    marks_at = ticks(0.0, max(longest, limit[0] if limit else 0.0) / divisor or 1.0, 4)

    unit = (WIDTH - 12) / marks_at[-1] / divisor  # picture units per unit of the values
    words: list[Markup] = []  # drawn last: their halo covers lines behind the letters
    body: list[Markup] = []
    top = 20.0 if limit else 4.0
    y = top
    for group in groups:
        if group.heading:
            words.append(text(0, y + 12, group.heading, "start", "name"))
            y += 18
        for bar in group.bars:
            words.append(text(0, y + 12, bar.label, "start", "label"))
            words.append(text(WIDTH, y + 12, bar.text, "end", "value"))
            start = 0.0
            for value, style in bar.parts:
                width = max(value * unit, 0.8)
                body.append(
                    element("rect", x=start, y=y + 17, width=width, height=9, class_=f"bar {style}")
                )
                start += width
            y += 34
        y += 8 if group.heading else 0
    grid: list[Markup] = []
    for tick in marks_at:
        x = tick * divisor * unit
        grid.append(line(x, top, x, y, "grid"))
        anchor = "start" if tick == 0 else "middle"
        grid.append(text(x, y + 14, plain(tick), anchor, "tick"))
    grid.append(text(0, y + 32, axis, "start", "axis"))
    if limit:
        x = limit[0] * unit
        body.append(line(x, 14, x, y, "limit"))
        anchor = "start" if x < 60 else "middle"
        words.append(text(min(x, WIDTH - 60), 10, limit[1], anchor, "limit-label"))
    return picture(y + 40, title, *grid, *body, *words)


def curves(items: Sequence[Curve], title: str, axis: str, last: int) -> Markup:
    """KL divergence along tokens: one panel per artifact, all on the same scale.

    Args:
        items: one curve per artifact.
        title: for screen readers.
        axis: label of the horizontal axis.
        last: its number at the right end.
    """
    left, right, height, gap = 40.0, WIDTH - 8, 62.0, 34.0
    finite = [value for item in items for value in item.mean if value is not None]
    y_ticks = ticks(0.0, max(finite, default=0.0) or 1.0, 2)
    marks: list[Markup] = []
    top = 22.0
    for item in items:
        bottom = top + height
        for tick in y_ticks:
            y = bottom - tick / y_ticks[-1] * height
            marks.append(line(left, y, right, y, "grid"))
            marks.append(text(left - 6, y + 4, plain(tick), "end", "tick"))
        marks.append(text(left, top - 7, item.label, "start", f"name {item.style}"))
        step = (right - left) / max(len(item.mean), 1)
        for run in runs(item.mean):
            path = [
                f"{left + (place + 0.5) * step:.1f},{bottom - value / y_ticks[-1] * height:.1f}"
                for place, value in run
            ]
            begin, stop = path[0].split(",")[0], path[-1].split(",")[0]
            area = " ".join([f"{begin},{bottom:.1f}", *path, f"{stop},{bottom:.1f}"])
            marks.append(element("polygon", points=area, class_=f"area {item.style}"))
            marks.append(element("polyline", points=" ".join(path), class_=f"curve {item.style}"))
        top = bottom + gap
    end = top - gap
    marks.append(text(left, end + 16, "0", "start", "tick"))
    marks.append(text(right, end + 16, f"{last:,}", "end", "tick"))
    marks.append(text((left + right) / 2, end + 16, axis, "middle", "axis"))
    marks.append(text(right, 15, "nats per token", "end", "axis"))
    return picture(end + 26, title, *marks)


def runs(values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """Runs of finite values: a curve must not connect across tokens whose logits were NaN."""
    found: list[list[tuple[int, float]]] = [[]]
    for place, value in enumerate(values):
        if value is not None:
            found[-1].append((place, value))
        elif found[-1]:
            found.append([])
    return [run for run in found if run]


def depth(tensors: Sequence[TensorReport], title: str) -> Markup:
    """A heat map of the bits of each matrix: a row per role, a column per block.

    Args:
        tensors: of one artifact; one outside the blocks has a whole row.
        title: for screen readers.
    """
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    rows = [role for role in ROLES if any(tensor.role == role for tensor in matrices)]
    cells = [tensor for tensor in matrices if tensor.role in rows]
    columns = max((cell.block + 1 for cell in cells if cell.block is not None), default=0)
    left = 8 + max((len(row) for row in rows), default=0) * CHARACTER * 0.9
    side = (WIDTH - left) / max(columns, 1)
    height, gap = 16.0, 2.0 if side > 8 else 0.5
    marks: list[Markup] = []
    for place, row in enumerate(rows):
        marks.append(text(left - 8, place * height + 12, row, "end", "tick"))
    for cell in cells:
        width = side if cell.block is not None else WIDTH - left
        bits = f"{cell.bits_per_weight:.3g} bits"
        marks.append(
            element(
                "rect",
                element("title", f"{cell.name}: {cell.grid}, {bits}"),
                x=left + (cell.block or 0) * side,
                y=rows.index(cell.role) * height + 1,
                width=max(width - gap, 0.5),
                height=height - 2,
                class_="cell",
                fill_opacity=f"{tone(cell.bits_per_weight):.2f}",
            )
        )
    bottom = len(rows) * height
    every = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 100) if columns / step <= 9)
    for column in range(0, columns, every):
        x = left + (column + 0.5) * side - gap / 2
        marks.append(text(x, bottom + 14, str(column), "middle", "tick"))
    marks.append(text(left, bottom + 30, "block", "start", "axis"))
    return picture(bottom + 36, title, *marks)


def tone(bits: float) -> float:
    """Strength of a cell: 0.15 up to two bits, evenly more to 1 at nine bits and above."""
    return 0.15 + 0.85 * min(max((bits - 2.0) / 7.0, 0.0), 1.0)
