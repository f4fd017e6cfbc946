"""The step of a build that each target has for itself: what it is made of.

Targets share the job's source and its statistics unless one of them has weights of its own
(``Job.sources``). Changes that go by statistics and belong to one target stand here, between the
statistics and the writing.
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.calibration_step import CalibrationStep
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


def prepare_target(plan: Plan, calibration: CalibrationStep) -> TargetInputs:
    """Source and statistics of a target, just before it is written.

    Args:
        plan: of the target.
        calibration: of the job.

    Raises:
        PacklightError: see ``CalibrationStep.gather``.
    """
    source = calibration.job.source_of(plan)
    return TargetInputs(source, calibration.gather(source, plan))
