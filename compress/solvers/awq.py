"""AWQ: searches scales that lower the rounding error, for attention and MLP of each block and the
head.

AWQ (Lin et al., arXiv 2306.00978): a column whose input is large is multiplied by ``s > 1`` before
it is rounded, and its input divided by ``s``: its error shrinks, at the cost of those that share
its scale. ``s`` is the input's root mean square to the power of α, or that over the column's
largest magnitude to the power of 1 - α. ``folding.py`` lists where that is exact.

α is chosen for the least output error of the weights that multiply the input, estimated on some of
their rows (``Estimate``). The choice is then checked on inputs that were held back from the
Hessian: the half block is run with the codes of the recipe's solver, and a scale is kept only if
the output error falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from compress.calibration.statistics import LayerStats, Statistics, input_of
from compress.checkpoint.sources import Source
from compress.decoder.config import DecoderConfig, Float32
from compress.grids import CodebookGrid, Grid, LatticeGrid, get_grid
from compress.plan.shapes import Plan
from compress.recipe import needs_of
from compress.solvers import scale_search
from compress.solvers.folding import Folds, columns_of, foldable
from compress.solvers.half_blocks import HalfTrial, HeadTrial, Trial, halves, some_rows
from compress.solvers.hessian import factors_of, output_errors

__all__ = ["Found", "search"]

ALPHAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8)
SAMPLE = 512  # rows of a weight that α is chosen on
MARGIN = 0.01  # share by which an error must fall
DAMPING = 0.01  # as gptq's
SMALLEST = 1e-4  # of the largest scale of an input


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        folds: the scales.
        errors: on held-back inputs, before and after: the relative output error of every half
            block, the KL divergence of the head.
    """

    folds: Folds
    errors: tuple[tuple[float, float], ...]

    def note(self) -> str:
        """The report line with the folds and their effect."""
        ratios = [max(after / before, 1e-9) if before else 1.0 for before, after in self.errors]
        drop = 1 - math.exp(sum(map(math.log, ratios)) / max(len(ratios), 1))
        return (
            f"Before rounding, the channels of {len(self.folds)} inputs were rescaled, which "
            f"leaves the float model as it is: output error {100 * drop:.1f} % less, the mean of "
            f"{len(ratios)} parts on inputs held back from calibration"
        )


