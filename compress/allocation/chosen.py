"""What was chosen for a build, however it came about: by a budget, an earlier plan, or neither."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.allocation.explain import describe, print_budgets
from compress.allocation.lock import locked
from compress.allocation.step import Budgeted, GetExporter, Replan, within_budget
from compress.calibration.step import CalibrationStep
from compress.console import Console
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
        at_most: format → bytes that a budget lets its file have, while grids are to be chosen.
    """

    job: Job
    budgets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    budgeted: tuple[Budgeted, ...] = ()
    at_most: Mapping[str, int] = field(default_factory=dict)

    def bytes_of(self, plan: Plan) -> int:
        """What is known of a target's file: its weights, or what a budget lets it have at most."""
        return self.at_most.get(plan.format, plan.weights_bytes)

    @property
    def predicted_bytes(self) -> int:
        """The same of all targets."""
        return sum(map(self.bytes_of, self.job.plans))

    def print(self, console: Console) -> None:
        """What ``--dry-run`` adds."""
        if self.budgeted:
            print_budgets(self.budgeted, console)


def choose_grids(calibration: CalibrationStep, get_exporter: GetExporter, replan: Replan) -> Chosen:
    """Within the recipe's budget."""
    job, budgeted = within_budget(calibration, get_exporter, replan)
    budgets = {b.target.plan.format: describe(b) for b in budgeted}
    return Chosen(job, budgets, tuple(budgeted))


def locked_plan(path: Path, job: Job, get_exporter: GetExporter, replan: Replan) -> Chosen:
    """As a ``plan.json`` has it."""
    settled, budgets = locked(path, job, get_exporter, replan)
    return Chosen(settled, budgets)
