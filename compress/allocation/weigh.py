"""Pruning against lower bits, by measured loss: for each target the shape whose file is expected to
say most what the float model says, within its bytes.

``total = KL of the pruned float model + cost of the grids chosen for it``, both on calibration
texts, in nats per token. The unpruned shape is weighed first. A chain of shapes is followed only
while pruning alone costs less than the best total so far: grids cost nothing at the least, and what
a chain prunes later costs more. So where bits suffice, no more than the first shape of each chain
is pruned; where every tensor has its largest grid already, none is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress.allocation.costs import CostTable
from compress.allocation.effort import effort_for
from compress.allocation.ladder import Ladder, Replan, Rung
from compress.allocation.step import Budgeted, BudgetStep, GetExporter
from compress.calibration.step import CalibrationStep
from compress.checkpoint.sources import Stored
from compress.plan.job import Job
from compress.plan.shapes import Plan
from compress.pruning.cut import Cut
from compress.pruning.glance import Glance, glance
from compress.pruning.step import prune, pruning_divergence

__all__ = ["AtAGlance", "Outcome", "Thorough", "noted", "weigh", "weighed_note"]


@dataclass(frozen=True)
class Outcome:
    """What a shape comes to.

    Attributes:
        rung: the shape.
        step: the budget of its job, its weights as they are written.
        budgeted: what was chosen in it; the plan's expected divergence is the total.
        pruning: nats that pruning alone costs.
    """

    rung: Rung
    step: BudgetStep
    budgeted: Budgeted
    pruning: float

    @property
    def total(self) -> float:
        """Nats per token; 0 where nothing was measured."""
        return self.budgeted.allocation.plan.expected_divergence or 0.0


def weigh(
    calibration: CalibrationStep, get_exporter: GetExporter, prepare: Replan
) -> tuple[Job, list[Budgeted]]:
    """The job with a shape for each target, and grids chosen within its recipe's budget.

    Args:
        calibration: of the unpruned job.
        get_exporter: format → its exporter.
        prepare: the command's job by another recipe or with other grids.

    Raises:
        UsageError: calibration texts that are not there or too short.
    """
    job = calibration.job
    effort = effort_for(job.config, job.recipe.solver)
    scale = (AtAGlance if effort.sampled else Thorough)(calibration, get_exporter)
    plans, budgeted = [], []
    sources, cuts = dict(job.sources), dict[str, Cut]()
    for plan in job.plans:
        ladder = Ladder(job, plan, get_exporter, prepare)
        best, rows = best_of(ladder, scale)
        made = best.step.settle([best.budgeted], ladder.alone(best.rung))
        plans.append(noted(made.plans[0], rows))
        budgeted.append(replace(best.budgeted, weighed=tuple(rows)))
        if made.cut:
            cuts[plan.format] = made.cut
            sources[plan.format] = made.source_of(plan)
    return replace(job, plans=tuple(plans), sources=sources, cuts=cuts), budgeted


def best_of(ladder: Ladder, scale: Thorough | AtAGlance) -> tuple[Outcome, list[dict[str, Any]]]:
    """The shape with the least total, and a row for each that was looked at."""
    outcomes: list[Outcome] = []
    rows: list[tuple[Rung, Outcome | None, float | None]] = []

    def take(rung: Rung, pruning: float) -> None:
        outcomes.append(scale.outcome(rung, pruning))
        rows.append((rung, outcomes[-1], pruning))

    whole = ladder.unpruned
    if whole.fits:
        take(whole, 0.0)
    else:
        rows.append((whole, None, None))
    if whole.target.largest_bytes > whole.limit.nbytes:  # else there is nothing that bytes buy
        for chain in ladder.chains():
            seen: Outcome | None = None  # of the shape before, in this chain
            for rung in chain:
                if not rung.fits:
                    rows.append((rung, None, None))
                    continue
                least = min((outcome.total for outcome in outcomes), default=math.inf)
                if seen and scale.bound(rung, seen) >= least:
                    continue
                pruning = scale.pruning(rung)
                if pruning >= least:
                    rows.append((rung, None, pruning))
                    break
                take(rung, pruning)
                seen = outcomes[-1]
    best = min(outcomes, key=lambda outcome: outcome.total)
    return best, [row_of(*row, chosen=row[1] is best) for row in rows]


class Thorough:
    """Every shape is pruned, and its own tensors are measured.

    Args:
        calibration: of the unpruned job.
        get_exporter: format → its exporter.
    """

    def __init__(self, calibration: CalibrationStep, get_exporter: GetExporter) -> None:
        self._calibration, self._get_exporter = calibration, get_exporter

    def pruning(self, rung: Rung) -> float:
        """Nats that pruning alone costs."""
        return pruning_divergence(rung.job, self._calibration.console, self._calibration.threads)

    def bound(self, rung: Rung, seen: Outcome) -> float:
        """Nats that a shape costs at least, by the one before it in its chain."""
        return seen.pruning

    def outcome(self, rung: Rung, pruning: float) -> Outcome:
        """Prune (from the cache), measure what is not known yet, and choose grids.

        Args:
            rung: one that fits.
            pruning: nats that its pruning costs.
        """
        job = rung.job
        if pruned := prune(job, self._calibration.console, self._calibration.threads):
            job = job.on(pruned.source)
        step = BudgetStep(self._calibration.on(job), self._get_exporter)
        return outcome_of(rung, step, pruning)


class AtAGlance:
    """For a large model: the whole model's table stands for every shape, and pruning is looked at
    without being done (``compress.pruning.glance``).

    Args:
        calibration, get_exporter: as ``Thorough`` takes them.
    """

    def __init__(self, calibration: CalibrationStep, get_exporter: GetExporter) -> None:
        self._calibration, self._get_exporter = calibration, get_exporter
        self._whole = BudgetStep(calibration, get_exporter)

    def pruning(self, rung: Rung) -> float:
        """Nats that pruning alone costs, at most."""
        return self.glance(rung).kl

    def bound(self, rung: Rung, seen: Outcome) -> float:
        """As ``Thorough.bound``, and what grids cost in this shape: arithmetic, no look is taken.

        Blocks that go are taken to be those that cost most on their grids.
        """
        table = self.table(rung.target.plan.format)
        kept = list(self.glance(seen.rung).kept)
        assert rung.job.cut is not None
        left = rung.job.cut.config.num_hidden_layers // rung.job.config.block_repeat
        kept.sort(key=lambda block: table.block_cost(block * rung.job.config.block_repeat))
        return self._on(rung, sorted(kept[:left]), seen.pruning).total

    def outcome(self, rung: Rung, pruning: float) -> Outcome:
        """As ``Thorough.outcome``; nothing is pruned."""
        return self._on(rung, self.glance(rung).kept, pruning)

    def _on(self, rung: Rung, kept: Sequence[int], pruning: float) -> Outcome:
        job = rung.job.on(Stored(rung.job.checkpoint, rung.job.shape))
        table = self.table(rung.target.plan.format)
        step = BudgetStep(self._calibration.on(job), self._get_exporter)
        step.adopt(table.on(step.targets[0].source.config, kept))
        return outcome_of(rung, step, pruning)

    def table(self, name: str) -> CostTable:
        """The whole model's, of a format; measured once for all of them."""
        (whole,) = (target for target in self._whole.targets if target.plan.format == name)
        return self._whole.table(whole)

    def glance(self, rung: Rung) -> Glance:
        """What is seen of a shape."""
        job = rung.job
        if job.cut is None:
            return Glance(
                0.0, tuple(range(job.config.num_hidden_layers // job.config.block_repeat))
            )
        tokens = effort_for(job.config, job.recipe.solver).tokens
        statistics, texts, _ = self._calibration.for_costs(job.source, tokens)
        return glance(job.source, job.cut, statistics, texts.windows, self._calibration.console)


def outcome_of(rung: Rung, step: BudgetStep, pruning: float) -> Outcome:
    """Grids for a shape.

    Args:
        rung: one that fits.
        step: the budget of its job.
        pruning: nats that its pruning costs.
    """
    (found,) = step.allocate([rung.limit], expect=rung.job.cut is not None)
    if found.table is None:  # the whole model's largest file fits
        return Outcome(rung, step, found, pruning)
    plan = found.allocation.plan
    total = pruning + (plan.expected_divergence or 0.0)
    allocation = replace(found.allocation, plan=replace(plan, expected_divergence=total))
    recommended = found.target.recommended_bytes(found.table, step.job.recipe.gates, pruning)
    return Outcome(
        rung, step, replace(found, allocation=allocation, recommended=recommended), pruning
    )


def row_of(
    rung: Rung, outcome: Outcome | None, pruning: float | None, *, chosen: bool
) -> dict[str, Any]:
    """One shape as ``plan.json`` tells it; four digits."""
    row: dict[str, Any] = {
        "prune": rung.job.cut.settings if rung.job.cut else {"method": "none"},
        "what": rung.what,
        "smallest_bytes": rung.target.smallest_bytes,
        "outcome": "chosen" if chosen else "loses",
    }
    if pruning is not None:
        row["pruning_kl_divergence"] = digits(pruning)
    if not rung.fits:
        return row | {"outcome": "does not fit"}
    if outcome is None:
        return row | {"outcome": "cannot win: pruning alone costs as much as the best in all"}
    row["bytes"] = outcome.budgeted.allocation.plan.file_bytes
    if outcome.budgeted.table is None:
        return row
    return row | {"expected_kl_divergence": digits(outcome.total)}


def digits(value: float) -> float:
    """Four of them."""
    return float(f"{value:.4g}")


def noted(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> Plan:
    """The plan with a note that says which won, and against what."""
    return replace(plan, notes=(*plan.notes, weighed_note(rows))) if rows else plan


def weighed_note(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which won, pruning or lower bits, in a sentence.

    Args:
        rows: the ``weighed`` of a target's budget in ``plan.json``.
    """
    whole = rows[0]
    (best,) = (row for row in rows if row["outcome"] == "chosen")
    if len(rows) == 1:
        return "Nothing is pruned: within the budget every tensor has its largest grid"
    total = best["expected_kl_divergence"]
    if best is not whole:
        parts = (
            f"an expected KL of {total:.4f}, {best['pruning_kl_divergence']:.4f} of it by pruning"
        )
        if "expected_kl_divergence" in whole:
            return (
                f"Pruning won against lower bits alone: {best['what']} go, with {parts}; "
                f"unpruned, {whole['expected_kl_divergence']:.4f} was expected"
            )
        return f"Pruned because nothing else fits: {best['what']} go, with {parts}"
    told = f"Nothing is pruned: lower bits alone won, with an expected KL of {total:.4f}"
    lost = [row for row in rows if row["outcome"] == "loses"]
    if not lost:
        return f"{told}; pruning alone would cost more, or not fit"
    near = min(lost, key=lambda row: row["expected_kl_divergence"])
    return f"{told}; without {near['what']} {near['expected_kl_divergence']:.4f} was expected"
