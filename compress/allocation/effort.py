"""How much is measured before grids are chosen: all that the recipe has of a small model, a sample
of a large one, whose plan shall take minutes too.

A large model's inputs are known by their mean squares on a few windows. Where the recipe says
``gptq``, its codes are those of ``scale_search``, and one share of all their errors is taken for
what ``gptq`` leaves: that moves expectations, and no choice. What that is worth on
the demo model: docs/budgets.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.decoder.config import DecoderConfig
from compress.recipe import BUILTIN_SOLVERS, needs_of

__all__ = ["Effort", "effort_for"]

GPTQ_LEAVES = 0.28  # of scale_search's output error: median of all tensors and grids of the demo
LARGE = 300_000_000  # parameters, from which on a sample has to do


@dataclass(frozen=True)
class Effort:
    """What a cost table is measured with.

    Attributes:
        solver: that chooses the codes.
        tokens: of the calibration texts that statistics are from; 0: all of them.
        noisy: tokens that noise walks with, at most.
        sample: weights of a tensor that are tried on every grid.
        left: share of the errors that counts.
    """

    solver: str
    tokens: int
    noisy: int
    sample: int
    left: float


def effort_for(config: DecoderConfig, solver: str, large: int = LARGE) -> Effort:
    """The effort for a model.

    Args:
        config: the float model, whatever is pruned of it.
        solver: the recipe's. Costs are cached on disk by the solver's name, so one of another
            package, whose code may change under its name, is measured as our nearest.
        large: parameters, from which on a sample has to do.
    """
    if solver not in BUILTIN_SOLVERS:
        solver = "scale_search" if needs_of(solver) else "rtn"
    if config.num_parameters < large:
        return Effort(solver, tokens=0, noisy=1024, sample=1 << 19, left=1.0)
    second = needs_of(solver) == "hessian"
    light, left = ("scale_search", GPTQ_LEAVES) if second else (solver, 1.0)
    return Effort(light, tokens=1024, noisy=256, sample=1 << 18, left=left)
