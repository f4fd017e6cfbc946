"""``plan.json``, and what ``--dry-run`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress import __version__
from compress.console import Console, format_bytes
from compress.plan.job import Job, looks_at_inputs
from compress.plan.shapes import Plan, bits_per_weight
from compress.recipe import needs_of

__all__ = ["plan_document", "print_plan"]


def plan_document(job: Job) -> dict[str, Any]:
    """``plan.json``: which tensor has which grid, per target; readable, diffable, no times."""
    recipe = job.recipe.to_dict()
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
        "quantize": {
            **recipe["quantize"],
            **({"calibration": recipe["calibration"]} if looks_at_inputs(job.recipe) else {}),
        },
        "targets": {
            plan.format: plan_target(plan, job, job.budgets.get(plan.format)) for plan in job.plans
        },
    }


def prune_document(job: Job) -> dict[str, Any]:
    """``prune`` as the recipe's document has it, and how many parameters are left."""
    return {**job.recipe.to_dict()["prune"], "parameters_left": job.shape.num_parameters}


def plan_target(plan: Plan, job: Job, budget: Mapping[str, Any] | None) -> dict[str, Any]:
    """One target of ``plan.json``."""
    expected = plan.expected_divergence
    return {
        "type": plan.type_name,
        "settings": plan.settings,
        "weights_bytes": plan.weights_bytes,
        **({"file_bytes": plan.file_bytes} if plan.file_bytes else {}),
        "bits_per_weight": round(bits_per_weight(plan.weights_bytes, job.config.num_parameters), 4),
        **({} if expected is None else {"expected_kl_divergence": float(f"{expected:.4g}")}),
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


def print_plan(job: Job, console: Console) -> None:
    """``--dry-run``: per target its bytes, its grids, and what to know; nothing is written."""
    console.result(plan_document(job))
    parameters = job.config.num_parameters
    console.data(f"{job.checkpoint.source}: {job.config.family}, {parameters:,} parameters")
    if job.cut:
        left = job.shape.num_parameters
        console.data(f"pruned: {job.cut.describe()}, {left:,} parameters are left")
    rows = []
    for plan in job.plans:
        counts: dict[str, int] = {}
        for entry in plan.entries:
            counts[entry.grid] = counts.get(entry.grid, 0) + 1
        grids = ", ".join(f"{count} {grid}" for grid, count in sorted(counts.items()))
        bits = f"{bits_per_weight(plan.weights_bytes, parameters):.3f}"
        rows.append([plan.format, plan.type_name, format_bytes(plan.weights_bytes), bits, grids])
    console.table(["format", "type", "weights", "bits per weight", "tensors"], rows)
    if needs_of(job.recipe.solver):
        seen = job.recipe.to_dict()["calibration"]
        what = f"{seen['tokens']} tokens of {', '.join(seen['texts'])}"
        console.data(f"solver: {job.recipe.solver}, calibrated on {what}")
    else:
        console.data(f"solver: {job.recipe.solver}")
    if job.recipe.folds:
        console.data(f"channels: rescaled ({job.recipe.fold}) where that measures better")
    for plan in job.plans:
        for note in plan.notes:
            console.data(f"note ({plan.format}): {note}")
