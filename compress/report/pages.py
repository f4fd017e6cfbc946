"""Renders a report's pages from ``report.json`` alone.

- ``report.html``, without scripts, fonts or network, from ``report.html.j2`` with autoescape on.
  Its charts come from ``compress.report.charts``; a chart without figures is left out. A figure
  that was not measured is shown as a dash.
- ``README.md``: a Hugging Face model card, from ``card.md.j2``. Metadata keys:
  https://huggingface.co/docs/hub/model-cards. Strings from a checkpoint are escaped for their
  context: YAML, a table cell, a sentence, a fenced block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml
from markupsafe import Markup

from compress.console import format_bytes
from compress.errors import visible
from compress.formats import get_format, hub_path
from compress.report import charts, words
from compress.report.report import ArtifactReport, Report
from compress.report.words import amount, fenced, gate_failure, label, sentence, short_size

if TYPE_CHECKING:
    from jinja2 import Template

HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
STYLES = 6  # c0 … c5 in the style sheet
VERDICTS = {"passed": "Passed", "failed": "Failed", "not verified": "Not verified"}

Styles = Mapping[str, str]
"""A class of the style sheet for each artifact, by its path."""


def render(report: Report) -> str:
    """Render ``report.html``.

    Args:
        report: of a build or a verification.
    """
    folder = files("compress.report")
    template = page_template(folder.joinpath("report.html.j2").read_text("utf-8"))
    artifacts = report.artifacts
    page = template.render(
        report=report,
        artifacts=artifacts,
        styles={found.path: f"c{place % STYLES}" for place, found in enumerate(artifacts)},
        measured=[artifact for artifact in artifacts if artifact.kl_divergence],
        verdict=VERDICTS[report.verdict],
        failures=[
            f"{label(artifact)}: {gate_failure(gate)}"
            for artifact in artifacts
            for gate in artifact.gates
            if not gate.passed
        ],
        gates=sum(len(artifact.gates) for artifact in artifacts),
        harness_headers=words.HARNESS_HEADERS,
        harness_rows=words.harness_rows(report, parts=True),
        style=Markup(folder.joinpath("report.css").read_text("utf-8")),
        draw_bytes=draw_bytes,
        draw_curves=draw_curves,
        draw_depth=charts.depth,
        draw_devices=draw_devices,
        draw_memory=draw_memory,
        draw_scatter=draw_scatter,
        draw_speed=draw_speed,
        grids=grids,
        quarters=quarters,
        worst=lambda points: max((point for point in points if point is not None), default=None),
    )
    return visible(page)


def page_template(text: str, **filters: Callable[..., str]) -> Template:
    """A template of packlight's: everything is escaped, and undefined names are errors.

    Args:
        text: Jinja2.
        filters: in addition to those that format numbers.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "amount": amount,
        "figure": figure,
        "label": label,
        "percent": percent,
        "size": size,
        **filters,
    }
    return environment.from_string(text)


def model_card(report: Report, repo: str = "") -> str:
    """Render the model card: Markdown with YAML metadata for the Hub, without unknown keys.

    Args:
        report: of a build.
        repo: id of the Hub repository that holds the build; else paths are those of its folder.
    """
    import jinja2

    model, artifacts = report.model, report.artifacts
    formats = list(dict.fromkeys(artifact.format for artifact in artifacts))
    head: dict[str, Any] = {}
    # A local folder's name replaces the unknown Hub id.
    if HUB_ID.fullmatch(model.source):
        head |= {"base_model": model.source, "base_model_relation": "quantized"}
    if model.license:
        head["license"] = " ".join(model.license.split())  # on one line: none may end the YAML
    if formats:
        head["library_name"] = formats[0]
    head |= {"pipeline_tag": "text-generation", "tags": [*formats, "quantized", "packlight"]}
    # No autoescape, which is for HTML: the filters escape for Markdown.
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "fenced": fenced,
        "figure": words.figure,
        "label": label,
        "sentence": sentence,
        "size": format_bytes,
    }
    text = files("compress.report").joinpath("card.md.j2").read_text("utf-8")
    gates = [(artifact, gate) for artifact in artifacts for gate in artifact.gates]
    card = environment.from_string(text).render(
        report=report,
        artifacts=artifacts,
        head=yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1000),
        gates=len(gates),
        failed=[f"{label(artifact)}: {gate.name}" for artifact, gate in gates if not gate.passed],
        get_format=get_format,
        repo=repo,
        place=hub_path if repo else str,
    )
    return visible(card)