def search(
    source: Source,
    statistics: Statistics,
    plan: Plan,
    solver: str,
    *,
    length: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """Search the folds of one target, half a block in memory at a time.

    Args:
        source: the weights.
        statistics: of their inputs, with Hessians and held-back inputs.
        plan: the target's grids.
        solver: name of the recipe's solver.
        length: tokens of a calibration window; whole windows were held back.
        progress: ``progress(done, total)`` in stored blocks.

    Raises:
        UsageError: no inputs were held back.
    """
    config = source.config
    folds: dict[str, Float32] = {}
    errors = []
    rounded = {
        entry.name: get_grid(entry.grid)
        for entry in plan.entries
        if input_of(config, entry.name) and 8 * entry.nbytes < 16 * math.prod(entry.shape)
    }
    stored = range(0, config.num_hidden_layers, config.block_repeat)
    for done, block in enumerate(stored, start=1):
        entries = {n: grid for n, grid in rounded.items() if n.startswith(f"blocks.{block}.")}
        for half in halves(config, block):
            if not any(input_of(config, name) in half.sites for name in entries):
                continue  # all of it stays float
            trial = HalfTrial(source, statistics, half, entries, solver, length)
            errors.append(improve(trial, folds))
        progress(done, len(stored))
    if not config.tie_word_embeddings and "lm_head.weight" in rounded:
        head = HeadTrial(source, statistics, rounded["lm_head.weight"], solver)
        errors.append(improve(head, folds))
    return Found(folds, tuple(errors))


def improve(trial: Trial, folds: dict[str, Float32]) -> tuple[float, float]:
    """Add to ``folds`` the scales that lower the error of a half block or the head; returns the
    error before and after."""
    accepted: dict[str, Float32] = {}
    before = best = trial.error(accepted)
    for site in trial.sites:
        scale = propose_scale(trial, site)
        if scale is None:
            continue
        error = trial.error({**accepted, site: scale})
        if error < best * (1 - MARGIN):
            best, accepted[site] = error, scale
    folds |= accepted
    return before, best


# --- what is tried ----------------------------------------------------------------------------


def propose_scale(trial: Trial, site: str) -> Float32 | None:
    """The scale of the best α, float32 ``[channels]``; None where no scale is better or allowed."""
    if not trial.entries_of(site) or not foldable(trial.source.config, site):
        return None
    estimate = Estimate(trial, site)
    if not estimate.sizes.any():  # an input of zeros, from weights that are zero
        return None
    least, found = estimate.cost(None), None
    for power in ALPHAS:
        for widths in (np.float32(1), estimate.widths ** (1 - power)):
            scale = normalized(estimate.sizes**power / widths)
            cost = estimate.cost(scale)
            if cost < least:
                least, found = cost, scale
    return found


class Estimate:
    """Estimates the output error of one input's weights under a scale, from some of their rows.

    Codes are those of ``scale_search``, and the error is ``tr(E H Eᵀ)``. That is a poor estimate
    for ``gptq``, which compensates one column's error in others. There each column is weighted by
    its conditional variance, given the columns rounded after it (``D`` of
    ``compress.solvers.hessian``), which is the cost of rounding one column in gptq.

    Attributes:
        sizes: root mean square (gptq: conditional) of each channel, float32 ``[channels]``.
        widths: largest magnitude of the weights that multiply it, float32 ``[channels]``.
    """

    def __init__(self, trial: Trial, site: str) -> None:
        self._config, self._site = trial.source.config, site
        stats = trial.stats(site)
        self._weights = [
            (some_rows(trial.source, name, grid, SAMPLE), grid)
            for name, grid in trial.entries_of(site)
        ]
        self._stats = replace(stats, held_back=None)  # ``output_errors`` then uses the Hessian
        self._diagonal = None
        if needs_of(trial.solver) == "hessian":
            self._diagonal = left_over(stats, self._weights[0][1])
        variances = stats.importance if self._diagonal is None else self._diagonal
        largest = np.max([np.abs(weight).max(axis=0) for weight, _ in self._weights], axis=0)
        self.sizes = by_channel(self._config, site, np.sqrt(variances))
        self.widths = np.maximum(by_channel(self._config, site, largest), np.float32(1e-12))

    def cost(self, scale: Float32 | None) -> float:
        """The estimated error under ``scale``, float32 ``[channels]``; None: all 1."""
        one = np.ones(1, np.float32)
        columns = one if scale is None else columns_of(self._config, self._site, scale)
        total = 0.0
        for weight, grid in self._weights:
            scaled = weight * columns
            if self._diagonal is None:
                shares = self._stats.importance / columns**2
                codes = scale_search(scaled, grid, LayerStats(self._stats.count, shares))
                total += output_errors((scaled - codes.decode()) / columns, self._stats).sum()
            else:
                codes = grid.quantize(scaled, self._diagonal / columns**2)
                total += (((scaled - codes.decode()) / columns) ** 2 @ self._diagonal).sum()
        return float(total)


def left_over(stats: LayerStats, grid: Grid) -> Float32:
    """Conditional variance of each input, given those that gptq rounds after it, float32
    ``[columns]``."""
    span = grid.span if isinstance(grid, LatticeGrid | CodebookGrid) else 0
    together = grid.together if isinstance(grid, CodebookGrid) else 1
    variances = stats.importance.copy()
    for factor in factors_of(stats, span, DAMPING, together):
        variances[factor.order] = factor.variances
    return variances


def by_channel(config: DecoderConfig, site: str, values: Float32) -> Float32:
    """Reduce columns to channels: the maximum over the query heads that share a key-value head."""
    if not site.endswith("o_proj"):
        return values
    grouped = values.reshape(config.num_key_value_heads, -1, config.head_dim)
    channels: Float32 = grouped.max(axis=1).reshape(-1)
    return channels


def normalized(scale: Float32) -> Float32:
    """The scale with 1 as the geometric mean of its extremes, as in AWQ; no entry is below
    ``SMALLEST`` times the largest."""
    scale = np.maximum(scale, scale.max() * SMALLEST)
    centred: Float32 = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
    return centred
