"""The step of a build that turns a budget into grids for every tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from compress.allocation.budget import Allocation, Target, infeasible
from compress.allocation.choices import Choice
from compress.allocation.costs import CostTable, measured, members
from compress.allocation.effort import effort_for
from compress.allocation.limits import Limit, limit_of
from compress.calibration.step import CalibrationStep
from compress.plan.job import Job
from compress.plan.shapes import Exporter, Plan
from compress.solvers import get_solver

__all__ = ["BudgetStep", "Budgeted", "limit_for", "targets_of", "within_budget"]

Prepare = Callable[[Mapping[str, Mapping[str, str]]], Job]
"""Format → entry name → grid: the job with these grids."""

GetExporter = Callable[[str], Exporter]


@dataclass(frozen=True)
class Budgeted:
    """One target, its limit and what was chosen within it.

    Attributes:
        table: what was measured; None where the largest file fits, and nothing had to be.
        recommended: bytes of the smallest file that is expected to be good; 0 without a table.
        weighed: the shapes that were weighed, as ``weigh.py`` tells them; none: nothing was.
    """

    target: Target
    limit: Limit
    allocation: Allocation
    table: CostTable | None = field(repr=False)
    recommended: int = 0
    weighed: tuple[Mapping[str, Any], ...] = ()


class BudgetStep:
    """The budget of a job's recipe.

    Args:
        calibration: of the job as its recipe has it without a budget.
        get_exporter: format → its exporter.
    """

    def __init__(self, calibration: CalibrationStep, get_exporter: GetExporter) -> None:
        self.job = calibration.job
        self._calibration = calibration
        self.targets = targets_of(self.job, get_exporter)
        self._tables: dict[str, CostTable] = {}

    def allocate(
        self,
        limits: Sequence[Limit],
        targets: Sequence[Target] | None = None,
        *,
        expect: bool = False,
    ) -> list[Budgeted]:
        """Measure what is not in the cost table yet, and choose for every target (or these).

        Args:
            limits: of each.
            targets: some of ``targets``.
            expect: whether a divergence is wanted where the largest file fits, too; else nothing
                is measured there.
        """
        gates = self.job.recipe.gates
        found = []
        for target, limit in zip(targets or self.targets, limits, strict=True):
            if target.largest_bytes <= limit.nbytes and not expect:
                found.append(Budgeted(target, limit, target.largest, None))
                continue
            table = self.table(target)
            chosen = target.allocate(limit.nbytes, table)
            recommended = target.recommended_bytes(table, gates)
            found.append(Budgeted(target, limit, chosen, table, recommended))
        return found

    def table(self, target: Target) -> CostTable:
        """The cost table of a target's source, for the candidates of all targets that have it."""
        key = target.source.fingerprint()
        if key not in self._tables:
            wanted = [
                pair
                for other in self.targets
                if other.source.fingerprint() == key
                for pair in other.wanted()
            ]
            effort = effort_for(self.job.config, self.job.recipe.solver)
            statistics, texts, origin = self._calibration.for_costs(target.source, effort.tokens)
            self._tables[key] = measured(
                target.source,
                texts,
                statistics,
                get_solver(effort.solver, statistics),
                effort,
                origin,
                wanted,
                self._calibration.console,
            )
        return self._tables[key]

    def adopt(self, table: CostTable) -> None:
        """Take a table in the place of measuring; grids that it does not know are no options."""
        for target in self.targets:
            target.choices = [known_options(choice, table) for choice in target.choices]
            self._tables[target.source.fingerprint()] = table

    def settle(self, budgeted: Sequence[Budgeted], prepare: Prepare) -> Job:
        """The job with the chosen grids; its plans know their files' bytes and what to expect."""
        chosen = {b.target.plan.format: b for b in budgeted}
        made = prepare({name: b.target.grids(b.allocation.options) for name, b in chosen.items()})
        plans = (
            told(p, chosen[p.format].allocation.plan) for p in made.plans if p.format in chosen
        )
        return replace(self.job, plans=tuple(plans))


def known_options(choice: Choice, table: CostTable) -> Choice:
    """A choice among what a table knows."""
    unknown = {
        grid
        for member in members(table.config, choice.name, tied=choice.tied)
        for grid in (option.grid for option in choice.options)
        if grid not in table.errors.get(member, {})
    }
    options = tuple(option for option in choice.options if option.grid not in unknown)
    return replace(choice, options=options)


def told(plan: Plan, allocated: Plan) -> Plan:
    """What the allocation knows of a plan."""
    return replace(
        plan,
        file_bytes=allocated.file_bytes,
        expected_divergence=allocated.expected_divergence,
    )


def targets_of(job: Job, get_exporter: GetExporter) -> list[Target]:
    """The targets of a job, in its order."""
    return [Target(job, plan, get_exporter(plan.format)) for plan in job.plans]


def limits_of(job: Job, targets: Sequence[Target]) -> list[Limit]:
    """A limit for each target.

    Raises:
        UsageError: the smallest file of some target is more.
    """
    found = [limit_for(job, target) for target in targets]
    pairs = [(target, limit.nbytes) for target, limit in zip(targets, found, strict=True)]
    if refusal := infeasible(pairs):
        raise refusal
    return found


def limit_for(job: Job, target: Target) -> Limit:
    """The limit of one target; its largest file, where the recipe has no budget."""
    return limit_of(job.recipe.budget, job, target.plan) or Limit(target.largest_bytes)


def within_budget(
    calibration: CalibrationStep, get_exporter: GetExporter, prepare: Prepare
) -> tuple[Job, list[Budgeted]]:
    """The job with grids chosen within its recipe's budget.

    Args:
        calibration: of the job as its recipe has it without a budget, its weights as they are
            written.
        get_exporter: format → its exporter.
        prepare: the job with other grids.

    Raises:
        UsageError: an infeasible budget.
    """
    step = BudgetStep(calibration, get_exporter)
    budgeted = step.allocate(limits_of(step.job, step.targets))
    return step.settle(budgeted, prepare), budgeted
