"""Round to nearest: each weight to the nearest code of the grid's best unweighted fit."""

from __future__ import annotations

from compress.grids import Float32, Grid, Quantized


def rtn(weight: Float32, grid: Grid, name: str = "") -> Quantized:
    """Fit the grid to the weight alone, then round.

    Args:
        weight: float32 ``[rows, columns]``.
        grid: any grid.
        name: of the weight; unused here, statistics of other solvers go by it.
    """
    return grid.quantize(weight)
