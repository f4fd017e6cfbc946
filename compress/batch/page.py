"""Renders ``batch.html`` from ``batch.json`` alone, without scripts, fonts or network.

The style is that of a build's report (``report.css``), which it links to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from compress.batch.pictures import Dot, Row, cloud, rows
from compress.errors import visible
from compress.formats import FORMATS, get_format
from compress.progress import clock_time
from compress.report import charts
from compress.report.pages import STYLES, page_template
from compress.report.report import GateReport
from compress.report.words import gate_failure, short_size

__all__ = ["render"]

Json = Mapping[str, Any]

WORDS = {
    "passed": ("✓ passed", "good"),
    "failed": ("✕ gate failed", "bad"),
    "written": ("○ not verified", ""),
    "error": ("✕ could not run", "bad"),
    "killed": ("✕ killed", "bad"),
    "interrupted": ("○ interrupted", ""),
    "not run": ("○ not run", ""),
}
VERDICTS = {0: ("passed", "✓ All passed"), 1: ("failed", "✕ A gate failed"),
            2: ("failed", "✕ Not every job could run")}  # fmt: skip


def render(document: Json) -> str:
    """Render the page.

    Args:
        document: ``batch.json``.
    """
    text = (files(__package__) / "batch.html.j2").read_text("utf-8")
    template = page_template(text, clock=clock_time, short=short_size)
    jobs = document["jobs"]
    style, verdict = VERDICTS[document["exit_code"]]
    made = template.render(
        batch=document,
        jobs=jobs,
        done=[job for job in jobs if job["artifacts"]],
        lost=[job for job in jobs if job["status"] in ("error", "killed", "interrupted")],
        failures=[line for job in jobs for line in failed_gates(job)],
        artifacts=sum(len(job["artifacts"]) for job in jobs),
        models=len({job["model"] for job in jobs}),
        verdict=verdict,
        verdict_style=style,
        counts=", ".join(
            f"{count} {WORDS[status][0][2:]}" for status, count in document["counts"].items()
        ),
        words=WORDS,
        speed_notes=[row.speed_note for row in FORMATS.values() if row.speed_note],
        formats={name: row.title for name, row in FORMATS.items()},
        styles={name: style_of(name) for name in FORMATS},
        style=Markup((files("compress.report") / "report.css").read_text("utf-8")),
        pictures=pictures(jobs),
    )
    return visible(made)


def style_of(name: str) -> str:
    """The style-sheet class with the colour of a format's artifacts."""
    return f"c{list(FORMATS).index(name) % STYLES}"


def failed_gates(job: Json) -> list[str]:
    """A sentence for each failed gate of a job's artifacts."""
    return [
        f"{job['name']}, {get_format(a['format']).title}: {gate_failure(GateReport(**gate))}"
        for a in job["artifacts"]
        for gate in a["gates"]
        if not gate["passed"]
    ]


def pictures(jobs: Sequence[Json]) -> dict[str, Markup]:
    """The charts that have figures, by name."""
    drawn: dict[str, Markup] = {}
    known: dict[tuple[str, str, str], list[Dot]] = {}
    for job in jobs:
        for a in job["artifacts"]:
            if a["kl_divergence"] is not None:
                dot = Dot(style_of(a["format"]), a["bytes"], title_of(job, a), a["kl_divergence"])
                known.setdefault((job["model"], job["recipe"], a["format"]), []).append(dot)
    # With budgets there are several artifacts of one model, recipe and format.
    series = [sorted(run, key=lambda dot: dot.x) for run in known.values() if len(run) > 1]
    if dots := [dot for run in known.values() for dot in run]:
        divisor, unit = charts.unit_of(max(dot.x for dot in dots))
        drawn["cloud"] = cloud(
            dots, series, "File size against mean KL divergence, one mark per artifact",
            f"file size, {unit}", "mean KL divergence, nats per token", divisor,
        )  # fmt: skip
    for name, key, axis in (
        ("quality", "kl_divergence", "mean KL divergence, nats per token"),
        ("memory", "peak_memory_bytes", "peak memory of the process"),
        ("speed", "decode_tokens_per_second", "decode, tokens per second"),
    ):
        items = [Row(job["name"], figures_of(job, key)) for job in jobs]
        items = [item for item in items if item.dots]
        if items:
            most = max(dot.x for item in items for dot in item.dots)
            divisor, unit = charts.unit_of(most) if "bytes" in key else (1.0, "")
            drawn[name] = rows(items, axis, f"{axis}, {unit}" if unit else axis, divisor)
    return drawn


def figures_of(job: Json, key: str) -> list[Dot]:
    """One figure of each artifact of a job, where it was measured."""
    return [
        Dot(style_of(a["format"]), a[key], title_of(job, a))
        for a in job["artifacts"]
        if a[key] is not None
    ]


def title_of(job: Json, artifact: Json) -> str:
    """The label of an artifact's mark."""
    words = f"{job['name']}, {get_format(artifact['format']).title} {artifact['type']}: "
    divergence = artifact["kl_divergence"]
    quality = f", KL {divergence:.4g}" if divergence is not None else ""
    return words + short_size(artifact["bytes"]) + quality
