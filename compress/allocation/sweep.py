"""Several budgets from one measurement: a curve of size against quality, its ends built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress.allocation.budget import Target
from compress.allocation.explain import describe
from compress.allocation.limits import Limit
from compress.allocation.step import BudgetStep, GetExporter, Prepare, targets_of
from compress.calibration.step import CalibrationStep
from compress.checkpoint.sources import Stored
from compress.console import format_bytes, parse_bytes
from compress.errors import UsageError
from compress.plan.job import Job

__all__ = ["Sweep", "check_sweep", "curve_rows", "sweep"]

AUTO = 8  # budgets of ``auto``, in equal ratios from the smallest file to the largest


@dataclass(frozen=True)
class Sweep:
    """A curve.

    Attributes:
        job: its plans are the ends of every target's curve.
        rows: points as the report has them, by target, then by size.
        plans: name → the job of that budget and what its budgets say, for ``plan-NAME.json``.
    """

    job: Job
    rows: list[dict[str, Any]]
    plans: dict[str, tuple[Job, dict[str, dict[str, Any]]]]


def sizes_of(text: str, target: Target) -> dict[str, int]:
    """Name → bytes of the budgets that a target can meet, rising.

    Args:
        text: sizes with commas between, or ``auto``.

    Raises:
        UsageError: not sizes, or none that is feasible.
    """
    low, high = target.smallest_bytes, target.largest_bytes
    if text == "auto":
        ratio = (high / low) ** (1 / (AUTO - 1))
        steps = {f"auto-{k + 1}": round(low * ratio**k) for k in range(AUTO)}
        return steps | {"auto-1": low, f"auto-{AUTO}": high}
    try:
        named = {name.strip(): parse_bytes(name) for name in text.split(",")}
    except ValueError as error:
        hint = "--sweep 1.6GiB,1.8GiB,2.0GiB, or auto"
        raise UsageError(f"--sweep: {error}", hint=hint) from error
    feasible = {name: size for name, size in named.items() if size >= low}
    if not feasible:
        raise UsageError(
            f"{target.plan.format}: none of {text} is feasible, the smallest file has "
            f"{format_bytes(low)}"
        )
    return dict(sorted(feasible.items(), key=lambda item: item[1]))


def check_sweep(text: str, job: Job, get_exporter: GetExporter) -> None:
    """Refuse an infeasible sweep before any work.

    Raises:
        UsageError: see ``sizes_of``; or the recipe weighs pruning, which is done for one budget.
    """
    if job.recipe.weighs:
        raise UsageError("--sweep and prune auto exclude each other", hint="one --budget at a time")
    shaped = job.on(Stored(job.checkpoint, job.shape)) if job.cut else job
    for target in targets_of(shaped, get_exporter):
        sizes_of(text, target)


def sweep(
    text: str, calibration: CalibrationStep, get_exporter: GetExporter, prepare: Prepare
) -> Sweep:
    """Every budget of every target, from one measurement.

    Args:
        text: as ``sizes_of`` takes it; sizes that a target cannot meet are left out of its curve.
        calibration, get_exporter, prepare: as ``within_budget``.
    """
    step = BudgetStep(calibration, get_exporter)
    budgets = {target.plan.format: sizes_of(text, target) for target in step.targets}
    names = list(dict.fromkeys(name for sizes in budgets.values() for name in sizes))
    plans: dict[str, tuple[Job, dict[str, dict[str, Any]]]] = {}
    rows: list[dict[str, Any]] = []
    parameters = step.job.config.num_parameters
    for name in names:
        targets = [t for t in step.targets if name in budgets[t.plan.format]]
        limits = [Limit(budgets[target.plan.format][name]) for target in targets]
        budgeted = step.allocate(limits, targets, expect=True)
        job = step.settle(budgeted, prepare)
        plans[name] = (job, {b.target.plan.format: describe(b) for b in budgeted})
        for plan, limit in zip(job.plans, limits, strict=True):
            rows.append(
                {
                    "format": plan.format,
                    "type": plan.type_name,
                    "budget_bytes": limit.nbytes,
                    "bytes": plan.file_bytes,
                    "bits_per_weight": 8 * plan.file_bytes / parameters,
                    "expected_kl_divergence": plan.expected_divergence,
                }
            )
    order = {target.plan.format: place for place, target in enumerate(step.targets)}
    rows.sort(key=lambda row: (order[row["format"]], row["bytes"]))
    ends = []
    for target in step.targets:
        sizes = budgets[target.plan.format]
        ordered = list(sizes)  # rising
        for name in dict.fromkeys((ordered[0], ordered[-1])):
            ends += [p for p in plans[name][0].plans if p.format == target.plan.format]
    return Sweep(replace(step.job, plans=tuple(ends)), rows, plans)


def curve_rows(
    rows: Sequence[Mapping[str, Any]], artifacts: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The report's ``curve``: points, with what was measured where an artifact was run."""
    measured = {
        (artifact["format"], artifact["type"]): (artifact["kl_divergence"] or {}).get("mean")
        for artifact in artifacts
    }
    return [{**row, "kl_divergence": measured.get((row["format"], row["type"]))} for row in rows]
