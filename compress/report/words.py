"""Formats a report as text: figures, labels, gates and tables, for console, pages, card and CI."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.console import Console, format_bytes, print_error, short_bytes
from compress.errors import PacklightError, visible
from compress.formats import get_format
from compress.plan.weights import FALLEN_BACK

if TYPE_CHECKING:
    from compress.report.report import (
        ArtifactReport,
        GateReport,
        HarnessFigure,
        Report,
        TokenizerDifference,
    )

HEADERS = ("format", "type", "size", "bpw", "perplexity", "KL", "top-1", "tok/s", "memory")
TASK_HEADERS = ("task", "format", "items", "accuracy", "float", "difference", "same choice")

# Logits closer than this many of their standard deviations are a tie that depends on the order of
# summation, not a wrong cache. onnxruntime's kernels for one token and for many differ by 0.02
# standard deviations (root mean square) after 32 blocks of Phi-3-mini's shape.
TIE = 0.1
REFUSED_HINT = "its files are there; `packlight verify` runs them"
CACHE_CHANGES_TEXT = "greedy tokens differ with and without the KV cache"


# --- numbers -----------------------------------------------------------------------------------


def amount(value: float | None) -> str:
    """A number with three or four significant digits, thousands separated."""
    if value is None:
        return "–"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    # With trailing zeros, so that 0.354 and 0.630 align.
    return f"{value:#.3g}" if abs(value) < 1 else f"{value:#.4g}"


def short_size(count: float) -> str:
    """Bytes in the decimal unit: ``740.48 MB``."""
    return format_bytes(count).partition(" (")[0]


def figure(
    value: float | None, error: float | None = None, unit: str = "", times: float = 1.0
) -> str:
    """A figure with its standard error, to two digits of the error: ``0.0312 ± 0.0011``."""
    if value is None:
        return "–"
    if not error:
        return f"{value * times:.4g}{unit}"
    places = decimals(error * times)
    return f"{value * times:.{places}f} ± {error * times:.{places}f}{unit}"


def decimals(error: float) -> int:
    """Decimal places that show a standard error, and its figure, to two digits: 0.0031 → 4."""
    return max(0, 1 - int(f"{error:e}".partition("e")[2]))


def percent(value: float | None, error: float | None = None, sign: str = "") -> str:
    """A share as a percentage with one decimal, for tables: ``87.1 ± 0.4 %``."""
    if value is None:
        return "-"
    return f"{value * 100:{sign}.1f}" + (f" ± {error * 100:.1f} %" if error else " %")


# --- artifacts and gates -----------------------------------------------------------------------


def label(artifact: ArtifactReport) -> str:
    """An artifact's name on pages: ``GGUF Q4_K_M``."""
    return f"{get_format(artifact.format).title} {artifact.type}"


def gate_value(gate: GateReport) -> str:
    """The measured value of a gate, in its unit."""
    if gate.value is None:
        return "nothing"
    return format_bytes(gate.value) if "bytes" in gate.name else f"{gate.value:.4g}"


def gate_failure(gate: GateReport) -> str:
    """The measured value of a gate and its limit."""
    return f"{gate.name} is {gate_value(gate)}, the gate is {gate.limit}"


def tokenizes_otherwise(difference: TokenizerDifference) -> str:
    """The first text that the artifact tokenizes differently, and the first different id."""
    ours, theirs = difference.found, difference.expected
    same = [a == b for a, b in zip(ours, theirs, strict=False)]
    start = max(0, (same.index(False) if False in same else len(same)) - 2)

    def shown(ids: Sequence[int]) -> str:
        some = ", ".join(map(str, ids[start : start + 8]))
        return f"[{'…, ' if start else ''}{some}{', …' if len(ids) > start + 8 else ''}]"

    text = difference.text if len(difference.text) <= 60 else f"{difference.text[:57]}..."
    around = " with BOS and EOS" if difference.add_special else ""
    return (
        f"{difference.differing} of {difference.texts} texts have other token ids, first "
        f"{text!r}{around}: {shown(ours)}, and {shown(theirs)} by Hugging Face"
    )


def refusal(artifact: ArtifactReport) -> str:
    """The failure of an artifact that could not be run."""
    return f"{label(artifact)} could not be run: {artifact.failure}"


def failures(artifact: ArtifactReport) -> list[str]:
    """A line for each failed gate of an artifact, and for a KV cache that changes its text."""
    lines = []
    for gate in artifact.gates:
        difference = artifact.tokenizer_difference if gate.name == "tokenizer_agreement" else None
        why = f": {tokenizes_otherwise(difference)}" if difference else ""
        lines += [] if gate.passed else [gate_failure(gate) + why]
    sample = artifact.generation
    if artifact.generation_consistent is False and sample is not None:
        # Greedy tokens differ with and without the cache: more than a tie is a wrong cache.
        lines += [CACHE_CHANGES_TEXT] * ((sample.gap or 0.0) > TIE * (sample.spread or 0.0))
    return lines


def no_verdict(report: Report) -> str:
    """Why no gate was evaluated, or ``""`` where one was."""
    if report.verdict == "not verified":
        return "not verified"
    # This gate applies even if it is not set.
    named = {gate.name for artifact in report.artifacts for gate in artifact.gates}
    if report.passed and named <= {"tokenizer_agreement"}:
        return "measured; no gate was set"
    return ""


