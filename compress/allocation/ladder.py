"""The pruned shapes of one target that a budget weighs against lower bits: two chains, from what
goes first to what goes last. Arithmetic on configs; nothing is read.

    ffn     shares of every MLP, in the multiples that the target's grids need
    depth   one block, two, … up to half of them

Along a chain each shape is part of the one before it, so the divergence from the float model rises.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from compress.allocation.budget import Target, infeasible
from compress.allocation.limits import Limit
from compress.allocation.step import GetExporter, limit_for, targets_of
from compress.checkpoint.checkpoint import Checkpoint
from compress.checkpoint.sources import Stored
from compress.decoder.config import DecoderConfig
from compress.errors import UsageError
from compress.plan.job import Job, prepare
from compress.plan.shapes import Plan
from compress.pruning.cut import width_step
from compress.recipe import Recipe

__all__ = ["Ladder", "Replan", "Rung", "check_budget", "replanner", "settings_of"]

SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)  # of the MLP channels


class Replan(Protocol):
    """The job of the same command with other grids, or by another recipe."""

    def __call__(
        self,
        choices: Mapping[str, Mapping[str, str]] | None = None,
        recipe: Recipe = ...,
    ) -> Job:
        """``choices``: format → entry name → grid."""
        ...


def replanner(
    checkpoint: Checkpoint,
    recipe: Recipe,
    get_exporter: GetExporter,
    context: int | None,
    command: str = "",
) -> Replan:
    """``compress.plan.job.prepare`` of one command; arguments and errors as there."""

    def prepared(
        choices: Mapping[str, Mapping[str, str]] | None = None, recipe: Recipe = recipe
    ) -> Job:
        return prepare(
            checkpoint, recipe, get_exporter, context=context, command=command, choices=choices
        )

    return prepared


@dataclass(frozen=True)
class Rung:
    """One shape of one target, before any work.

    Attributes:
        job: of this target alone, planned in this shape; its source is the whole model.
        target: what there is to choose in it.
        limit: bytes that its file may have; a smaller KV cache leaves more of a memory budget.
    """

    job: Job
    target: Target
    limit: Limit

    @property
    def fits(self) -> bool:
        """Whether any choice of grids does."""
        return self.target.smallest_bytes <= self.limit.nbytes

    @property
    def what(self) -> str:
        """``64 of 768 MLP channels in every layer``, or ``nothing``."""
        return self.job.cut.describe() if self.job.cut else "nothing"


class Ladder:
    """The rungs of one target.

    Args:
        job: of all targets, unpruned.
        plan: of the target.
        get_exporter: format → its exporter.
        prepare: the command's job by another recipe.
    """

    def __init__(self, job: Job, plan: Plan, get_exporter: GetExporter, prepare: Replan) -> None:
        self._recipe, self._config, self._plan = job.recipe, job.config, plan
        self._get_exporter, self._prepare = get_exporter, prepare

    @cached_property
    def unpruned(self) -> Rung:
        """The whole model."""
        return self.rung({"method": "none"})

    def chains(self) -> Iterator[Iterator[Rung]]:
        """The pruned shapes; a rung is made when it is asked for."""
        for chain in settings_of(self._config, self._plan):
            yield map(self.rung, chain)

    def rung(self, prune: Mapping[str, Any]) -> Rung:
        """The target with this in the place of the recipe's ``prune``."""
        name = self._plan.format
        job = self._prepare(recipe=alone(self._recipe, name, prune))
        shaped = job.on(Stored(job.checkpoint, job.shape))
        (target,) = targets_of(shaped, self._get_exporter)
        return Rung(job, target, limit_for(shaped, target))

    def roomiest(self) -> Limit:
        """The limit of the rung that leaves most to the file: at the end of a chain the cache, or
        the activations, are smallest.
        """
        ends = [self.rung(chain[-1]) for chain in settings_of(self._config, self._plan) if chain]
        return max((rung.limit for rung in [self.unpruned, *ends]), key=lambda limit: limit.nbytes)

    def alone(self, rung: Rung) -> Replan:
        """``prepare`` for a rung's job with other grids."""

        def prepared(
            choices: Mapping[str, Mapping[str, str]] | None = None,
            recipe: Recipe = rung.job.recipe,
        ) -> Job:
            return self._prepare(choices, recipe)

        return prepared

    def helps(self) -> bool:
        """Whether any pruned shape fits."""
        return any(rung.fits for chain in self.chains() for rung in chain)


def alone(recipe: Recipe, name: str, prune: Mapping[str, Any]) -> Recipe:
    """The recipe for one target, with another ``prune``."""
    return replace(recipe, prune=prune, targets={name: recipe.targets[name]})


def settings_of(config: DecoderConfig, plan: Plan) -> list[list[dict[str, Any]]]:
    """The recipe's ``prune`` of every rung, by chain."""
    total, step = config.intermediate_size, width_step(config, [plan])
    widths = dict.fromkeys(step * round((1 - share) * total / step) for share in SHARES)
    blocks = config.num_hidden_layers // config.block_repeat
    return [
        [{"method": "ffn", "width": width} for width in widths if 0 < width < total],
        [{"method": "depth", "blocks": count} for count in range(1, blocks // 2 + 1)],
    ]


def check_budget(job: Job, get_exporter: GetExporter, prepare: Replan) -> dict[str, int]:
    """Refuse an infeasible budget before any work.

    Returns:
        Format → bytes that the budget lets its file have at most; empty where there is none.

    Raises:
        UsageError: the smallest file of some target is more than its limit, pruned too where the
            recipe lets the budget prune.
    """
    if not job.recipe.budget:
        return {}
    shaped = job.on(Stored(job.checkpoint, job.shape)) if job.cut else job
    pairs = [(target, limit_for(shaped, target)) for target in targets_of(shaped, get_exporter)]
    refusal = infeasible([(target, limit.nbytes) for target, limit in pairs])
    if refusal is not None:
        check_pruned(job, refusal, pairs, get_exporter, prepare)
    if job.recipe.weighs:
        plans = [target.plan for target, _ in pairs]
        ladders = [Ladder(job, plan, get_exporter, prepare) for plan in plans]
        pairs = [(t, ladder.roomiest()) for (t, _), ladder in zip(pairs, ladders, strict=True)]
    return {target.plan.format: most_bytes(target, limit) for target, limit in pairs}


def check_pruned(
    job: Job,
    refusal: UsageError,
    pairs: Sequence[tuple[Target, Limit]],
    get_exporter: GetExporter,
    prepare: Replan,
) -> None:
    """Refuse what does not fit with pruning either, or may not be pruned.

    Args:
        refusal: of the unpruned targets.
        pairs: those targets and their limits; the others are as in ``check_budget``.
    """
    if job.cut:
        raise refusal
    tight = [target for target, limit in pairs if target.smallest_bytes > limit.nbytes]
    for target in tight:
        if not Ladder(job, target.plan, get_exporter, prepare).helps():
            if job.recipe.weighs:
                name = target.plan.format
                hint = f"{refusal.hint}; {name} does not fit with half of its MLPs or blocks either"
                raise UsageError(str(refusal), hint=hint)
            raise refusal
    if not job.recipe.weighs:
        hint = f"{refusal.hint}; --prune auto would make it fit, by pruning"
        raise UsageError(str(refusal), hint=hint)


def most_bytes(target: Target, limit: Limit) -> int:
    """Bytes of a target's file at most: the limit's, or those of its largest file."""
    if limit.nbytes <= target.plan.weights_bytes:  # the largest has more; saves planning it
        return limit.nbytes
    return min(limit.nbytes, target.largest_bytes)
