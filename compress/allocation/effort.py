"""How much is measured before grids are chosen: all that the recipe has of a small model, a sample
of a large one, whose plan shall take minutes too.

A large model's inputs are known by their mean squares on a few windows; its codes are those of
``scale_search`` where the recipe says ``gptq``, which leaves less of every error but ranks tensors
and grids alike; and what pruning costs is looked at once, without the update of what stays
(``compress.pruning.glance``). On the demo model the mixes so chosen measure as well as those of the
full table (docs/budgets.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.arch import DecoderConfig
from compress.solvers import NEEDS

__all__ = ["Effort", "effort_for"]

LARGE = 300_000_000  # parameters, from which on a sample has to do


@dataclass(frozen=True)
class Effort:
    """What a cost table is measured with.

    Attributes:
        solver: that chooses the codes.
        tokens: of the calibration texts that statistics are from; 0: all of them.
        noisy: tokens that noise walks with, at most.
        sample: weights of a tensor that are tried on every grid.
        sampled: whether this is less than the recipe has.
    """

    solver: str
    tokens: int
    noisy: int
    sample: int
    sampled: bool


def effort_for(config: DecoderConfig, solver: str) -> Effort:
    """The effort for a model.

    Args:
        config: the float model, whatever is pruned of it: shapes of one model compare.
        solver: the recipe's.
    """
    if config.num_parameters < LARGE:
        return Effort(solver, tokens=0, noisy=1024, sample=1 << 19, sampled=False)
    light = "scale_search" if NEEDS.get(solver) == "hessian" else solver
    return Effort(light, tokens=1024, noisy=256, sample=1 << 18, sampled=True)
