"""What a build or a verification tells at its end: the table, failed gates, the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.console import Console, format_bytes, print_error
from compress.errors import PacklightError
from compress.report.markdown import pipe_table, sentence
from compress.report.report import TASK_HEADERS, artifact_label, task_rows

# Logits closer than this many of their standard deviations are a tie that the order of summation
# decides, not a wrong cache. onnxruntime's kernels for one token and for many differ by 0.02 of
# them (root mean square) after 32 blocks of Phi-3-mini's shape.
TIE = 0.1

HEADERS = ("format", "type", "size", "bpw", "perplexity", "KL", "top-1", "tokens/s", "peak memory")
REFUSED_HINT = "its files are kept; `packlight verify` runs them"
CACHE_CHANGES_TEXT = "greedy tokens differ with and without the KV cache"


def finish(report: Mapping[str, Any], output: Path | None, console: Console) -> int:
    """The table, the verdict and where things are; the exit code.

    Returns:
        2 where an artifact could not be run, 1 where a gate failed, else 0.
    """
    console.end()
    console.result(report)
    console.table(HEADERS, [table_row(artifact) for artifact in report["artifacts"]])
    if tasks := task_rows(report):
        console.table(TASK_HEADERS, tasks)
    for artifact in report["artifacts"]:
        if line := refusal(artifact):
            print_error(PacklightError(line, REFUSED_HINT))
        for gate in artifact["gates"]:
            if not gate["passed"]:
                console.warning(f"{artifact['format']}: {gate_failure(gate)}")
        if cache_changes_text(artifact):
            console.warning(f"{artifact['format']}: {CACHE_CHANGES_TEXT}")
        if output is not None:
            console.path(output / artifact["path"])
    if talk := no_verdict(report):
        console.say(talk)
    else:
        console.verdict(report["verdict"] == "passed", f"{report['recipe']['name']}")
    if output is not None:
        console.say(f"report: {output / 'report.html'}")
    if any(artifact["failure"] for artifact in report["artifacts"]):
        return 2
    return 1 if report["verdict"] == "failed" else 0


def markdown_summary(report: Mapping[str, Any]) -> str:
    """The same as Markdown, for a CI job's page: verdict, table, what failed."""
    name = f"{sentence(report['model']['name'])}, recipe {sentence(report['recipe']['name'])}"
    passed = "✅ **passed**" if report["verdict"] == "passed" else "❌ **failed**"
    parts = [f"### packlight: {name}", no_verdict(report) or passed]
    rows = [[sentence(cell) for cell in table_row(found)] for found in report["artifacts"]]
    parts.append(pipe_table(HEADERS, rows, left=2))
    if tasks := task_rows(report):
        rows = [[sentence(cell) for cell in row] for row in tasks]
        parts.append(pipe_table(TASK_HEADERS, rows, left=2))
    lines = []
    for artifact in report["artifacts"]:
        label = artifact_label(artifact)
        told = [f"could not be run: {artifact['failure']}"] if artifact["failure"] else []
        told += [gate_failure(gate) for gate in artifact["gates"] if not gate["passed"]]
        told += [CACHE_CHANGES_TEXT] if cache_changes_text(artifact) else []
        lines += [f"- {sentence(f'{label}: {line}')}" for line in told]
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])]) + "\n"


def no_verdict(report: Mapping[str, Any]) -> str:
    """Why nothing was judged, or ``""`` where something was."""
    if report["verdict"] == "not verified":
        return "not verified"
    if report["verdict"] == "passed" and not any(a["gates"] for a in report["artifacts"]):
        return "measured; no gate was set"
    return ""


def refusal(artifact: Mapping[str, Any]) -> str:
    """What became of an artifact that its runtime refused; ``""`` of any other."""
    failure = artifact.get("failure")
    return f"{artifact_label(artifact)} could not be run: {failure}" if failure else ""


def cache_changes_text(artifact: Mapping[str, Any]) -> bool:
    """Whether greedy tokens differ with and without the KV cache, by more than a tie."""
    if artifact["generation_consistent"] is not False:
        return False
    sample = artifact["generation"]
    return bool(sample["gap"] > TIE * sample["spread"])


def gate_failure(gate: Mapping[str, Any]) -> str:
    """What was measured beside what was allowed."""
    return f"{gate['name']} is {gate_value(gate)}, the gate is {gate['limit']}"


def gate_value(gate: Mapping[str, Any]) -> str:
    """What was measured, in the unit of the gate."""
    if gate["value"] is None:
        return "nothing"
    if "bytes" in gate["name"]:
        return format_bytes(gate["value"])
    return f"{gate['value']:.4g}"


def table_row(artifact: Mapping[str, Any]) -> list[str]:
    """One line of the table; what was not measured is a dash."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    ratio = artifact["perplexity_ratio"]
    change = "" if ratio is None else f" ({(ratio - 1) * 100:+.1f} %)"
    kl = (artifact["kl_divergence"] or {}).get("mean")
    top1 = artifact["top1_agreement"]
    peak = artifact["peak_memory_bytes"]
    return [
        artifact["format"],
        artifact["type"],
        format_bytes(artifact["bytes"]),
        number(artifact["bits_per_weight"], ".2f"),
        number(artifact["perplexity"], ".3f") + change,
        number(kl, ".4f"),
        "-" if top1 is None else f"{top1 * 100:.1f} %",
        number(artifact["decode_tokens_per_second"], ".1f"),
        "-" if peak is None else format_bytes(peak).split(" (")[0],
    ]
