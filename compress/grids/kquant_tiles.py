"""What the fits of the GGUF block grids share: the tile, keeping the best, choosing a unit.

Rows are the SIMD lanes (``lanes.py``): tiles are ``[columns, LANES]``. What belongs to a sub-block
(``t``) or a block (``b``) lies in one flat array, LANES numbers for each quantity, whose places are
constants: so LLVM knows that no two of them overlap, and every loop over the lanes becomes SIMD.
The two families, with a minimum (``kquant_affine.py``) and without (``kquant_symmetric.py``), are
built alike.

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
                w[i, lane] = importance[column + i] * (np.sqrt(square) if power == 1 else square)


@kernel
def keep(value, error, least, kept):
    """``kept = value`` in the lanes whose error is below the least so far."""
    for lane in range(LANES):
        kept[lane] = value[lane] if error[lane] < least[lane] else kept[lane]


# Rows of a block's work array that ``choose_unit`` has to itself, LANES numbers each.
UNIT, PEAK, BEST, MISS, UNIT_ROWS = range(0, 5 * LANES, LANES)


@kernel
def choose_unit(s, wish, cost, level, least, most, tries, b):
    """``UNIT`` of a block, whose multiples least..most come nearest to its sub-blocks' wishes, each
    difference weighted by what it costs: rows ``wish`` and ``cost`` of ``s[sub-block]``.

    Tries put the wish of largest magnitude on ``level``, then on levels nearer to zero.
    """
    for lane in range(LANES):
        b[PEAK + lane] = f4(0.0)
        b[BEST + lane] = WORST
    for j in range(len(s)):
        wishes = s[j, wish : wish + LANES]
        for lane in range(LANES):
            larger = abs(wishes[lane]) > abs(b[PEAK + lane])
            b[PEAK + lane] = wishes[lane] if larger else b[PEAK + lane]
    for _ in range(tries):
        inverse = f4(1.0) / level
        for lane in range(LANES):
            b[MISS + lane] = f4(0.0)
        for j in range(len(s)):
            wishes, costs = s[j, wish : wish + LANES], s[j, cost : cost + LANES]
            for lane in range(LANES):
                d = b[PEAK + lane] * inverse
                nearest = np.floor(wishes[lane] * inverse_of(d) + f4(0.5))
                miss = min(max(nearest, least), most) * d - wishes[lane]
                b[MISS + lane] += costs[lane] * miss * miss
        for lane in range(LANES):
            better = b[MISS + lane] < b[BEST + lane]
            b[BEST + lane] = b[MISS + lane] if better else b[BEST + lane]
            b[UNIT + lane] = b[PEAK + lane] * inverse if better else b[UNIT + lane]
        level += f4(1.0) if level < f4(0.0) else f4(-1.0)
