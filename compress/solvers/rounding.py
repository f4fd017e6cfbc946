"""Rounds columns in sequence, each corrected for the errors of those before it; and the grid
parameters they are rounded with: fitted span by span, or chosen before.

Rows are the SIMD lanes (see ``compress.grids.lanes``), so that a row's codes depend neither on its
neighbours nor on the number of threads.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from compress.grids import (
    Array,
    Codebook,
    CodebookGrid,
    Float32,
    Lattice,
    LatticeGrid,
    Params,
)
from compress.grids.lanes import LANES, f4, inverse_of, kernel, over_rows
from compress.solvers.gptq_words import sweep_words
from compress.solvers.hessian import Factor

__all__ = ["PIECE", "Spans", "Whole", "round_piece"]

PIECE = 32  # columns rounded by one call of the kernel where the grid has no spans
PANEL = 8  # columns whose errors are added to later ones together
FACTORS = (0.5, 2.0)  # least and largest factor by which parameters may be scaled at once
LARGEST = np.float32(65504)  # of float16


class Whole:
    """Parameters of whole rows (channel scales, palettes), chosen before rounding.

    Args:
        lattice: of the tensor.
        rows: of the tensor.
        part: the rows that are rounded.
    """

    span = 0
    together = 1

    def __init__(self, lattice: Lattice, rows: int, part: slice) -> None:
        table = np.arange(rows) * len(lattice.levels) // rows
        scale, offset = lattice.scale, lattice.offset
        if len(scale) > 1:
            scale, offset = scale[part], offset[part]
        self.lattice = Lattice(scale, offset, lattice.levels[table[part]], lattice.even)

    def enter(
        self, weight: Float32, carried: Float32, factor: Factor, part: slice
    ) -> tuple[Lattice, Array]:
        """The lattice of some columns, and the index of each column's run in it."""
        return self.at(part)

    def at(self, part: slice) -> tuple[Lattice, Array]:
        """As ``enter``, for columns that were entered before."""
        return self.lattice, np.zeros(part.stop - part.start, np.int64)

    def scaled(self, part: slice, codes: Array, factors: Float32) -> tuple[Params, Float32] | None:
        """As ``Spans.scaled``: not possible."""
        return None

    def take(self, part: slice, params: Params, rows: Array) -> None:
        """Does nothing: there are no scaled parameters."""

    def params(self) -> Params:
        """An empty dict: nothing was fitted."""
        return {}


