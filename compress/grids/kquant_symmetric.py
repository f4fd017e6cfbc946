"""The fit of the GGUF block grids without a minimum: Q4_0, Q5_0, Q8_0, IQ4_NL, IQ4_XS, Q3_K, Q6_K.

See ``kquant_tiles.py`` for how a fit goes.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np

from compress.grids.kquant_tiles import EQUAL, NEARLY_ZERO, UNIT, UNIT_ROWS, choose_unit, load
from compress.grids.lanes import LANES, WORST, f4, half, inverse_of, kernel

# Rows of a sub-block's work array, LANES numbers each.
WQQ, WQR, WRR, INVERSE, LEVEL = range(0, 5 * LANES, LANES)
SCALE, STEP, PEAK, LEAST, WHOLE, BEST, ROWS = range(5 * LANES, 12 * LANES, LANES)
# Rows of the block's, behind those of ``choose_unit``.
T_WQQ, T_WQR, T_WRR, ERROR, BEST_UNIT, BLOCK_ROWS = range(UNIT_ROWS, UNIT_ROWS + 6 * LANES, LANES)


@kernel
def sums_symmetric(x, w, start, n, least, most, values, t):
    """Round ``x ≈ STEP * q`` and sum into rows ``WQQ``, ``WQR``, ``WRR``: of wq², wqr, wr².

    q is an integer in least..most, or, where ``values`` is given, the nearest level of a table:
    ``values[floor(2 v) + 256]``, exact because every midpoint of its levels is a half-integer.
    (An unsigned 32-bit index and a loop of its own are what let the look-up become a gather.)
    """
    for lane in range(LANES):
        t[INVERSE + lane] = inverse_of(t[STEP + lane])
        t[WQQ + lane] = f4(0.0)
        t[WQR + lane] = f4(0.0)
        t[WRR + lane] = f4(0.0)
    for i in range(start, start + n):
        if len(values):
            for lane in range(LANES):
                cell = x[i, lane] * t[INVERSE + lane] * f4(2.0) + f4(256.0)
                cell = min(max(cell, f4(0.0)), f4(511.0))
                t[LEVEL + lane] = values[np.uint32(np.int32(cell))]
        else:
            for lane in range(LANES):
                q = np.floor(x[i, lane] * t[INVERSE + lane] + f4(0.5))
                t[LEVEL + lane] = min(max(q, least), most)
        for lane in range(LANES):
            q = t[LEVEL + lane]
            r = x[i, lane] - q * t[STEP + lane]
            wq = w[i, lane] * q
            t[WQQ + lane] += wq * q
            t[WQR + lane] += wq * r
            t[WRR + lane] += w[i, lane] * r * r


@kernel
def search_symmetric(x, w, start, n, least, most, values, tries, t):
    """``SCALE`` of each lane that gives the least weighted error.

    ``tries`` are the levels that the weight of largest magnitude is put on, of either sign: which
    sign of the scale suits the block is part of the question.
    """
    for lane in range(LANES):
        t[PEAK + lane] = f4(0.0)
        t[LEAST + lane] = WORST
    for i in range(start, start + n):
        for lane in range(LANES):
            larger = abs(x[i, lane]) > abs(t[PEAK + lane])
            t[PEAK + lane] = x[i, lane] if larger else t[PEAK + lane]
    for level in tries:
        for lane in range(LANES):
            t[STEP + lane] = t[PEAK + lane] / level
        sums_symmetric(x, w, start, n, least, most, values, t)
        for lane in range(LANES):
            wqq, wqr, wrr = t[WQQ + lane], t[WQR + lane], t[WRR + lane]
            step = t[STEP + lane]
            more = wqr / max(wqq, NEARLY_ZERO)
            # Of equals the first: sub-blocks that agree share their unit well. What is left by
            # rounding is a part of the sum that it was taken from, and of the weights themselves.
            error = wrr - more * wqr
            size = f4(10.0) * wrr + f4(1e-3) * wqq * step * step
            better = error < t[LEAST + lane] - EQUAL * size
            t[LEAST + lane] = error if better else t[LEAST + lane]
            t[SCALE + lane] = step + more if better else t[SCALE + lane]


@kernel
def start_symmetric(x, w, n, least, most, limit, values, tries, units, s, b):
    """``SCALE`` of every sub-block by itself (and what a miss of it costs: ``WQQ``), and the unit
    that suits all of them."""
    for j in range(len(s)):
        t = s[j]
        search_symmetric(x, w, j * n, n, least, most, values, tries, t)
        if limit > f4(0.0):
            for lane in range(LANES):
                t[STEP + lane] = t[SCALE + lane]
            sums_symmetric(x, w, j * n, n, least, most, values, t)
            for lane in range(LANES):
                t[SCALE + lane] += t[WQR + lane] / max(t[WQQ + lane], NEARLY_ZERO)
        for lane in range(LANES):
            t[WQR + lane] = f4(0.0)  # the correction has been made
    if limit > f4(0.0):
        choose_unit(s, SCALE, WQQ, -limit, -limit, limit - f4(1.0), units, b)
    else:
        for lane in range(LANES):
            b[UNIT + lane] = s[0, SCALE + lane]


@kernel
def store_symmetric(x, w, n, least, most, limit, values, s, b):
    """Round to what the file stores, and sum up over the block what the unit needs: rows ``T_WQQ``
    to ``T_WRR``, as in ``sums_symmetric`` with the scale in units for q."""
    for lane in range(LANES):
        b[UNIT + lane] = half(b[UNIT + lane])
        b[T_WQQ + lane] = f4(0.0)
        b[T_WQR + lane] = f4(0.0)
        b[T_WRR + lane] = f4(0.0)
    for j in range(len(s)):
        t = s[j]
        for lane in range(LANES):
            unit = b[UNIT + lane]
            if limit > f4(0.0):
                wish = t[SCALE + lane] + t[WQR + lane] / max(t[WQQ + lane], NEARLY_ZERO)
                nearest = np.floor(wish * inverse_of(unit) + f4(0.5))
                t[WHOLE + lane] = min(max(nearest, -limit), limit - f4(1.0))
            t[STEP + lane] = t[SCALE + lane] = unit * t[WHOLE + lane]
        sums_symmetric(x, w, j * n, n, least, most, values, t)
        for lane in range(LANES):
            whole = t[WHOLE + lane]
            b[T_WQQ + lane] += whole * whole * t[WQQ + lane]
            b[T_WQR + lane] += whole * t[WQR + lane]
            b[T_WRR + lane] += t[WRR + lane]


@kernel
def keep_symmetric(s, b):
    """What is stored becomes the best in the lanes where its error is the least so far."""
    for j in range(len(s)):
        t = s[j]
        for lane in range(LANES):
            better = b[T_WRR + lane] < b[ERROR + lane]
            t[BEST + lane] = t[WHOLE + lane] if better else t[BEST + lane]
    for lane in range(LANES):
        better = b[T_WRR + lane] < b[ERROR + lane]
        b[BEST_UNIT + lane] = b[UNIT + lane] if better else b[BEST_UNIT + lane]
        b[ERROR + lane] = b[T_WRR + lane] if better else b[ERROR + lane]


@kernel
def fit_symmetric(
    weight, importance, row_squares, power, spread, run, tries, units, refits, starts,
    n, least, most, limit, values, begin, end, d, scales,
):  # fmt: skip
    """Fit ``w = d * scale * q`` to the blocks of rows begin..end; q as in ``sums_symmetric``.

    Fills ``d`` (float32 holding float16 values, ``[rows, blocks]``) and, where ``limit`` is not 0,
    ``scales`` (int8 ``[rows, sub-blocks]``, -limit..limit-1). A second start has the first try
    only.
    """
    columns = weight.shape[1] // d.shape[1]
    subs = columns // n
    x = np.empty((columns, LANES), dtype=np.float32)
    w = np.empty((columns, LANES), dtype=np.float32)
    s = np.zeros((subs, ROWS), dtype=np.float32)
    b = np.zeros(BLOCK_ROWS, dtype=np.float32)
    for row in range(begin, end, LANES):
        for block in range(d.shape[1]):
            column = block * columns
            load(weight, importance, row_squares, row, column, columns, power, spread, run, x, w)
            s[:, WHOLE : WHOLE + LANES] = f4(1.0)
            b[ERROR : ERROR + LANES] = WORST
            for start in range(starts):
                some = tries if start == 0 else tries[:1]
                start_symmetric(x, w, n, least, most, limit, values, some, units, s, b)
                for _ in range(refits + 1):
                    store_symmetric(x, w, n, least, most, limit, values, s, b)
                    keep_symmetric(s, b)
                    for lane in range(LANES):
                        b[UNIT + lane] += b[T_WQR + lane] / max(b[T_WQQ + lane], NEARLY_ZERO)
            for lane in range(min(LANES, end - row)):
                d[row + lane, block] = b[BEST_UNIT + lane]
                for j in range(subs if limit > f4(0.0) else 0):
                    scales[row + lane, block * subs + j] = np.int8(s[j, BEST + lane])
