"""What the fits of the GGUF block grids share: the tile, keeping the best, choosing a unit.

Rows are the SIMD lanes (``lanes.py``): tiles are ``[columns, LANES]``. The two families, with a
minimum (``kquant_affine.py``) and without (``kquant_symmetric.py``), are built alike.

Two primitives carry everything: ``sums_affine`` and ``sums_symmetric`` round a sub-block at a
given scale (and minimum) and sum up its residual ``r = x - decoded``. Both the error and the
least-squares correction of scale and minimum follow from those sums. A *search* takes them at
several scales and keeps the best after correction. A *refit* takes them at the parameters as the
file would store them, corrects, rounds to what the file can store, and keeps the best.

Squared errors are weighted by ``importance * (x² + spread * mean(x²)) ** (power / 2)``: a large
weight matters more than its own size tells. llama.cpp's weights are special cases of power 1 and
2; power 0 is the plain error.

Sub-blocks hang below their block: ``scale = unit[0] * whole[0]``, ``minimum = unit[1] * whole[1]``
where the units are float16 and ``whole`` are integers up to ``limit`` (K-quants), or all ones
(``limit`` 0: the block is its only sub-block).
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from math import sqrt

import numpy as np

from compress.grids.lanes import LANES, WORST, f4, inverse_of, kernel

# Below a quarter of the smallest step that any GGUF block can express (an f16 scale of 2**-24) a
# weight decodes to zero in any case, and as zero it cannot underflow in the sums.
TINY = f4(2.0**-26)
NEARLY_ZERO = f4(1e-30)
# Part of a sum of squares below which two errors are equal but for rounding.
EQUAL = f4(3e-7)


@kernel
def load(weight, importance, row_squares, row, column, n, power, spread, run, x, w):
    """A transposed tile of weights and the weights of their errors; missing rows are zeros.

    ``mean(x²)`` is taken over ``run`` columns; with run 0 it is the row's, ``row_squares``.
    """
    for lane in range(LANES):
        if row + lane < weight.shape[0]:
            values = weight[row + lane, column : column + n]
            for i in range(n):
                x[i, lane] = values[i] if abs(values[i]) > TINY else f4(0.0)
        else:
            x[:, lane] = f4(0.0)
    if power == 0:
        for i in range(n):
            w[i] = importance[column + i]
        return
    mean = np.zeros(LANES, dtype=np.float32)
    for lane in range(min(LANES, len(row_squares) - row)):
        mean[lane] = spread * row_squares[row + lane]
    length = run if run else n
    for start in range(0, n, length):
        if run:
            mean[:] = f4(0.0)
            for i in range(start, start + length):
                for lane in range(LANES):
                    mean[lane] += x[i, lane] * x[i, lane] * (spread / f4(length))
        for i in range(start, start + length):
            for lane in range(LANES):
                square = x[i, lane] * x[i, lane] + mean[lane]
                w[i, lane] = importance[column + i] * (sqrt(square) if power == 1 else square)


@kernel
def keep(value, error, least, kept):
    """``kept = value`` in the lanes whose error is below the least so far."""
    for lane in range(LANES):
        kept[lane] = value[lane] if error[lane] < least[lane] else kept[lane]


@kernel
def choose_unit(wishes, s, row, level, least, most, tries, unit):
    """The unit of a block whose multiples least..most come nearest to its sub-blocks' wishes,
    each difference weighted by what it costs: ``s[sub-block, row]``.

    Tries put the wish of largest magnitude on ``level``, then on levels nearer to zero.
    """
    peak = np.zeros(LANES, dtype=np.float32)
    best = np.full(LANES, WORST)
    error = np.empty(LANES, dtype=np.float32)
    for j in range(len(wishes)):
        for lane in range(LANES):
            larger = abs(wishes[j, lane]) > abs(peak[lane])
            peak[lane] = wishes[j, lane] if larger else peak[lane]
    for _ in range(tries):
        error[:] = f4(0.0)
        for j in range(len(wishes)):
            for lane in range(LANES):
                d = peak[lane] / level
                nearest = np.floor(wishes[j, lane] * inverse_of(d) + f4(0.5))
                miss = min(max(nearest, least), most) * d - wishes[j, lane]
                error[lane] += s[j, row, lane] * miss * miss
        for lane in range(LANES):
            better = error[lane] < best[lane]
            best[lane] = error[lane] if better else best[lane]
            unit[lane] = peak[lane] / level if better else unit[lane]
        level += f4(1.0) if level < f4(0.0) else f4(-1.0)
