"""Which targets store zeros as nothing, and what is told of those that do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.errors import UnsupportedModelError, UsageError
from compress.grids.sparse import Pattern, pattern_of
from compress.plan.shapes import Plan
from compress.recipe import Recipe

__all__ = ["METHOD", "check_zeros", "method_of", "pattern_for", "plan_zeros"]

METHOD = "sparsegpt"  # where the recipe names none
STORES_ZEROS = ("coreml",)


def pattern_for(settings: Mapping[str, Any]) -> Pattern | None:
    """The pattern of a target's or a plan's settings.

    Raises:
        GridError: a sparsity that is none.
    """
    return pattern_of(settings.get("sparsity", "none"))


def method_of(settings: Mapping[str, Any]) -> str | None:
    """How the zeros of a target are chosen; None where there are none."""
    return settings.get("sparsity_method", METHOD) if pattern_for(settings) else None


def check_zeros(target: str, recipe: Recipe) -> None:
    """Refuse zeros where they cost quality and save nothing.

    Raises:
        UnsupportedModelError: the format stores every zero, and the recipe does not allow that.
        UsageError: a budget, too; or columns that are to change places, and zeros that count on
            their neighbours.
        GridError: a sparsity that is none.
    """
    pattern = pattern_for(recipe.targets[target])
    if pattern is not None and recipe.budget:
        raise UsageError(
            f"a budget chooses among dense grids, and {target} asks for sparsity {pattern.name}",
            hint=f"--set targets.{target}.sparsity=none, or no budget",
        )
    if pattern is not None and pattern.of and recipe.permute:
        raise UsageError(
            f"quantize.permute would break {target}'s {pattern.name}: it moves columns",
            hint="--set quantize.permute=false, or a share such as 0.5",
        )
    if pattern is None or target in STORES_ZEROS or recipe.allow_dense:
        return
    raise UnsupportedModelError(
        f"{target}: sparsity {pattern.name} would cost quality and save nothing: the format stores "
        "a zero like any other weight, and its runtime multiplies by it",
        hint="targets.coreml.sparsity saves bytes; --allow-dense writes it all the same",
    )


def plan_zeros(plan: Plan, settings: Mapping[str, Any]) -> Plan:
    """The plan with what the target's weights need, and a line where zeros are stored."""
    if pattern_for(settings) is None or plan.format in STORES_ZEROS:
        return plan
    kept = {key: settings[key] for key in ("sparsity", "sparsity_method") if key in settings}
    note = "the zeros of this experiment are stored like other weights: nothing is saved"
    return replace(plan, settings={**plan.settings, **kept}, notes=(*plan.notes, note))
