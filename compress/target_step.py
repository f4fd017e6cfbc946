"""The step of a build that each target has for itself: what it is made of.

Targets share the job's source and its statistics unless one of them has weights of its own
(``Job.sources``). Changes that go by statistics and belong to one target stand here, between the
statistics and the writing.
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.calibration_step import CalibrationStep
from compress.console import Console
from compress.errors import UsageError
from compress.folding import Folded, fold_statistics
from compress.model import Plan
from compress.sources import Source
from compress.statistics import Statistics


@dataclass(frozen=True)
class TargetInputs:
    """What one target is written from.

    Attributes:
        source: its weights.
        statistics: of the inputs that those weights have; None where the solver needs none.
        notes: lines for the report about this target.
    """

    source: Source
    statistics: Statistics | None
    notes: tuple[str, ...] = ()


def prepare_target(plan: Plan, calibration: CalibrationStep, console: Console) -> TargetInputs:
    """Source and statistics of a target, just before it is written.

    Args:
        plan: of the target.
        calibration: of the job.
        console: for progress.

    Raises:
        PacklightError: see ``CalibrationStep.gather``.
    """
    source = calibration.job.source_of(plan)
    inputs = TargetInputs(source, calibration.gather(source, plan))
    return fold(plan, inputs, calibration, console) if calibration.job.recipe.folds else inputs


def fold(
    plan: Plan, inputs: TargetInputs, calibration: CalibrationStep, console: Console
) -> TargetInputs:
    """Scales and orders of channels that suit the target's grids (``compress.solvers.awq``)."""
    from compress.solvers.awq import search

    if inputs.statistics is None:
        raise UsageError("quantize.fold and quantize.permute need a solver that looks at inputs")
    recipe, config = calibration.job.recipe, inputs.source.config
    with console.progress(f"fold {plan.format} {plan.type_name}", "blocks") as update:
        found = search(
            inputs.source,
            inputs.statistics,
            plan,
            recipe.solver,
            scale=recipe.fold == "awq",
            order=recipe.permute,
            length=calibration.window_length,
            progress=update,
        )
    return TargetInputs(
        Folded(inputs.source, found.folds),
        fold_statistics(config, inputs.statistics, found.folds),
        (*inputs.notes, found.note()),
    )
