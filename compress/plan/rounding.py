"""What rounding to nearest costs a model, as far as it is known before any weight is read."""

from __future__ import annotations

from math import prod

from compress.decoder.config import split_name
from compress.errors import UsageError
from compress.grids import get_grid
from compress.plan.job import Job
from compress.plan.shapes import Plan, bits_per_weight

__all__ = ["HURT", "check_palettes", "warn_of_rounding"]

HURT = range(50 * 10**6, 10**9)
"""Parameters of models, trained on trillions of tokens, that lose much by rounding to four bits.
Below are toys, and larger models bear more (``docs/recipes.md`` has what was measured)."""
FEW_BITS = 5.25  # per weight of the blocks: SmolLM2-135M's Q4_K_M has 5.5, and passes


def check_palettes(job: Job) -> None:
    """Refuse palettes of up to four bits where the solver uses no input statistics: rows that share
    one have no scale for a channel with large inputs. (Six bits on SmolLM2-135M: KL 0.022.)

    Raises:
        UsageError: a plan has a palette.
    """
    for plan in job.plans:
        for entry in plan.entries:
            grid = get_grid(entry.grid) if len(entry.shape) == 2 else None
            if grid and grid.group_rows != 1 and grid.bits <= 4:
                raise UsageError(
                    f"{plan.format}: {entry.grid} by {job.recipe.solver}, without calibration, "
                    "spoils a real model (SmolLM2-135M: KL divergence 2.8, by gptq 0.16)",
                    hint="--set quantize.solver=gptq; --force builds it anyway",
                )


def bits_of_blocks(plan: Plan) -> float:
    """Bits per weight of the blocks' matrices: an embedding of eight bits, most of the weights of
    Gemma 3 270M, hides how few they have.
    """
    entries = [e for e in plan.entries if split_name(e.name)[0] is not None and len(e.shape) > 1]
    return bits_per_weight(sum(e.nbytes for e in entries), sum(prod(e.shape) for e in entries))


def warn_of_rounding(job: Job) -> None:
    """Warn where the job's solver uses no calibration, for models and sizes that it does not suit.

    Args:
        job: its checkpoint gets the warning.
    """
    size = job.config.num_parameters
    few = [plan.format for plan in job.plans if bits_of_blocks(plan) < FEW_BITS]
    if size in HURT and few:
        job.checkpoint.warn(
            f"{', '.join(few)}: {job.recipe.solver} without calibration is not enough for many "
            f"models of {size / 1e6:,.0f} million parameters (SmolLM2-135M by int4-g32: KL "
            "divergence 0.20, top-1 79 %; by gptq 0.065, 89 %); -r phone-4bit chooses codes by "
            "calibration"
        )
