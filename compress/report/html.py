"""``report.html``: one page from ``report.json`` alone, without scripts, fonts or network.

The template is ``report.html.j2`` with autoescape on; its pictures come from
``compress.report.charts``. What was not measured is shown as a dash.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from compress.console import format_bytes
from compress.report import charts
from compress.report.report import artifact_label, decimals

if TYPE_CHECKING:
    from jinja2 import Template

STYLES = 6  # c0 … c5 in the style sheet
ROLES = [  # rows of the depth picture, in order of execution
    "embed_tokens",
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
    "lm_head",
]
VERDICTS = {"passed": "Passed", "failed": "Failed", "not verified": "Not verified"}

Json = Mapping[str, Any]


def render(report: Json) -> str:
    """The page, UTF-8 text.

    Args:
        report: a document that obeys ``report.schema.json``.
    """
    folder = files("compress.report")
    template = page_template(folder.joinpath("report.html.j2").read_text("utf-8"))
    artifacts = report["artifacts"]
    for_template = [
        {**artifact, "label": artifact_label(artifact), "style": f"c{place % STYLES}"}
        for place, artifact in enumerate(artifacts)
    ]
    return template.render(
        report=report,
        artifacts=for_template,
        measured=[artifact for artifact in for_template if artifact["kl_divergence"]],
        verdict=VERDICTS[report["verdict"]],
        failures=failures(for_template),
        gates=sum(len(artifact["gates"]) for artifact in artifacts),
        style=Markup(folder.joinpath("report.css").read_text("utf-8")),
        pictures=pictures(report, for_template),
        grids={artifact["path"]: grids(artifact) for artifact in for_template},
        gate_value=gate_value,
        quarters=quarters,
        worst=lambda points: max((point for point in points if point is not None), default=None),
    )


def page_template(text: str, **filters: Callable[..., str]) -> Template:
    """A template of ours: everything is escaped, and nothing may be undefined.

    Args:
        text: Jinja2.
        filters: beside those that put numbers in words.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "amount": amount,
        "figure": figure,
        "percent": percent,
        "size": size,
        **filters,
    }
    return environment.from_string(text)


def failures(artifacts: Sequence[Json]) -> list[str]:
    """One sentence per gate that failed."""
    return [
        f"{artifact['label']}: {gate['name']} is {gate_value(gate)}, the gate is {gate['limit']}"
        for artifact in artifacts
        for gate in artifact["gates"]
        if not gate["passed"]
    ]


def gate_value(gate: Json) -> str:
    """What was measured, in the words of its unit."""
    if gate["value"] is None:
        return "not measured"
    return format_bytes(gate["value"]) if "bytes" in gate["name"] else amount(gate["value"])


# --- numbers in words --------------------------------------------------------------------------


def amount(value: float | None) -> str:
    """Three or four significant digits, thousands separated."""
    if value is None:
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    # With its zeros, so that 0.354 and 0.630 stand under each other.
    return f"{value:#.3g}" if abs(value) < 1 else f"{value:#.4g}"


def short_size(count: float) -> str:
    """Bytes in the decimal unit, for pictures; the table beside them has both."""
    return format_bytes(count).partition(" (")[0]


def size(count: int | None) -> Markup:
    """Bytes in both units, which may stand on two lines: ``740.48 MB (706.17 MiB)``."""
    if count is None:
        return Markup("–")
    decimal, space, binary = format_bytes(count).partition(" (")
    both = '<span class="unit">{}</span> <span class="unit error">({}</span>'
    return Markup(both).format(decimal, binary) if space else Markup("{}").format(decimal)


def figure(value: float | None, error: float | None = None) -> Markup:
    """A figure with its standard error, to two digits of the error: ``0.0312 ± 0.0011``."""
    if value is None:
        return Markup("–")
    if error is None or error == 0:
        return Markup("{}").format(f"{value:.4g}")
    places = decimals(error)
    return Markup('{} <span class="error">± {}</span>').format(
        f"{value:.{places}f}", f"{error:.{places}f}"
    )