# --- numbers, for a page -----------------------------------------------------------------------


def size(count: int | None) -> Markup:
    """Bytes in both units, with a line break allowed between: ``740.48 MB (706.17 MiB)``."""
    if count is None:
        return Markup("–")
    decimal, _, binary = format_bytes(count).partition(" (")
    both = '<span class="unit">{}</span> <span class="unit error">({}</span>'
    return Markup(both).format(decimal, binary)


def figure(value: float | None, error: float | None = None) -> Markup:
    """A figure with its standard error, to two digits of the error: ``0.0312 ± 0.0011``."""
    text, sign, se = words.figure(value, error).partition(" ± ")
    wrapped = Markup('{} <span class="error">± {}</span>')
    return wrapped.format(text, se) if sign else Markup("{}").format(text)


def percent(value: float | None, error: float | None = None) -> Markup:
    """A share as a percentage."""
    if value is None:
        return Markup("–")
    share = figure(value * 100, error * 100) if error else f"{value * 100:.1f}"
    return Markup('<span class="unit">{} %</span>').format(share)


def quarters(points: Sequence[float | None]) -> list[float | None]:
    """Means over the four quarters of a series; None where a quarter has no finite value."""
    means: list[float | None] = []
    for part in range(4):
        start, end = part * len(points) // 4, (part + 1) * len(points) // 4
        finite = [point for point in points[start:end] if point is not None]
        means.append(sum(finite) / len(finite) if finite else None)
    return means


# --- pictures ----------------------------------------------------------------------------------


def draw_scatter(report: Report, artifacts: Sequence[ArtifactReport], styles: Styles) -> Markup:
    """The chart of size and mean KL divergence."""
    points = [
        charts.Point(label(artifact), styles[artifact.path], artifact.bytes, kl.mean, kl.se)
        for artifact in artifacts
        if (kl := artifact.kl_divergence) and kl.mean is not None
    ]
    limits = [
        float(gate.limit.lstrip("<= "))
        for artifact in artifacts
        for gate in artifact.gates
        if gate.name == "kl_divergence" and gate.limit.startswith("<")
    ]
    title = "File size against mean KL divergence, one mark per artifact"
    limit, budget = min(limits, default=None), report.budget_bytes
    return charts.scatter(points, title, limit, budget)


def draw_bytes(report: Report, styles: Styles) -> Markup:
    """The chart of the bytes of each artifact and the checkpoint, with the budget."""
    artifacts, float_bytes = report.artifacts, report.baseline.bytes
    rows = [
        charts.Bar(
            label(artifact),
            short_size(artifact.bytes),
            [
                (artifact.weights_bytes, styles[artifact.path]),
                (max(artifact.bytes - artifact.weights_bytes, 0), "rest"),
            ],
        )
        for artifact in artifacts
    ]
    dtype = report.baseline.dtype
    rows.append(charts.Bar(f"float, {dtype}", short_size(float_bytes), [(float_bytes, "float")]))
    longest = max([float_bytes, *(artifact.bytes for artifact in artifacts)])
    divisor, unit = charts.unit_of(longest)
    budget = report.budget_bytes
    return charts.bars(
        [charts.Group("", rows)],
        "Bytes of each artifact",
        f"bytes on disk, {unit}",
        divisor=divisor,
        limit=(budget, "budget") if budget else None,
    )


