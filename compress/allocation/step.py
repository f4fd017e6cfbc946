"""The step of a build that turns a budget into grids for every tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from compress.allocation.budget import Allocation, Target
from compress.allocation.costs import CostTable, measured
from compress.allocation.effort import effort_for
from compress.allocation.limits import Limit, limit_of
from compress.calibration.step import CalibrationStep
from compress.plan.job import Job, Replan
from compress.plan.shapes import Plan
from compress.solvers import get_solver

__all__ = ["BudgetStep", "Budgeted", "limit_for", "targets_of", "within_budget"]


@dataclass(frozen=True)
class Budgeted:
    """One target, its limit and the grids chosen within it.

    Attributes:
        table: the measured costs; None where the largest file fits and nothing was measured.
        recommended: bytes of the smallest file with a good expected divergence; 0 without a table.
    """

    target: Target
    limit: Limit
    allocation: Allocation
    table: CostTable | None = field(repr=False)
    recommended: int = 0


class BudgetStep:
    """The budget of a job's recipe.

    Args:
        calibration: of the job without a budget.
    """

    def __init__(self, calibration: CalibrationStep) -> None:
        self.job = calibration.job
        self._calibration = calibration
        self.targets = targets_of(self.job)

    def allocate(self, limits: Sequence[Limit]) -> list[Budgeted]:
        """Measure missing costs, and choose grids for every target; nothing is measured for one
        whose largest file fits.

        Args:
            limits: of each target.
        """
        gates = self.job.recipe.gates
        found = []
        for target, limit in zip(self.targets, limits, strict=True):
            if target.largest_bytes <= limit.nbytes:
                found.append(Budgeted(target, limit, target.largest, None))
                continue
            chosen = target.allocate(limit.nbytes, self.table)
            recommended = target.recommended_bytes(self.table, gates)
            found.append(Budgeted(target, limit, chosen, self.table, recommended))
        return found

    @cached_property
    def table(self) -> CostTable:
        """The costs of every candidate of every target."""
        job, calibration = self.job, self._calibration
        effort = effort_for(job.config, job.recipe.solver)
        statistics, texts, origin = calibration.for_costs(job.source, effort.tokens)
        return measured(
            job.source,
            texts,
            statistics,
            get_solver(effort.solver),
            effort,
            origin,
            [pair for target in self.targets for pair in target.wanted()],
            calibration.console,
        )

    def settle(self, budgeted: Sequence[Budgeted], replan: Replan) -> Job:
        """The job with the chosen grids; its plans have file bytes and expected divergence."""
        chosen = {b.target.plan.format: b for b in budgeted}
        grids = {name: b.target.grids(b.allocation.options) for name, b in chosen.items()}
        made = replan(choices=grids)
        plans = tuple(
            with_estimates(plan, chosen[plan.format].allocation.plan) for plan in made.plans
        )
        return replace(self.job, plans=plans)


def with_estimates(plan: Plan, allocated: Plan) -> Plan:
    """A plan with the file size and the expected divergence of its allocation."""
    return replace(
        plan,
        file_bytes=allocated.file_bytes,
        expected_divergence=allocated.expected_divergence,
    )


def targets_of(job: Job) -> list[Target]:
    """The targets of a job, in its order."""
    return [Target(job, plan) for plan in job.plans]


def limit_for(job: Job, target: Target) -> Limit:
    """The limit of one target; its largest file's bytes without a budget."""
    return limit_of(job.recipe.budget, job, target.plan) or Limit(target.largest_bytes)


def within_budget(calibration: CalibrationStep, replan: Replan) -> tuple[Job, tuple[Budgeted, ...]]:
    """The job with grids chosen within its recipe's budget, which ``feasible.py`` has checked.

    Args:
        calibration: of the job without a budget, with the weights that are written.
        replan: makes the job with other grids.
    """
    step = BudgetStep(calibration)
    budgeted = step.allocate([limit_for(step.job, target) for target in step.targets])
    return step.settle(budgeted, replan), tuple(budgeted)