def percent(value: float | None, error: float | None = None) -> Markup:
    """A share as a percentage."""
    if value is None:
        return Markup("–")
    share = figure(value * 100, error * 100) if error else f"{value * 100:.1f}"
    return Markup('<span class="unit">{} %</span>').format(share)


def quarters(points: Sequence[float | None]) -> list[float | None]:
    """Means over the four quarters of a series; None where a quarter has nothing finite."""
    means: list[float | None] = []
    for part in range(4):
        start, end = part * len(points) // 4, (part + 1) * len(points) // 4
        finite = [point for point in points[start:end] if point is not None]
        means.append(sum(finite) / len(finite) if finite else None)
    return means


# --- pictures ----------------------------------------------------------------------------------


def pictures(report: Json, artifacts: Sequence[Json]) -> dict[str, Markup]:
    """The pictures that the report has figures for, by name."""
    measured = [artifact for artifact in artifacts if artifact["kl_divergence"]]
    drawn = {"bytes": draw_bytes(report, artifacts)}
    for artifact in artifacts:
        drawn[f"depth {artifact['path']}"] = draw_depth(artifact)
    known = [artifact for artifact in measured if artifact["kl_divergence"]["mean"] is not None]
    if known:
        drawn["scatter"] = draw_scatter(report, known)
    if measured:
        tokens, windows = report["baseline"]["tokens"], report["baseline"]["windows"]
        drawn["along"] = draw_curves(measured, "kl_along_text", "scored tokens", tokens)
        drawn["position"] = draw_curves(
            measured, "kl_by_position", "place in the window", -(-tokens // windows)
        )
        for phase in ("prefill", "decode"):
            drawn[phase] = draw_speed(report, measured, phase)
        drawn["memory"] = draw_memory(measured)
    return drawn


def draw_scatter(report: Json, artifacts: Sequence[Json]) -> Markup:
    """Size against mean KL divergence."""
    points = [
        charts.Point(
            artifact["label"],
            artifact["style"],
            artifact["bytes"],
            artifact["kl_divergence"]["mean"],
            artifact["kl_divergence"]["se"],
        )
        for artifact in artifacts
    ]
    limits = [
        float(gate["limit"].lstrip("<= "))
        for artifact in artifacts
        for gate in artifact["gates"]
        if gate["name"] == "kl_divergence" and gate["limit"].startswith("<")
    ]
    title = "File size against mean KL divergence, one mark per artifact"
    limit, budget = min(limits, default=None), report["budget_bytes"]
    return charts.scatter(points, title, limit, budget, trails(report, artifacts))


def trails(report: Json, artifacts: Sequence[Json]) -> list[charts.Trail]:
    """What a sweep expects of each format's sizes, in the colours of its artifacts."""
    styles = {artifact["format"]: artifact["style"] for artifact in artifacts}
    rows = report.get("curve", [])
    return [
        charts.Trail(
            styles[name],
            [(r["bytes"], r["expected_kl_divergence"]) for r in rows if r["format"] == name],
        )
        for name in dict.fromkeys(row["format"] for row in rows)
        if name in styles
    ]


def draw_bytes(report: Json, artifacts: Sequence[Json]) -> Markup:
    """Bytes of each artifact and of the checkpoint, against the budget."""
    float_bytes = report["baseline"]["bytes"]
    rows = [
        charts.Bar(
            artifact["label"],
            short_size(artifact["bytes"]),
            [
                (artifact["weights_bytes"], artifact["style"]),
                (max(artifact["bytes"] - artifact["weights_bytes"], 0), "rest"),
            ],
        )
        for artifact in artifacts
    ]
    dtype = report["baseline"]["dtype"]
    rows.append(charts.Bar(f"float, {dtype}", short_size(float_bytes), [(float_bytes, "float")]))
    longest = max([float_bytes, *(artifact["bytes"] for artifact in artifacts)])
    divisor, unit = charts.unit_of(longest)
    budget = report["budget_bytes"]
    return charts.bars(
        [charts.Group("", rows)],
        "Bytes of each artifact",
        f"bytes on disk, {unit}",
        divisor=divisor,
        limit=(budget, "budget") if budget else None,
    )


def draw_curves(artifacts: Sequence[Json], key: str, axis: str, end: int) -> Markup:
    """KL divergence along the text, or by place in the window."""
    items = [
        charts.Curve(artifact["label"], artifact["style"], artifact[key]["mean"])
        for artifact in artifacts
    ]
    return charts.curves(items, f"KL divergence by {axis}", axis, end)


def draw_speed(report: Json, artifacts: Sequence[Json], phase: str) -> Markup:
    """Tokens per second of each artifact, and of the float model where it was measured."""
    key = f"{phase}_tokens_per_second"
    rows = [
        charts.Bar(
            artifact["label"],
            amount(artifact[key]),
            [(artifact[key] or 0.0, artifact["style"])],
        )
        for artifact in artifacts
    ]
    if report["baseline"][key] is not None:
        speed = report["baseline"][key]
        rows.append(charts.Bar("float", amount(speed), [(speed, "float")]))
    group = charts.Group("", rows)
    return charts.bars([group], f"Tokens per second, {phase}", f"{phase}, tokens per second")


def draw_memory(artifacts: Sequence[Json]) -> Markup:
    """Weights, KV cache and peak of the process: three bars, never one."""
    groups = []
    for artifact in artifacts:
        parts = [("weights", artifact["weights_bytes"]), ("KV cache", artifact["kv_cache_bytes"])]
        if artifact["peak_memory_bytes"] is not None:
            parts.append(("peak of the process", artifact["peak_memory_bytes"]))
        rows = [
            charts.Bar(name, short_size(value), [(value, artifact["style"])])
            for name, value in parts
        ]
        groups.append(charts.Group(artifact["label"], rows))
    longest = max(value for group in groups for bar in group.bars for value, _ in bar.parts)
    divisor, unit = charts.unit_of(longest)
    return charts.bars(groups, "Memory of each artifact", f"memory, {unit}", divisor=divisor)


def draw_depth(artifact: Json) -> Markup:
    """Bits of each weight matrix along the depth."""
    weights = [tensor for tensor in artifact["tensors"] if len(tensor["shape"]) > 1]
    rows = [role for role in ROLES if any(tensor["role"] == role for tensor in weights)]
    cells = [
        charts.Cell(
            tensor["role"],
            tensor["block"],
            tensor["bits_per_weight"],
            f"{tensor['name']}: {tensor['grid']}, {tensor['bits_per_weight']:.3g} bits",
        )
        for tensor in weights
        if tensor["role"] in rows
    ]
    blocks = max((cell.column + 1 for cell in cells if cell.column is not None), default=0)
    return charts.depth(cells, rows, blocks, f"Bits per weight by block, {artifact['label']}")


def grids(artifact: Json) -> list[dict[str, Any]]:
    """Per grid of an artifact: how many tensors, their bits and bytes; most bytes first."""
    found: dict[str, dict[str, Any]] = {}
    for tensor in artifact["tensors"]:
        row = found.setdefault(
            tensor["grid"], {"grid": tensor["grid"], "tensors": 0, "bytes": 0, "weights": 0.0}
        )
        row["tensors"] += 1
        row["bytes"] += tensor["bytes"]
        row["weights"] += tensor["bytes"] * 8 / tensor["bits_per_weight"]
    for row in found.values():
        row["bits"] = row["bytes"] * 8 / row["weights"]
        row["tone"] = f"{charts.tone(row['bits']):.2f}"
    return sorted(found.values(), key=lambda row: -row["bytes"])