class Spans:
    """Parameters that are fitted a span of columns at a time, when the span is entered."""

    def __init__(self, grid: LatticeGrid | CodebookGrid, columns: int) -> None:
        self.grid, self.span = grid, grid.span
        self.together = grid.together if isinstance(grid, CodebookGrid) else 1
        # Parameters → the values that columns may take.
        self._values: Callable[[Params], Lattice | Codebook]
        self._values = grid.codebook if isinstance(grid, CodebookGrid) else grid.lattice
        self.fitted: list[Params] = [{}] * (columns // grid.span)

    def enter(
        self, weight: Float32, carried: Float32, factor: Factor, part: slice
    ) -> tuple[Lattice | Codebook, Array]:
        """As ``Whole.enter``; fits the parameters to the span's current weights.

        Args:
            weight: float32 ``[rows, span]``.
            carried: float32 ``[rows, span]``: errors of earlier columns times ``feedback``.
            factor: of those columns ...
            part: ... which are these of its order.
        """
        columns = factor.order[part]
        first, place = int(columns.min()), np.argsort(columns)
        # Distributed over all remaining columns, not only up to each column's turn, an error e
        # moves them by e H_sr H_rr^-1, which in terms of the factor is e U_sr U_rr^-1.
        if part.start not in factor.settles:
            metric = np.triu(factor.feedback[part, part])
            factor.settles[part.start] = np.linalg.inv(metric).astype(np.float32)
        now = weight + carried @ factor.settles[part.start]
        params = self.grid.fit(now[:, place], factor.variances[part][place])
        self.fitted[first // self.span] = params
        values = self._values(params)
        return values, (columns - first) * values.scale.shape[1] // self.span

    def at(self, part: slice) -> tuple[Lattice | Codebook, Array]:
        """As ``enter``, for a span that was entered before; ``part`` in the weight's order."""
        values = self._values(self.fitted[part.start // self.span])
        return values, np.arange(self.span) * values.scale.shape[1] // self.span

    def scaled(self, part: slice, codes: Array, factors: Float32) -> tuple[Params, Float32] | None:
        """Scale a span's weights, as far as its float16 parameters can represent it.

        Args:
            part: the span.
            codes: uint8 ``[rows, span]``.
            factors: float32 ``[rows]``.

        Returns:
            Parameters for ``take``, and the weights that they and the codes decode to, float32
            ``[rows, span]``; None where the grid has no such parameters.
        """
        params = dict(self.fitted[part.start // self.span])
        halves = [name for name, values in params.items() if values.dtype == np.float16]
        factors = np.clip(factors, *FACTORS)
        for name in halves:
            values = np.clip(params[name] * factors[:, None], -LARGEST, LARGEST)
            params[name] = values.astype(np.float16)
        return (params, self.grid.decode(codes, params)) if halves else None

    def take(self, part: slice, params: Params, rows: Array) -> None:
        """Use the parameters from ``scaled`` in some rows (bool ``[rows]``) of the span."""
        old = self.fitted[part.start // self.span]
        self.fitted[part.start // self.span] = {
            name: np.where(rows[:, None], values, old[name]) for name, values in params.items()
        }

    def params(self) -> Params:
        """The fitted parameters, joined along the columns."""
        names = self.fitted[0]
        return {name: np.concatenate([p[name] for p in self.fitted], axis=1) for name in names}


def round_piece(
    weight: Float32,
    carried: Float32,
    feedback: Float32,
    variances: Float32,
    values: Lattice | Codebook,
    run: Array,
    codes: Array,
    left: Float32,
) -> None:
    """Round some columns in sequence, over all rows; fills ``codes`` and ``left``.

    Arguments as in ``sweep``, or (codebooks) ``gptq_words.sweep_words``.
    """
    feedback, scale = np.ascontiguousarray(feedback), values.scale

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


def add_errors(x, left, feedback, first, n):
    """Add the errors of ``PANEL`` columns from ``first`` on to all columns after them: in the order
    of the columns, as one after another, but with each ``x`` read and written once."""
    for i in range(first + PANEL, n):
        a, b = feedback[first, i], feedback[first + 1, i]
        c, d = feedback[first + 2, i], feedback[first + 3, i]
        e, f = feedback[first + 4, i], feedback[first + 5, i]
        g, h = feedback[first + 6, i], feedback[first + 7, i]
        for lane in range(LANES):
            total = x[i, lane] + left[first, lane] * a
            total += left[first + 1, lane] * b
            total += left[first + 2, lane] * c
            total += left[first + 3, lane] * d
            total += left[first + 4, lane] * e
            total += left[first + 5, lane] * f
            total += left[first + 6, lane] * g
            x[i, lane] = total + left[first + 7, lane] * h


add_panel = kernel(add_errors, fastmath=("contract", "nsz"))  # sums keep their order


@kernel
def sweep(weight, carried, feedback, run, scale, offset, levels, even, begin, end, codes, errors):
    """Round columns 0..n-1 in this order, rows begin..end.

    Column k is rounded as ``weight + carried + Σ_{j<k} errors[j] * feedback[j, k]``.

    Args:
        weight: float32 ``[rows, n]``.
        carried: float32 ``[rows, n]``: the same sum over all columns before these.
        feedback: float32 ``[n, n]``; only the part above its diagonal is used.
        run: int64 ``[n]``: the index of each column's run in the lattice.
        scale, offset, levels, even: see ``compress.grids.Lattice``; one row, or one for each row.
        codes: uint8 ``[rows, n]``, filled.
        errors: float32 ``[rows, n]``, filled with ``weight`` minus the decoded codes.
    """
    n, runs, top = len(run), scale.shape[1], levels.shape[1] - 1
    x = np.empty((n, LANES), dtype=np.float32)
    left = np.empty((n, LANES), dtype=np.float32)
    step = np.empty((runs, LANES), dtype=np.float32)
    inverse = np.empty((runs, LANES), dtype=np.float32)
    shift = np.empty((runs, LANES), dtype=np.float32)
    midpoint = np.empty((top, LANES), dtype=np.float32)
    code = np.empty(LANES, dtype=np.float32)
    value = np.empty(LANES, dtype=np.float32)
    for row in range(begin, end, LANES):
        for lane in range(LANES):
            source = min(row + lane, end - 1)
            scaled, table = source % len(scale), source % len(levels)
            for k in range(n):
                left[k, lane] = weight[source, k]
                x[k, lane] = left[k, lane] + carried[source, k]
            for k in range(runs):
                step[k, lane] = scale[scaled, k]
                inverse[k, lane] = inverse_of(scale[scaled, k])
                shift[k, lane] = offset[scaled, k]
            for k in range(top):
                midpoint[k, lane] = (levels[table, k] + levels[table, k + 1]) * f4(0.5)
        for k in range(n):
            r = run[k]
            if even:
                for lane in range(LANES):
                    # Codes count from the lowest level, half a step below its midpoint.
                    v = (x[k, lane] + shift[r, lane]) * inverse[r, lane] - midpoint[0, lane]
                    v = min(max(np.floor(v + f4(1.0)), f4(0.0)), f4(top))
                    code[lane] = v
                    value[lane] = v + (midpoint[0, lane] - f4(0.5))
            else:
                code[:] = f4(0.0)
                for i in range(top):
                    for lane in range(LANES):
                        v = (x[k, lane] + shift[r, lane]) * inverse[r, lane]
                        code[lane] += f4(1.0) if v > midpoint[i, lane] else f4(0.0)
                for lane in range(LANES):
                    table = min(row + lane, end - 1) % len(levels)
                    value[lane] = levels[table, np.int64(code[lane])]
            for lane in range(LANES):
                left[k, lane] -= value[lane] * step[r, lane] - shift[r, lane]
            for lane in range(min(LANES, end - row)):
                codes[row + lane, k] = np.uint8(code[lane])
            first = k - k % PANEL
            if k + 1 == first + PANEL:
                add_panel(x, left, feedback, first, n)
            for i in range(k + 1, min(first + PANEL, n)):
                share = feedback[k, i]
                for lane in range(LANES):
                    x[i, lane] += left[k, lane] * share
        for lane in range(min(LANES, end - row)):
            for k in range(n):
                errors[row + lane, k] = left[k, lane]
