"""What a build or a verification tells at its end: the table, failed gates, the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.console import Console, format_bytes
from compress.report import TASK_HEADERS, task_rows

# Logits closer than this many of their standard deviations are a tie that the order of summation
# decides, not a wrong cache. onnxruntime's kernels for one token and for many differ by 0.02 of
# them (root mean square) after 32 blocks of Phi-3-mini's shape.
TIE = 0.1

HEADERS = ("format", "type", "size", "bpw", "perplexity", "KL", "top-1", "tokens/s", "peak memory")


def finish(report: Mapping[str, Any], output: Path | None, console: Console) -> None:
    """The table, the verdict and where things are."""
    console.end()
    console.result(report)
    console.table(HEADERS, [table_row(artifact) for artifact in report["artifacts"]])
    if tasks := task_rows(report):
        console.table(TASK_HEADERS, tasks)
    for artifact in report["artifacts"]:
        for gate in artifact["gates"]:
            if not gate["passed"]:
                console.warning(
                    f"{artifact['format']}: {gate['name']} is {gate_value(gate)}, "
                    f"the gate is {gate['limit']}"
                )
        if cache_changes_text(artifact):
            console.warning(
                f"{artifact['format']}: greedy tokens differ with and without the KV cache"
            )
        if output is not None:
            console.path(output / artifact["path"])
    if report["verdict"] == "not verified":
        console.say("not verified")
    elif report["verdict"] == "passed" and not any(a["gates"] for a in report["artifacts"]):
        console.say("measured; no gate was set")
    else:
        console.verdict(report["verdict"] == "passed", f"{report['recipe']['name']}")
    if output is not None:
        console.say(f"report: {output / 'report.html'}")


def cache_changes_text(artifact: Mapping[str, Any]) -> bool:
    """Whether greedy tokens differ with and without the KV cache, by more than a tie."""
    if artifact["generation_consistent"] is not False:
        return False
    sample = artifact["generation"]
    return bool(sample["gap"] > TIE * sample["spread"])


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
