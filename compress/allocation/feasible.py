"""Refuses a budget below the smallest file of a target, before any work, with a hint what would
fit. Computed from configs: no weights are read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from compress.allocation.budget import Target
from compress.allocation.choices import Rules
from compress.allocation.limits import Limit
from compress.allocation.step import limit_for, targets_of
from compress.checkpoint.checkpoint import Stored
from compress.console import format_bytes
from compress.errors import UsageError
from compress.plan.job import Job, Replan
from compress.recipe.model import Prune

__all__ = ["check_budget"]


def check_budget(job: Job, replan: Replan) -> dict[str, int]:
    """Refuse an infeasible budget.

    Args:
        job: with the recipe's budget.
        replan: makes the job with another recipe.

        Returns:
            Format → most bytes of its file within the budget; empty without a budget.

        Raises:
            UsageError: the smallest file of a target exceeds its limit; the hint has the smallest
                file of each, and what would fit.
    """
    if not job.recipe.budget:
        return {}
    pairs = limits_of(job)
    if not all(map(fits, pairs)):
        raise refusal(job, pairs, replan)
    return {target.plan.format: most_bytes(target, limit) for target, limit in pairs}


def limits_of(job: Job) -> list[tuple[Target, Limit]]:
    """Every target, after pruning, and the limit of its file."""
    shaped = job.on(Stored(job.checkpoint, job.shape)) if job.cut else job
    return [(target, limit_for(shaped, target)) for target in targets_of(shaped)]


def fits(pair: tuple[Target, Limit]) -> bool:
    """Whether any choice of grids fits the limit."""
    target, limit = pair
    return target.smallest_bytes <= limit.nbytes


def most_bytes(target: Target, limit: Limit) -> int:
    """Most bytes of a target's file: its limit, or its largest file."""
    if limit.nbytes <= target.plan.weights_bytes:  # the largest has more bytes
        return limit.nbytes
    return min(limit.nbytes, target.largest_bytes)


def refusal(job: Job, pairs: Sequence[tuple[Target, Limit]], replan: Replan) -> UsageError:
    """The error for a budget that is too small, with a hint what would fit.

    Args:
        pairs: from ``limits_of``; some do not fit.
    """
    tight = [pair for pair in pairs if not fits(pair)]
    target, limit = tight[0]
    smallest = ", ".join(f"{t.plan.format} {format_bytes(t.smallest_bytes)}" for t, _ in pairs)
    ways = [looser_rules(job, tight), fewer_blocks(job, tight, replan)]
    found = " or ".join(filter(None, ways))
    advice = f"{found} would reach the budget" if found else "neither grids nor pruning reach it"
    return UsageError(
        f"{target.plan.format}: no choice of grids fits in {format_bytes(limit.nbytes)} "
        f"({limit.nbytes:,} bytes; the smallest is {target.smallest_bytes:,})",
        hint=f"smallest feasible sizes: {smallest}; {advice}",
    )


def looser_rules(job: Job, tight: Sequence[tuple[Target, Limit]]) -> str:
    """A change of ``quantize`` with which all targets fit; empty where there is none.

    Args:
        tight: the targets that do not fit, with their limits.
    """
    recipe = job.recipe
    for rules, what in (
        (Rules((), recipe.keep), "--set quantize.candidates=auto"),
        (Rules(recipe.candidates, {}), "--set quantize.keep={}"),
        (Rules(), "--set quantize.candidates=auto --set quantize.keep={}"),
    ):
        wider = [(Target(job, target.plan, rules), target, limit) for target, limit in tight]
        if all(fits((wide, limit)) for wide, _, limit in wider):
            grids = sorted({name for wide, target, _ in wider for name in smaller(wide, target)})
            return f"{what} (a larger group or fewer bits: {', '.join(grids)})"
    return ""


def smaller(wide: Target, target: Target) -> set[str]:
    """The smallest grids of a target's tensors that the recipe's rules exclude."""
    return {
        free.options[0].grid
        for free, bound in zip(wide.choices, target.choices, strict=True)
        if free.options[0].nbytes < bound.options[0].nbytes
    }


def fewer_blocks(job: Job, tight: Sequence[tuple[Target, Limit]], replan: Replan) -> str:
    """The ``--prune`` that removes the fewest blocks, up to half, so that all targets fit; empty
    where that is not enough, or the job is already pruned.

    Args:
        tight: as ``looser_rules``.
    """
    recipe = job.recipe
    if job.cut and job.cut.method != "depth":
        return ""
    targets = {target.plan.format: recipe.targets[target.plan.format] for target, _ in tight}

    def reaches(count: int) -> bool:
        prune = Prune(method="depth", blocks=count)
        shallow = replan(recipe=recipe.model_copy(update={"targets": targets, "prune": prune}))
        return all(map(fits, limits_of(shallow)))

    most = job.config.num_hidden_layers // job.config.block_repeat // 2
    counts = range(1, most + 1)
    place = bisect_left(counts, True, key=reaches)
    return f"--prune depth:{counts[place]}" if place < len(counts) else ""
