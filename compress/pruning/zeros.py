"""Checks a target's sparsity, and the notes on formats that store zeros like other weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.errors import UnsupportedModelError, UsageError
from compress.formats import FORMATS, get_format
from compress.grids.sparse import Pattern, pattern_of
from compress.plan.shapes import Plan
from compress.recipe import Recipe

__all__ = ["check_zeros", "pattern_for", "plan_zeros"]


def pattern_for(settings: Mapping[str, Any]) -> Pattern | None:
    """The pattern of a target's or a plan's settings.

    Raises:
        GridError: a sparsity that is none.
    """
    return pattern_of(settings.get("sparsity", "none"))


def check_zeros(target: str, recipe: Recipe) -> None:
    """Refuse sparsity where it costs quality and saves no bytes.

    Raises:
        UnsupportedModelError: the format stores zeros, and the recipe does not allow that.
        UsageError: the recipe also has a budget.
        GridError: an invalid sparsity.
    """
    pattern = pattern_for(recipe.targets[target])
    if pattern is not None and recipe.budget:
        raise UsageError(
            f"a budget chooses among dense grids, and {target} asks for sparsity {pattern.name}",
            hint=f"--set targets.{target}.sparsity=none, or no budget",
        )
    if pattern is None or get_format(target).stores_zeros or recipe.allow_dense:
        return
    saving = [name for name, row in FORMATS.items() if row.stores_zeros]
    raise UnsupportedModelError(
        f"{target}: sparsity {pattern.name} would cost quality and save nothing: the format stores "
        "a zero like any other weight, and its runtime multiplies by it",
        hint=f"targets.{saving[0]}.sparsity saves bytes; --allow-dense writes it all the same",
    )


def plan_zeros(plan: Plan, settings: Mapping[str, Any]) -> Plan:
    """The plan with its sparsity in the settings, and a note where zeros are stored."""
    if pattern_for(settings) is None or get_format(plan.format).stores_zeros:
        return plan
    sparse = {key: settings[key] for key in ("sparsity", "sparsity_method") if key in settings}
    note = "the zeros of this experiment are stored like other weights: nothing is saved"
    return replace(plan, settings={**plan.settings, **sparse}, notes=(*plan.notes, note))
