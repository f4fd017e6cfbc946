"""GPTQ on every grid: round column by column, and let the columns left make up for each error.

The order of the columns is one that the files can hold without an index of groups (no ``g_idx``):
columns that share parameters stay together, and whole such spans go by falling importance, the
columns of a span too. On entering a span its parameters are fitted to the weights as they are by
then, with what earlier columns left over; K-quants' integer scales are fixed by that before a code
is chosen. Where parameters belong to whole rows (channel scales, palettes) they are those of
``scale_search``, and all columns go by falling importance. Codebook grids are rounded a word at a
time (``gptq_words.py``), and the columns of a word stay beside each other.

``compress.solvers.hessian`` has the algebra.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from compress.grids import (
    Array,
    Codebook,
    CodebookGrid,
    Float32,
    Grid,
    Lattice,
    LatticeGrid,
    Params,
    Quantized,
)
from compress.grids.lanes import over_rows
from compress.solvers.gptq_kernels import sweep
from compress.solvers.gptq_words import sweep_words
from compress.solvers.hessian import Factor, factors_of, output_errors
from compress.solvers.scale_search import scale_search
from compress.statistics import LayerStats

__all__ = ["gptq"]

ROWS = 2048  # worked on at a time; temporaries are a few float32 matrices of ROWS x columns
PIECE = 32  # columns rounded by one call of the kernel where no span says how many


def gptq(
    weight: Float32,
    grid: Grid,
    stats: LayerStats | None = None,
    *,
    damping: float = 0.01,
    block: int = 128,
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
    fallen = 0
    for start in range(0, rows, ROWS):
        part = slice(start, min(start + ROWS, rows))
        fits = Spans(grid, weight.shape[1]) if whole is None else Whole(whole, rows, part)
        trial, left = round_rows(weight[part], factors, fits, block)
        before = weight[part] - decoded[part]
        better = output_errors(left, stats) <= output_errors(before, stats)
        codes[part][better] = trial[better]
        for key, values in fits.params().items():
            params[key][part][better] = values[better]
        fallen += len(better) - int(better.sum())
    return Quantized(codes, params, grid, searched.shape, fallen)


class Whole:
    """Parameters of whole rows (channel scales, palettes), known before.

    Args:
        lattice: of the tensor.
        rows: of the tensor.
        part: the rows that are rounded.
    """

    span = 0

    def __init__(self, lattice: Lattice, rows: int, part: slice) -> None:
        table = np.arange(rows) * len(lattice.levels) // rows
        scale, offset = lattice.scale, lattice.offset
        if len(scale) > 1:
            scale, offset = scale[part], offset[part]
        self.lattice = Lattice(scale, offset, lattice.levels[table[part]], lattice.even)

    def enter(
        self, weight: Float32, carried: Float32, factor: Factor, part: slice
    ) -> tuple[Lattice, Array]:
        """The lattice of some columns, and the run of it that each is of."""
        return self.lattice, np.zeros(weight.shape[1], np.int64)

    def params(self) -> Params:
        """What was fitted: nothing."""
        return {}


class Spans:
    """Parameters that are fitted a span of columns at a time, when the span is entered."""

    def __init__(self, grid: LatticeGrid | CodebookGrid, columns: int) -> None:
        self.grid = grid
        self.span = grid.span
        self.fitted: list[Params] = [{}] * (columns // grid.span)

    def enter(
        self, weight: Float32, carried: Float32, factor: Factor, part: slice
    ) -> tuple[Lattice | Codebook, Array]:
        """As ``Whole.enter``, fitted to the span's weights as they are now.

        Args:
            weight: float32 ``[rows, span]``.
            carried: float32 ``[rows, span]``: errors of earlier columns times ``feedback``.
            factor: of those columns ...
            part: ... which are these of its order.
        """
        columns = factor.order[part]
        first, place = int(columns.min()), np.argsort(columns)
        # Shared out over all columns left, and not only up to each column's own turn, an error e
        # moves them by e H_sr H_rr^-1, which in terms of the factor is e U_sr U_rr^-1.
        settle = np.linalg.inv(np.triu(factor.feedback[part, part])).astype(np.float32)
        now = weight + carried @ settle
        params = self.grid.fit(now[:, place], factor.variances[part][place])
        self.fitted[first // self.span] = params
        grid = self.grid
        values = grid.lattice(params) if isinstance(grid, LatticeGrid) else grid.codebook(params)
        return values, (columns - first) * values.scale.shape[1] // self.span

    def params(self) -> Params:
        """What was fitted, joined along the columns."""
        names = self.fitted[0]
        return {name: np.concatenate([p[name] for p in self.fitted], axis=1) for name in names}


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
            round_piece(
                weight[:, part], carried, factor, part, values, run, codes[:, part], left[:, part]
            )
    return codes, left


def round_piece(
    weight: Float32,
    carried: Float32,
    factor: Factor,
    part: slice,
    values: Lattice | Codebook,
    run: Array,
    codes: Array,
    left: Float32,
) -> None:
    """The kernel, over all rows; fills ``codes`` and ``left``."""
    feedback = np.ascontiguousarray(factor.feedback[part, part])
    variances, scale = factor.variances[part], values.scale

    def sweep_lattice(begin: int, end: int) -> None:
        assert isinstance(values, Lattice)
        offset, levels, even = values.offset, values.levels, values.even
        sweep(weight, carried, feedback, run, scale, offset, levels, even, begin, end, codes, left)

    def sweep_codebook(begin: int, end: int) -> None:
        assert isinstance(values, Codebook)
        book, even = (values.levels, values.starts, values.partners), values.even
        sweep_words(
            weight, carried, feedback, variances, run, scale, book, even, begin, end, codes, left
        )

    over_rows(sweep_lattice if isinstance(values, Lattice) else sweep_codebook, len(weight))
