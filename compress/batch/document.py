"""``batch.json``: every job of a batch with its result; and the summary on the terminal."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.batch.state import State
from compress.batch.table import WORDS, Board
from compress.console import Console
from compress.progress import clock_time
from compress.report.report import ArtifactReport, GateReport, Report
from compress.report.words import gate_failure, pipe_table, sentence, short_size

if TYPE_CHECKING:
    from compress.batch.planning import Planned

__all__ = ["batch_document", "errors", "finish", "markdown", "print_plan"]

# Keys copied from an artifact's entry in report.json.
FIGURES = (
    "format", "type", "path", "bytes", "bits_per_weight", "perplexity", "perplexity_ratio",
    "top1_agreement", "peak_memory_bytes", "weights_bytes", "kv_cache_bytes",
    "prefill_tokens_per_second", "decode_tokens_per_second", "runtime", "failure",
)  # fmt: skip

HEADERS = ("job", "result", "artifacts", "size", "KL up to", "time")
STOPPED = ("error", "killed", "interrupted")
NOT_RUN = "not run"  # after a failure with --fail-fast, or an interruption


def batch_document(
    file: Path, planned: Sequence[Planned], board: Board, state: State, memory: int, cpus: int
) -> dict[str, Any]:
    """Make ``batch.json``; paths in it are relative to the output tree.

    Args:
        file: the jobs file.
        planned: the jobs, in order.
        board: with their records.
        state: with their reports.
        memory, cpus: limits of the batch.
    """
    jobs = [describe(one, board, state) for one in planned]
    counts = Counter(job["status"] for job in jobs)
    return {
        "schema_version": 1,
        "tool": {"name": "packlight", "version": __version__},
        "jobs_file": file.name,
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "cpus": cpus,
            "memory_bytes": memory,
        },
        "seconds": round(board.seconds, 2),
        "counts": dict(counts),
        "exit_code": exit_code(counts),
        "jobs": jobs,
    }


def exit_code(counts: Mapping[str, int]) -> int:
    """2 if a job could not finish, 1 if a gate failed, else 0."""
    if any(counts.get(status) for status in STOPPED):
        return 2
    return 1 if counts.get("failed") else 2 if counts.get(NOT_RUN) else 0


def describe(one: Planned, board: Board, state: State) -> dict[str, Any]:
    """The entry of one job."""
    record = board.records.get(one.name)
    report = state.report(one.name) if record and record.reported else None
    found = one.prediction
    return {
        "name": one.name,
        "model": one.job.model_name,
        "recipe": Path(one.job.recipe).stem,
        "status": record.status if record else NOT_RUN,
        "now": one.name in board.fresh,
        "error": record.error if record else "",
        "hint": record.hint if record else "",
        "log": log_of(one.name, state),
        "predicted": None
        if found is None
        else {
            "bytes": found.bytes,
            "memory_bytes": found.memory,
            "threads": found.threads,
            "seconds": round(found.seconds, 1),
        },
        "seconds": record.seconds if record else 0.0,
        "cpu_seconds": record.cpu_seconds if record else 0.0,
        "peak_memory_bytes": record.peak_memory if record else 0,
        "report": f"{one.name}/report.html" if report else None,
        "parameters": report.model.parameters if report else None,
        "family": report.model.family if report else None,
        "baseline": baseline(report) if report else None,
        "artifacts": [figures(found, one.name) for found in (report.artifacts if report else ())],
    }


def log_of(name: str, state: State) -> str | None:
    """Path of a job's log in the output tree; None where there is none."""
    path = state.file(name, "log")
    return path.relative_to(state.output).as_posix() if path.is_file() else None


def baseline(report: Report) -> dict[str, Any]:
    """Figures of a report's float model."""
    keys = ("bytes", "dtype", "perplexity", "decode_tokens_per_second")
    return {key: getattr(report.baseline, key) for key in keys}


def figures(artifact: ArtifactReport, name: str) -> dict[str, Any]:
    """The figures of one artifact of a report that the batch shows."""
    divergence = artifact.kl_divergence
    return {
        **{key: getattr(artifact, key) for key in FIGURES},
        "path": f"{name}/{artifact.path}",
        "kl_divergence": None if divergence is None else divergence.mean,
        "kl_divergence_se": None if divergence is None else divergence.se,
        "gates": [gate.model_dump() for gate in artifact.gates],
        "passed": not artifact.failure and all(gate.passed for gate in artifact.gates),
    }


# --- text ----------------------------------------------------------------------------------------


