"""Scales by importance: the grid's search weighs each column's error by what the column carries.

The output error of a linear is ``Σ_c E[x_c²] (w_c - ŵ_c)²`` summed over rows, where inputs are
taken to be uncorrelated; ``E[x_c²]`` is the importance (llama.cpp's imatrix). The grids search
scale, minimum, zero point or palette for the least such error and refit in closed form.

The importance is taken to the power of ``POWER``: inputs are correlated, and other texts stress
other columns, so the measured ratios between columns are trusted a little less than they say. On
the demo model and a text that is neither the calibration's nor the held-out one, over three draws
of calibration texts, mean KL at 0.75 against 1: Q4_K_M -4 %, Q3_K_M -5 %, lut4-g8 -4 %, int4-g32
+1 %; 0.5 and less lose on int4.
"""

from __future__ import annotations

import numpy as np

from compress.calibration.statistics import LayerStats
from compress.grids import Float32, Grid, Quantized

POWER = 0.75


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
    return grid.quantize(weight, column_weights(stats))


def column_weights(stats: LayerStats) -> Float32:
    """What the squared errors of the columns are weighed by, float32 ``[columns]``."""
    weights: Float32 = np.power(stats.importance, np.float32(POWER))
    return weights
