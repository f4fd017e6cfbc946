"""The transforms of a recipe's targets: sparsity and folds; most recipes have none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compress.plan.transform import Changed, Transform, Transforms

if TYPE_CHECKING:
    from compress.checkpoint.sources import Source
    from compress.console import Console
    from compress.grids.sparse import Pattern
    from compress.plan.shapes import Plan
    from compress.recipe import Recipe

__all__ = ["transforms_of"]


def transforms_of(recipe: Recipe) -> Transforms:
    """The transforms of each target's weights, from the recipe.

    Raises:
        UnsupportedModelError, UsageError, GridError: see ``compress.pruning.zeros.check_zeros``.
    """
    found: dict[str, list[Transform]] = {}
    for target, settings in recipe.targets.items():
        if settings.get("sparsity", "none") != "none":
            from compress.pruning.zeros import check_zeros, pattern_for
            from compress.recipe import method_of

            check_zeros(target, recipe)
            pattern = pattern_for(settings)
            if pattern is not None:
                method = str(method_of(settings))
                found.setdefault(target, []).append(Zeros(pattern, method, settings))
        if recipe.folds:
            found.setdefault(target, []).append(Fold(recipe))
    return found


class Zeros(Transform):
    """Sets weights of the blocks' linears to zero (``sparse.py``).

    Args:
        pattern: number of nonzero weights in a row.
        method: ``magnitude``, ``wanda`` or ``sparsegpt``.
        settings: the target's.
    """

    def __init__(self, pattern: Pattern, method: str, settings: Mapping[str, Any]) -> None:
        from compress.recipe import MASK_NEEDS

        self._pattern, self._method, self._settings = pattern, method, settings
        self.needs = MASK_NEEDS.get(method, "")

    def planned(self, plan: Plan) -> Plan:
        """See ``Transform.planned``."""
        from compress.pruning.zeros import plan_zeros

        return plan_zeros(plan, self._settings)

    def apply(
        self,
        plan: Plan,
        source: Source,
        statistics: Any,
        windows: Callable[[], Sequence[Sequence[int]]],
        console: Console,
    ) -> Changed:
        """See ``Transform.apply``."""
        from compress.pruning.sparse import Sparsified

        note = f"zeros chosen by {self._method} ({self._pattern.name}) in the blocks' linears"
        changed = Sparsified(source, statistics, self._pattern, self._method)
        return Changed(changed, statistics, note)


class Fold(Transform):
    """Folds channel scales searched for the target's grids (``compress.solvers.awq``).

    Args:
        recipe: its solver is used to evaluate the scales.
    """

    needs = "hessian"

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def apply(
        self,
        plan: Plan,
        source: Source,
        statistics: Any,
        windows: Callable[[], Sequence[Sequence[int]]],
        console: Console,
    ) -> Changed:
        """See ``Transform.apply``.

        Raises:
            UsageError: no statistics.
        """
        from compress.errors import UsageError
        from compress.solvers.awq import search
        from compress.solvers.folding import Folded, fold_statistics

        if statistics is None:
            raise UsageError("quantize.fold needs a solver that looks at inputs")
        recipe = self._recipe
        with console.progress(f"fold {plan.format} {plan.type_name}", "blocks") as update:
            found = search(
                source,
                statistics,
                plan,
                recipe.solver,
                length=len(windows()[0]),
                progress=update,
            )
        statistics.forget()  # the folded ones are used from here on
        folded = fold_statistics(source.config, statistics, found.folds)
        return Changed(Folded(source, found.folds), folded, found.note())
