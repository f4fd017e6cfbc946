"""What was chosen for a build, however it came about: by a budget, a sweep, an earlier plan, or not
at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.allocation.explain import describe, print_budgets
from compress.allocation.ladder import Replan
from compress.allocation.lock import locked
from compress.allocation.step import Budgeted, GetExporter, within_budget
from compress.allocation.sweep import Sweep, sweep
from compress.allocation.weigh import weigh
from compress.calibration.step import CalibrationStep
from compress.console import Console, format_bytes
from compress.plan.document import plan_document
from compress.plan.job import Job
from compress.plan.shapes import Plan

__all__ = ["Chosen", "choose_grids", "locked_plan"]


@dataclass(frozen=True)
class Chosen:
    """The job with its grids, and what is told of them.

    Attributes:
        job: with the plans to build.
        budgets: format → ``plan.json``'s ``budget``.
        budgeted: the choices of a budget.
        swept: the choices of a sweep.
        at_most: format → bytes that a budget lets its file have, while grids are to be chosen.
    """

    job: Job
    budgets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    budgeted: tuple[Budgeted, ...] = ()
    swept: Sweep | None = None
    at_most: Mapping[str, int] = field(default_factory=dict)

    def bytes_of(self, plan: Plan) -> int:
        """What is known of a target's file: its weights, or what a budget lets it have at most."""
        return self.at_most.get(plan.format, plan.weights_bytes)

    @property
    def predicted_bytes(self) -> int:
        """The same of all targets."""
        return sum(map(self.bytes_of, self.job.plans))

    @property
    def curve(self) -> list[dict[str, Any]]:
        """Points of a sweep."""
        return self.swept.rows if self.swept else []

    def documents(self, job: Job) -> dict[str, dict[str, Any]]:
        """File name → plan: ``plan.json``, or one for every budget of a sweep."""
        if self.swept is None:
            return {"plan.json": plan_document(job, self.budgets)}
        return {
            f"plan-{name}.json": plan_document(made, budgets)
            for name, (made, budgets) in self.swept.plans.items()
        }

    def print(self, console: Console) -> None:
        """What ``--dry-run`` adds."""
        if self.budgeted:
            print_budgets(self.budgeted, console)
        rows = [
            [
                row["format"],
                format_bytes(row["budget_bytes"]),
                format_bytes(row["bytes"]),
                f"{row['bits_per_weight']:.2f}",
                f"{row['expected_kl_divergence']:.4f}",
            ]
            for row in self.curve
        ]
        if rows:
            console.table(["format", "budget", "file", "bits per weight", "expected KL"], rows)


def choose_grids(
    sizes: str, calibration: CalibrationStep, get_exporter: GetExporter, prepare: Replan
) -> Chosen:
    """Within the recipe's budget (and what to prune for it, where the recipe leaves it that), or
    for every one of a sweep's ``sizes``.
    """
    if sizes:
        swept = sweep(sizes, calibration, get_exporter, prepare)
        return Chosen(swept.job, swept=swept)
    way = weigh if calibration.job.recipe.weighs else within_budget
    job, budgeted = way(calibration, get_exporter, prepare)
    budgets = {b.target.plan.format: describe(b) for b in budgeted}
    return Chosen(job, budgets, tuple(budgeted))


def locked_plan(path: Path, job: Job, get_exporter: GetExporter, prepare: Replan) -> Chosen:
    """As a ``plan.json`` has it."""
    settled, budgets = locked(path, job, get_exporter, prepare)
    return Chosen(settled, budgets)
