"""Changes that a recipe makes to a target's weights before they are quantized; usually none.

``compress.pruning.transforms`` makes them from a recipe. Plans and writers apply the list and know
none of them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.checkpoint.sources import Source
from compress.plan.shapes import Plan

if TYPE_CHECKING:
    from compress.console import Console

__all__ = ["Changed", "Transform", "Transforms"]


@dataclass(frozen=True)
class Changed:
    """The result of a transform.

    Attributes:
        source: the changed weights.
        statistics: of their inputs after the change (``compress.calibration.statistics``).
        note: a line for the report.
    """

    source: Source
    statistics: Any
    note: str


class Transform:
    """A change of one target's weights.

    Attributes:
        needs: input statistics that it uses: ``importance``, ``hessian`` or none.
    """

    needs: str = ""

    def planned(self, plan: Plan) -> Plan:
        """The plan with a note of the transform for the report."""
        return plan

    def apply(
        self,
        plan: Plan,
        source: Source,
        statistics: Any,
        windows: Callable[[], Sequence[Sequence[int]]],
        console: Console,
    ) -> Changed:
        """Apply the transform; the weights keep their shapes.

        Args:
            plan: of the target.
            source: the weights after the transforms before it.
            statistics: of their inputs.
            windows: the calibration texts as token ids.
            console: for progress.
        """
        raise NotImplementedError


Transforms = Mapping[str, Sequence[Transform]]
"""Format → the transforms of its target, in their order; empty for most recipes."""
