"""Round to nearest: each weight to the nearest code of the grid's best unweighted fit."""

from __future__ import annotations

from compress.calibration.statistics import LayerStats
from compress.grids import Float32, Grid, Quantized


def rtn(weight: Float32, grid: Grid, stats: LayerStats | None = None) -> Quantized:
    """Fit the grid to the weight alone, then round.

    Args:
        weight: float32 ``[rows, columns]``.
        grid: any grid.
        stats: unused; other solvers go by them.
    """
    return grid.quantize(weight)
