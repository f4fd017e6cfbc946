"""Scales by importance: the grid's search weighs each column's error by what the column carries.

The output error of a linear is ``Σ_c E[x_c²] (w_c - ŵ_c)²`` summed over rows, where inputs are
taken to be uncorrelated; ``E[x_c²]`` is the importance (llama.cpp's imatrix). The grids search
scale, minimum, zero point or palette for the least such error and refit in closed form.
"""

from __future__ import annotations

from compress.grids import Float32, Grid, Quantized
from compress.statistics import LayerStats


def scale_search(weight: Float32, grid: Grid, stats: LayerStats | None = None) -> Quantized:
    """Fit the grid to the weight under the importance of its columns, then round.

    Args:
        weight: float32 ``[rows, columns]``, whole or some of its rows: rows are independent, except
            those that share a palette.
        grid: any grid.
        stats: of the weight's input. None (an embedding, an input that calibration has not seen)
            is the unweighted fit, ``rtn``.
    """
    if stats is None or not stats.importance.any():
        return grid.quantize(weight)
    return grid.quantize(weight, stats.importance)
