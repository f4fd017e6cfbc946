"""GPTQ on every grid: round column by column, and let the columns left make up for each error.

The order of the columns is one that the files can hold without an index of groups (no ``g_idx``):
columns that share parameters stay together, and whole such spans go by falling importance, the
columns of a span too. On entering a span its parameters are fitted to the weights as they are by
then, with what earlier columns left over; K-quants' integer scales are fixed by that before a code
is chosen. Where parameters belong to whole rows (channel scales, palettes) they are those of
``scale_search``, and all columns go by falling importance. Codebook grids are rounded a word at a
time (``gptq_words.py``), and the columns of a word stay beside each other.
When all codes are chosen, each is looked at again (``compress.solvers.descent``).

``compress.solvers.hessian`` has the algebra.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from compress.calibration.statistics import LayerStats
from compress.grids import Array, CodebookGrid, Float32, Grid, LatticeGrid, Quantized
from compress.machine import in_order, worker_threads
from compress.solvers import scale_search
from compress.solvers.descent import descend
from compress.solvers.gptq_kernels import PIECE, round_piece
from compress.solvers.hessian import Factor, factors_of, output_errors
from compress.solvers.parameters import Spans, Whole

__all__ = ["gptq"]

DESCENTS = 2  # times that every code is looked at again ...
DAMPING = 0.03  # ... with this share of the diagonal's mean added to it
ROWS = 1024  # of a slab; temporaries are a few float32 matrices of so many rows
SLABS = 4  # in work at once, at most


def gptq(
    weight: Float32,
    grid: Grid,
    stats: LayerStats | None = None,
    *,
    damping: float = 0.01,
    block: int = 128,
    slab: int = ROWS,
) -> Quantized:
    """Codes of least output error, found greedily column by column.

    Rows that measure worse than those of ``scale_search``, on inputs held back from the Hessian,
    become the latter.

    Args:
        weight: float32 ``[rows, columns]``, whole or some of its rows: rows are independent, except
            those that share a palette.
        grid: any grid; one that has no parameters just rounds.
        stats: of the weight's input. Without a Hessian this is ``scale_search``.
        damping: share of the Hessian diagonal's mean that is added to the diagonal.
        block: columns whose errors are spread over all later ones at once. Speed only.
        slab: rows that are solved for at once. Memory and speed only.

    Returns:
        ``fallen``: the rows that became those of ``scale_search``; all of them where the Hessian is
        empty or not a covariance.
    """
    searched = scale_search(weight, grid, stats)
    if stats is None or stats.hessian is None or not isinstance(grid, LatticeGrid | CodebookGrid):
        return searched
    together = grid.together if isinstance(grid, CodebookGrid) else 1
    factors = factors_of(stats, grid.span, damping, together)
    if not factors:
        return replace(searched, fallen=len(weight))
    rows = len(weight)
    codes, params = searched.codes.copy(), {k: v.copy() for k, v in searched.params.items()}
    whole = grid.lattice(params) if isinstance(grid, LatticeGrid) and not grid.span else None
    decoded = searched.decode()
    fallen = []

    def solve(start: int) -> None:
        part = slice(start, min(start + slab, rows))
        fits = Spans(grid, weight.shape[1]) if whole is None else Whole(whole, rows, part)
        trial, left = round_rows(weight[part], factors, fits, block)
        for _ in range(DESCENTS):
            descend(weight[part], trial, left, fits, stats, damping=DAMPING, block=block)
        before = weight[part] - decoded[part]
        better = output_errors(left, stats) <= output_errors(before, stats)
        codes[part][better] = trial[better]
        for key, values in fits.params().items():
            params[key][part][better] = values[better]
        fallen.append(len(better) - int(better.sum()))

    # A slab has a thread to itself: its steps are thousands, each too short to be shared out.
    slabs = (partial(solve, start) for start in range(0, rows, slab))
    for _ in in_order(slabs, min(worker_threads(), SLABS), share=1):
        pass
    return Quantized(codes, params, grid, searched.shape, sum(fallen))


def round_rows(
    weight: Float32, factors: tuple[Factor, ...], fits: Whole | Spans, block: int
) -> tuple[Array, Float32]:
    """Codes, uint8 ``[rows, columns]``, and what they leave of the weight, float32 likewise."""
    codes = np.empty(weight.shape, np.uint8)
    left = np.empty(weight.shape, np.float32)
    for factor in factors:
        codes[:, factor.order], left[:, factor.order] = round_columns(
            weight[:, factor.order], factor, fits, block
        )
    return codes, left


def round_columns(
    weight: Float32, factor: Factor, fits: Whole | Spans, block: int
) -> tuple[Array, Float32]:
    """As ``round_rows``, for the columns of one factor in its order of rounding."""
    codes = np.empty(weight.shape, np.uint8)
    left = np.empty(weight.shape, np.float32)
    columns, step = weight.shape[1], fits.span or PIECE
    stride = max(block // step, 1) * step
    for first in range(0, columns, stride):
        last = min(first + stride, columns)
        shares = left[:, :first] @ factor.feedback[:first, first:last]
        for start in range(first, last, step):
            part = slice(start, min(start + step, last))
            carried = shares[:, part.start - first : part.stop - first]
            carried += left[:, first:start] @ factor.feedback[first:start, part]
            values, run = fits.enter(weight[:, part], carried, factor, part)
            metric = factor.feedback[part, part], factor.variances[part]
            round_piece(
                weight[:, part], carried, *metric, values, run, codes[:, part], left[:, part]
            )
    return codes, left
