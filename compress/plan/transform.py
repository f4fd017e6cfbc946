"""Changes of a target's weights that a recipe asks for, before they are quantized; usually none.

``compress.pruning.transforms`` makes them from a recipe. Plans and writers go through the list and
ask for none of them by name.
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
    """What a transform makes of a target.

    Attributes:
        source: the weights.
        statistics: of the inputs that they have then (``compress.calibration.statistics``).
        note: a line for the report.
    """

    source: Source
    statistics: Any
    note: str


class Transform:
    """One change of the weights of one target.

    Attributes:
        needs: of the statistics of inputs: ``importance``, ``hessian`` or nothing.
    """

    needs: str = ""

    def planned(self, plan: Plan) -> Plan:
        """The plan with what the report should say of it."""
        return plan

    def apply(
        self,
        plan: Plan,
        source: Source,
        statistics: Any,
        windows: Callable[[], Sequence[Sequence[int]]],
        console: Console,
    ) -> Changed:
        """The weights after it; they have the shapes that they had.

        Args:
            plan: of the target.
            source: as the transforms before it leave the weights.
            statistics: of their inputs.
            windows: the calibration texts as token ids.
            console: for progress.
        """
        raise NotImplementedError


Transforms = Mapping[str, Sequence[Transform]]
"""Format → the transforms of its target, in their order; empty for most recipes."""
