"""How much is measured before grids are chosen: everything for a small model, a sample for a large
one, so that its plan also takes minutes.

A large model's input statistics are importance on a few windows. Where the recipe has ``gptq``, its
codes are those of ``scale_search``, and their errors are multiplied by one factor for what ``gptq``
leaves: that changes the expected divergence, but no choice. Its effect on the demo model is in
docs/budgets.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.decoder.config import DecoderConfig
from compress.recipe import BUILTIN_SOLVERS, needs_of

__all__ = ["Effort", "effort_for"]

GPTQ_LEAVES = 0.28  # of scale_search's output error: median of all tensors and grids of the demo
LARGE = 50_000_000  # parameters from which on only a sample is measured
HUGE = 1_000_000_000  # ... and a smaller one


@dataclass(frozen=True)
class Effort:
    """The settings of a cost table's measurement.

    Attributes:
        solver: that chooses the codes.
        tokens: of the calibration texts for input statistics; 0: all.
        scored: most tokens for sensitivities.
        sample: weights of a tensor that are quantized on every grid.
        left: factor of the errors.
    """

    solver: str
    tokens: int
    scored: int
    sample: int
    left: float


def effort_for(config: DecoderConfig, solver: str, large: int = LARGE) -> Effort:
    """The effort for a model.

    Args:
        config: the unpruned float model.
        solver: the recipe's. Costs are cached on disk by the solver's name, so for a solver of
            another package, whose code may change under its name, packlight's nearest is used.
        large: parameters from which on only a sample is measured.
    """
    if solver not in BUILTIN_SOLVERS:
        solver = "scale_search" if needs_of(solver) else "rtn"
    if config.num_parameters < large:
        return Effort(solver, tokens=0, scored=1024, sample=1 << 19, left=1.0)
    second = needs_of(solver) == "hessian"
    light, left = ("scale_search", GPTQ_LEAVES) if second else (solver, 1.0)
    tokens, scored = (2048, 512) if config.num_parameters < HUGE else (1024, 256)
    return Effort(light, tokens=tokens, scored=scored, sample=1 << 18, left=left)