def print_plan(planned: Sequence[Planned], console: Console, memory: int, cpus: int) -> None:
    """``--dry-run``: every job with its predicted bytes, memory and time."""
    rows: list[list[str]] = []
    jobs: list[dict[str, Any]] = []
    for one in planned:
        found = one.prediction
        jobs.append({"name": one.name, "error": one.error, "hint": one.hint})
        if found is None:
            rows.append([one.name, "-", "-", "-", "-"])
            continue
        jobs[-1]["predicted"] = {
            "bytes": found.bytes, "memory_bytes": found.memory, "threads": found.threads,
            "seconds": round(found.seconds, 1),
        }  # fmt: skip
        rows.append(
            [one.name, short_size(found.bytes), short_size(found.memory), str(found.threads),
             clock_time(found.seconds)]
        )  # fmt: skip
    known = [one.prediction for one in planned if one.prediction]
    console.result({"memory_bytes": memory, "cpus": cpus, "jobs": jobs})
    console.table(["job", "size", "memory", "threads", "time"], rows)
    for one in planned:
        if one.error:
            console.warning(f"{one.name}: {with_hint(one.error, one.hint)}")
    busy = sum(found.seconds * found.threads for found in known) / cpus
    size = short_size(sum(found.bytes for found in known))
    console.data(
        f"{len(known)} job{'s' * (len(known) != 1)}, {size}, about {clock_time(busy)} on {cpus} "
        f"CPU{'s' * (cpus != 1)} within {short_size(memory)} of memory"
    )


def finish(document: Mapping[str, Any], output: Path, console: Console, url: str = "") -> None:
    """Print the table of all jobs, those that could not run, the verdict and the paths.

    Args:
        output: the tree on this machine.
        url: of the tree, where it is not a folder.
    """
    console.result(document)
    for job in document["jobs"]:
        if job["report"]:
            console.path(f"{url or output}/{job['name']}")
    console.table(HEADERS, [table_row(job) for job in document["jobs"]])
    for job in document["jobs"]:
        if job["error"]:
            console.warning(f"{job['name']}: {with_hint(job['error'], job['hint'])}")
        elif job["status"] == "killed":
            console.warning(f"{job['name']}: killed; --retry-failed does it again")
    console.verdict(document["exit_code"] == 0, totals(document))
    console.say(f"report: {output / 'batch.html'}")


def with_hint(error: str, hint: str) -> str:
    """An error and its hint, on one line."""
    return f"{error} ({hint})" if hint else error


def table_row(job: Mapping[str, Any]) -> list[str]:
    """The table row of one job."""
    artifacts = job["artifacts"]
    known = [a["kl_divergence"] for a in artifacts if a["kl_divergence"] is not None]
    return [
        job["name"],
        word_of(job["status"]),
        str(len(artifacts) or "-"),
        short_size(sum(a["bytes"] for a in artifacts)) if artifacts else "-",
        f"{max(known):.4f}" if known else "-",
        clock_time(job["seconds"]) if job["seconds"] else "-",
    ]


def word_of(status: str) -> str:
    """A status as text for users."""
    return WORDS[status][0] if status in WORDS else status


def totals(document: Mapping[str, Any]) -> str:
    """Number of jobs by status."""
    return ", ".join(f"{count} {word_of(status)}" for status, count in document["counts"].items())


def markdown(document: Mapping[str, Any]) -> str:
    """The table of all jobs and the failures as Markdown, for a CI job's page."""
    passed = "✅" if document["exit_code"] == 0 else "❌"
    rows = [[sentence(cell) for cell in table_row(job)] for job in document["jobs"]]
    reasons = [f"{name}: {why}" for name, why in errors(document).items()]
    reasons += [
        f"{job['name']}, {artifact['format']}: {gate_failure(GateReport(**gate))}"
        for job in document["jobs"]
        for artifact in job["artifacts"]
        for gate in artifact["gates"]
        if not gate["passed"]
    ]
    parts = [
        f"### packlight batch: {sentence(document['jobs_file'])}",
        f"{passed} {totals(document)}",
        pipe_table(HEADERS, rows, left=2),
        "\n".join(f"- {sentence(reason)}" for reason in reasons),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def errors(document: Mapping[str, Any]) -> dict[str, str]:
    """Job name → why it could not finish, or why its artifacts could not be run."""
    return {
        job["name"]: job["error"] or word_of(job["status"])
        for job in document["jobs"]
        if job["status"] in STOPPED
    }
