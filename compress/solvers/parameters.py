"""Parameters of a grid while GPTQ rounds its columns: fitted span by span, or known before."""

from __future__ import annotations

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
from compress.solvers.hessian import Factor

__all__ = ["Spans", "Whole"]

FACTORS = (0.5, 2.0)  # by how much parameters may be scaled at once
LARGEST = np.float32(65504)  # of float16


class Whole:
    """Parameters of whole rows (channel scales, palettes), known before.

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
        """The lattice of some columns, and the run of it that each is of."""
        return self.at(part)

    def at(self, part: slice) -> tuple[Lattice, Array]:
        """As ``enter``, of columns that were entered before."""
        return self.lattice, np.zeros(part.stop - part.start, np.int64)

    def scaled(self, part: slice, codes: Array, factors: Float32) -> tuple[Params, Float32] | None:
        """As ``Spans.scaled``: not possible."""
        return None

    def take(self, part: slice, params: Params, rows: Array) -> None:
        """Nothing to take."""

    def params(self) -> Params:
        """What was fitted: nothing."""
        return {}


class Spans:
    """Parameters that are fitted a span of columns at a time, when the span is entered."""

    def __init__(self, grid: LatticeGrid | CodebookGrid, columns: int) -> None:
        self.grid = grid
        self.span = grid.span
        self.together = grid.together if isinstance(grid, CodebookGrid) else 1
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
        values = self._values(params)
        return values, (columns - first) * values.scale.shape[1] // self.span

    def at(self, part: slice) -> tuple[Lattice | Codebook, Array]:
        """As ``enter``, of a span that was entered before; ``part`` in the weight's order."""
        values = self._values(self.fitted[part.start // self.span])
        return values, np.arange(self.span) * values.scale.shape[1] // self.span

    def _values(self, params: Params) -> Lattice | Codebook:
        grid = self.grid
        return grid.lattice(params) if isinstance(grid, LatticeGrid) else grid.codebook(params)

    def scaled(self, part: slice, codes: Array, factors: Float32) -> tuple[Params, Float32] | None:
        """A span's weights multiplied, as far as its float16 parameters can say it.

        Args:
            part: the span.
            codes: uint8 ``[rows, span]``.
            factors: float32 ``[rows]``.

        Returns:
            Parameters for ``take``, and the weights that they and the codes stand for, float32
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
        """Some rows (bool ``[rows]``) of the parameters that ``scaled`` gave become the span's."""
        old = self.fitted[part.start // self.span]
        self.fitted[part.start // self.span] = {
            name: np.where(rows[:, None], values, old[name]) for name, values in params.items()
        }

    def params(self) -> Params:
        """What was fitted, joined along the columns."""
        names = self.fitted[0]
        return {name: np.concatenate([p[name] for p in self.fitted], axis=1) for name in names}
