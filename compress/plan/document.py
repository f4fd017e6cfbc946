"""``plan.json``, and what ``--dry-run`` prints: what will be made, before it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress import __version__
from compress.console import Console, format_bytes
from compress.plan.job import Job, looks_at_inputs
from compress.plan.shapes import Plan
from compress.recipe import Recipe
from compress.solvers import NEEDS

__all__ = ["plan_document", "print_plan"]


def plan_document(
    job: Job, budgets: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """``plan.json``: which tensor has which grid, per target; readable, diffable, no times.

    Args:
        job: the job.
        budgets: format → what its budget says.
    """
    return {
        "schema_version": 1,
        "tool": {"name": "packlight", "version": __version__},
        "model": {
            "source": job.checkpoint.source,
            "revision": job.checkpoint.revision,
            "family": job.config.family,
            "parameters": job.config.num_parameters,
        },
        **({"prune": prune_document(job)} if job.cut else {}),
        "quantize": {**job.recipe.document["quantize"], **calibration_document(job.recipe)},
        "targets": {
            plan.format: plan_target(plan, job, (budgets or {}).get(plan.format))
            for plan in job.plans
        },
    }


def prune_document(job: Job) -> dict[str, Any]:
    """``prune`` as the recipe's document has it, and how many parameters are left."""
    return {**job.recipe.document["prune"], "parameters_left": job.shape.num_parameters}


def calibration_document(recipe: Recipe) -> dict[str, Any]:
    """``calibration`` as the recipe's document has it, where anything looks at inputs."""
    looks = looks_at_inputs(recipe)
    return {"calibration": recipe.document["calibration"]} if looks else {}


def plan_target(plan: Plan, job: Job, budget: Mapping[str, Any] | None) -> dict[str, Any]:
    """One target of ``plan.json``; ``prune`` where it has a shape of its own."""
    cut = job.cuts.get(plan.format)
    return {
        "type": plan.type_name,
        **({"prune": cut.settings} if cut else {}),
        "settings": plan.settings,
        "weights_bytes": plan.weights_bytes,
        **({"file_bytes": plan.file_bytes} if plan.file_bytes else {}),
        "bits_per_weight": round(plan.weights_bytes * 8 / job.config.num_parameters, 4),
        **expectation(plan),
        **({"budget": dict(budget)} if budget else {}),
        "notes": list(plan.notes),
        "tensors": [
            {
                "name": entry.name,
                "target_name": entry.target_name,
                "grid": entry.grid,
                "shape": list(entry.shape),
                "bytes": entry.nbytes,
                **({"note": entry.note} if entry.note else {}),
            }
            for entry in plan.entries
        ],
    }


def expectation(plan: Plan) -> dict[str, float]:
    """What a cost table says of the plan, four digits, where there was one."""
    if plan.expected_divergence is None:
        return {}
    return {"expected_kl_divergence": float(f"{plan.expected_divergence:.4g}")}


def print_plan(
    job: Job, console: Console, budgets: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """``--dry-run``: per target its bytes, its grids, and what to know; nothing is written."""
    console.result(plan_document(job, budgets))
    parameters = job.config.num_parameters
    console.data(f"{job.checkpoint.source}: {job.config.family}, {parameters:,} parameters")
    if job.cut:
        left = job.shape.num_parameters
        console.data(f"pruned: {job.cut.describe()}, {left:,} parameters are left")
    for name, cut in job.cuts.items():
        left = cut.config.num_parameters
        console.data(f"pruned ({name}): {cut.describe()}, {left:,} parameters are left")
    rows = []
    for plan in job.plans:
        counts: dict[str, int] = {}
        for entry in plan.entries:
            counts[entry.grid] = counts.get(entry.grid, 0) + 1
        grids = ", ".join(f"{count} {grid}" for grid, count in sorted(counts.items()))
        bits = f"{plan.weights_bytes * 8 / parameters:.3f}"
        rows.append([plan.format, plan.type_name, format_bytes(plan.weights_bytes), bits, grids])
    console.table(["format", "type", "weights", "bits per weight", "tensors"], rows)
    if job.recipe.solver in NEEDS:
        texts = job.recipe.document["calibration"]
        what = f"{texts['tokens']} tokens of {', '.join(texts['texts'])}"
        console.data(f"solver: {job.recipe.solver}, calibrated on {what}")
    else:
        console.data(f"solver: {job.recipe.solver}")
    if job.recipe.folds:
        ways = ["rescaled (awq)"] * (job.recipe.fold == "awq") + ["reordered"] * job.recipe.permute
        console.data(f"channels: {' and '.join(ways)} where that measures better")
    for plan in job.plans:
        for note in plan.notes:
            console.data(f"note ({plan.format}): {note}")