def judged(report: Report) -> str:
    """What a verdict is on: the recipe's name; of ``packlight verify``, which has none, the number
    of gates.
    """
    if report.tool.command:
        return str(report.recipe["name"])
    gates = sum(len(artifact.gates) for artifact in report.artifacts)
    return f"{gates} gate{'s' * (gates != 1)} of {report.model.name}"


# --- tables ------------------------------------------------------------------------------------


def table_row(artifact: ArtifactReport) -> list[str]:
    """One row of the table under ``HEADERS``; a dash for a figure that was not measured.

    Figures have three or four digits, so that a row fits 80 columns.
    """
    ratio, kl = artifact.perplexity_ratio, artifact.kl_divergence
    speed, peak = artifact.decode_tokens_per_second, artifact.peak_memory_bytes
    change = "" if ratio is None else f" {(ratio - 1) * 100:+.1f}%"
    return [
        artifact.format,
        artifact.type,
        short_bytes(artifact.bytes),
        f"{artifact.bits_per_weight:.2f}",
        "-" if artifact.perplexity is None else f"{amount(artifact.perplexity)}{change}",
        "-" if kl is None or kl.mean is None else f"{kl.mean:.4f}",
        percent(artifact.top1_agreement).replace(" ", ""),
        "-" if speed is None else f"{speed:.{1 if speed < 100 else 0}f}",
        "-" if peak is None else short_bytes(peak),
    ]


def task_rows(report: Report) -> list[list[str]]:
    """Rows of the table of tasks under ``TASK_HEADERS``; ± is one standard error."""
    return [
        [
            task.name,
            artifact.format,
            str(task.items),
            percent(task.accuracy, task.accuracy_se),
            percent(task.baseline_accuracy, task.baseline_accuracy_se),
            percent(task.difference, task.difference_se, "+"),
            percent(task.agreement, task.agreement_se),
        ]
        for artifact in report.artifacts
        for task in artifact.tasks
    ]


HARNESS_HEADERS = ("task", "metric", "format", "items", "value", "float", "difference")


def harness_rows(report: Report, *, parts: bool = False) -> list[list[str]]:
    """Rows of the table of the harness's tasks; ± is one standard error.

    Args:
        parts: also the tasks that a group consists of.
    """
    if report.harness is None:
        return []
    rows: list[tuple[str, HarnessFigure]] = [("float", each) for each in report.harness.figures]
    rows = [] if report.artifacts else rows
    rows += [(found.format, each) for found in report.artifacts for each in found.harness]
    return [
        [
            each.task,
            each.metric if each.filter == "none" else f"{each.metric}, {each.filter}",
            format,
            str(each.items),
            with_error(each.value, each.value_se),
            with_error(each.baseline, each.baseline_se),
            with_error(each.difference, each.difference_se, "+"),
        ]
        for format, each in rows
        if parts or each.group
    ]


def with_error(value: float | None, error: float | None, sign: str = "") -> str:
    """``0.688 ± 0.004``; a dash for a figure that was not measured."""
    if value is None:
        return "-"
    return f"{value:{sign}.4g}" + ("" if error is None else f" ± {error:.2g}")


def finish(report: Report, output: Path | None, console: Console) -> int:
    """Print the table, failed gates, the verdict and the paths; returns the exit code.

    Returns:
        2 where an artifact could not be run, 1 where a gate failed, else 0.
    """
    console.end()
    if console.mode == "json":
        console.result(report.to_dict())
    if console.mode == "human":
        if report.harness is None:
            console.table(HEADERS, [table_row(artifact) for artifact in report.artifacts])
        else:
            console.table(HARNESS_HEADERS, harness_rows(report, parts=console.verbose))
        if any(artifact.tasks for artifact in report.artifacts):
            console.table(TASK_HEADERS, task_rows(report))
    for artifact in report.artifacts:
        for note in artifact.notes[bool(artifact.failure) :]:  # the first one is the failure
            if console.verbose or FALLEN_BACK not in note:
                console.data(f"note ({artifact.format}): {note}")
        if artifact.failure:
            print_error(PacklightError(refusal(artifact), REFUSED_HINT))
        for line in failures(artifact):
            console.warning(f"{artifact.format}: {line}")
        if output is not None:
            console.path(output / artifact.path)
    for note in report.notes:
        if note not in console.warned:
            console.data(f"note: {note}")
    if why := no_verdict(report):
        console.say(why)
    else:
        console.verdict(report.passed, judged(report))
    if report.verdict == "failed" and report.harness is None:
        from compress.report.advice import what_to_try

        for line in what_to_try(report):
            console.hint(line)
    if output is not None:
        console.say(f"report: {output / 'report.html'}")
    if any(artifact.failure for artifact in report.artifacts):
        return 2
    return 1 if report.verdict == "failed" else 0


# --- Markdown with strings of a checkpoint, escaped --------------------------------------------


def sentence(text: str) -> str:
    """Text escaped for Markdown, on one line and within one table cell."""
    line = " ".join(visible(text).split())
    return re.sub(r"([\\`*{}\[\]<>#|~&$!])|(?<!\w)_|_(?!\w)", lambda m: "\\" + m.group(0), line)


def fenced(code: str, language: str) -> str:
    """A code block with a fence longer than any run of backticks inside."""
    code = visible(code)
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def pipe_table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table of Markdown cells; columns after the first ``left`` are right-aligned."""
    rule = ["---"] * left + ["---:"] * (len(headers) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (headers, rule, *rows))