def draw_curves(
    artifacts: Sequence[ArtifactReport], styles: Styles, key: str, axis: str, end: int
) -> Markup:
    """The chart of KL divergence along the text, or by position in the window."""
    items = [
        charts.Curve(label(artifact), styles[artifact.path], getattr(artifact, key).mean)
        for artifact in artifacts
    ]
    return charts.curves(items, f"KL divergence by {axis}", axis, end)


def draw_speed(
    report: Report, artifacts: Sequence[ArtifactReport], styles: Styles, phase: str
) -> Markup:
    """The chart of tokens per second of each artifact and, if measured, the float model."""
    key = f"{phase}_tokens_per_second"
    rows = [
        charts.Bar(
            label(artifact),
            amount(getattr(artifact, key)),
            [(getattr(artifact, key) or 0.0, styles[artifact.path])],
        )
        for artifact in artifacts
    ]
    if getattr(report.baseline, key) is not None:
        speed = getattr(report.baseline, key)
        rows.append(charts.Bar("float", amount(speed), [(speed, "float")]))
    group = charts.Group("", rows)
    return charts.bars([group], f"Tokens per second, {phase}", f"{phase}, tokens per second")


def draw_memory(artifacts: Sequence[ArtifactReport], styles: Styles) -> Markup:
    """The chart of weights, KV cache and process peak: three bars, because they overlap."""
    groups = []
    for artifact in artifacts:
        parts = [("weights", artifact.weights_bytes), ("KV cache", artifact.kv_cache_bytes)]
        if artifact.peak_memory_bytes is not None:
            parts.append(("peak of the process", artifact.peak_memory_bytes))
        rows = [
            charts.Bar(name, short_size(value), [(value, styles[artifact.path])])
            for name, value in parts
        ]
        groups.append(charts.Group(label(artifact), rows))
    longest = max(value for group in groups for bar in group.bars for value, _ in bar.parts)
    divisor, unit = charts.unit_of(longest)
    return charts.bars(groups, "Memory of each artifact", f"memory, {unit}", divisor=divisor)


def draw_devices(artifact: ArtifactReport, style: str) -> Markup:
    """The chart of what an artifact needs, and what apps may hold: a bar for each pair of limits,
    the dark part without the entitlement."""
    held = (artifact.activation_bytes or 0) + artifact.kv_cache_bytes
    weights = 0 if artifact.weights_outside else artifact.weights_bytes
    need, parts = weights + held, [(weights, style), (held, "rest")]
    rows = [charts.Bar("needed: weights; KV cache, activations", short_size(need), parts)]
    classes: dict[tuple[int, int], list[str]] = {}
    for device in artifact.devices:
        limits = device.app_limit_bytes, device.entitled_bytes
        classes.setdefault(limits, []).append(device.label.partition(" / ")[0])
    for (plain, entitled), names in sorted(classes.items()):
        text = f"{plain / 1e9:.1f} to {entitled / 1e9:.1f} GB"
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        bar = [(plain, "float"), (entitled - plain, "rest")]
        rows.append(charts.Bar(names[0] + others, text, bar))
    return charts.bars(
        [charts.Group("", rows)],
        f"Memory that {label(artifact)} needs, and that apps may hold",
        "memory of one app, GB",
        divisor=1e9,
        limit=(need, "needed"),
    )


def grids(artifact: ArtifactReport) -> list[dict[str, Any]]:
    """Number of tensors, bits and bytes of each grid in an artifact; most bytes first."""
    found: dict[str, dict[str, Any]] = {}
    for tensor in artifact.tensors:
        row = found.setdefault(
            tensor.grid, {"grid": tensor.grid, "tensors": 0, "bytes": 0, "weights": 0.0}
        )
        row["tensors"] += 1
        row["bytes"] += tensor.bytes
        row["weights"] += tensor.bytes * 8 / tensor.bits_per_weight
    for row in found.values():
        row["bits"] = row["bytes"] * 8 / row["weights"]
        row["tone"] = f"{charts.tone(row['bits']):.2f}"
    return sorted(found.values(), key=lambda row: -row["bytes"])
