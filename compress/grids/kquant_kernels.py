"""Numba kernels of the GGUF block grids: nearest codes, tiles, and the fit without a minimum.

These fit Q4_0, Q5_0, Q8_0, IQ4_NL, IQ4_XS, Q3_K and Q6_K; ``kquant_affine.py`` fits the types with
a minimum, in the same steps.

Rows are the SIMD lanes (``lanes.py``): tiles are ``[columns, LANES]``. All quantities of a
sub-block (``t``) or a block (``b``) are in one flat array, LANES numbers each, at constant offsets:
LLVM can then prove that they do not overlap, and vectorizes every loop over the lanes.

``sums_affine`` and ``sums_symmetric`` round a sub-block at a given scale (and minimum) and sum up
products of its residual ``r = x - decoded``. These sums give both the error and the least-squares
correction of scale and minimum. A *search* computes them at several scales and returns the best
corrected one. A *refit* computes them at the parameters as stored, corrects these, rounds them to
storable values, and retains the best.

Squared errors are weighted by ``importance * (x² + spread * mean(x²)) ** (power / 2)``, so that
large weights count more. The weightings of llama.cpp are special cases with power 1 and 2; power 0
is the plain error.

Parameters of a sub-block: ``scale = unit[0] * whole[0]``, ``minimum = unit[1] * whole[1]``, where
the units are float16 values of the block and ``whole`` are integers up to ``limit`` (K-quants), or
ones (``limit`` 0: the block has one sub-block).
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np

from compress.grids.lanes import LANES, WORST, f4, half, inverse_of, kernel

# A weight below a quarter of the smallest step of any GGUF block (a float16 scale of 2**-24)
# decodes to zero in any case; set to zero, it cannot underflow in the sums.
TINY = f4(2.0**-26)
NEARLY_ZERO = f4(1e-30)
# Two errors that differ by less than this share of a sum of squares differ by rounding only.
EQUAL = f4(3e-7)


@kernel
def load(weight, importance, row_squares, row, column, n, power, spread, run, x, w):
    """Transpose rows to a tile, and compute the weights of its errors; missing rows are zeros.

    ``mean(x²)`` is taken over ``run`` columns, or over the row (``row_squares``) if run is 0.
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
def keep(value, error, least, best):
    """Set ``best = value`` in the lanes whose error is below ``least``."""
    for lane in range(LANES):
        best[lane] = value[lane] if error[lane] < least[lane] else best[lane]


# Offsets in a block's work array that only ``choose_unit`` uses, LANES numbers each.
UNIT, UNIT_PEAK, UNIT_BEST, UNIT_MISS, UNIT_ROWS = range(0, 5 * LANES, LANES)


@kernel
def choose_unit(s, wish, cost, level, least, most, tries, b):
    """Choose a block's ``UNIT``: the best approximation of its sub-blocks' scales by multiples.

    Minimizes the squared differences between the scales (offset ``wish`` of ``s[sub-block]``) and
    their nearest multiples least..most of the unit, weighted by the numbers at offset ``cost``. The
    scale of largest magnitude is mapped to ``level``, then to levels nearer to zero.
    """
    for lane in range(LANES):
        b[UNIT_PEAK + lane] = f4(0.0)
        b[UNIT_BEST + lane] = WORST
    for j in range(len(s)):
        wishes = s[j, wish : wish + LANES]
        for lane in range(LANES):
            larger = abs(wishes[lane]) > abs(b[UNIT_PEAK + lane])
            b[UNIT_PEAK + lane] = wishes[lane] if larger else b[UNIT_PEAK + lane]
    for _ in range(tries):
        inverse = f4(1.0) / level
        for lane in range(LANES):
            b[UNIT_MISS + lane] = f4(0.0)
        for j in range(len(s)):
            wishes, costs = s[j, wish : wish + LANES], s[j, cost : cost + LANES]
            for lane in range(LANES):
                d = b[UNIT_PEAK + lane] * inverse
                nearest = np.floor(wishes[lane] * inverse_of(d) + f4(0.5))
                miss = min(max(nearest, least), most) * d - wishes[lane]
                b[UNIT_MISS + lane] += costs[lane] * miss * miss
        for lane in range(LANES):
            better = b[UNIT_MISS + lane] < b[UNIT_BEST + lane]
            b[UNIT_BEST + lane] = b[UNIT_MISS + lane] if better else b[UNIT_BEST + lane]
            b[UNIT + lane] = b[UNIT_PEAK + lane] * inverse if better else b[UNIT + lane]
        level += f4(1.0) if level < f4(0.0) else f4(-1.0)


@kernel
def encode_linear(weight, scale, minimum, n, zero, top, begin, end, codes):
    """Nearest codes 0..top of ``scale * (code - zero) - minimum``, rows begin..end.

    The code is ``zero`` where the scale is 0. ``scale``, ``minimum``: float32
    ``[rows, columns / n]``.
    """
    for row in range(begin, end):
        for block in range(scale.shape[1]):
            step, low = scale[row, block], minimum[row, block]
            inverse = f4(1.0) / step if step != f4(0.0) else f4(0.0)
            values = weight[row, block * n : block * n + n]
            out = codes[row, block * n : block * n + n]
            for i in range(n):
                v = (values[i] + low) * inverse + (zero + f4(0.5))
                out[i] = np.uint8(np.int32(min(max(v, f4(0.0)), top)))


@kernel
def encode_levels(weight, scale, cells, n, begin, end, codes):
    """Nearest codes of ``scale * level[code]``, rows begin..end.

    ``cells[floor(2 v) + 256]`` is the code of the level nearest to v.
    """
    for row in range(begin, end):
        for block in range(scale.shape[1]):
            step = scale[row, block]
            inverse = f4(2.0) / step if step != f4(0.0) else f4(0.0)
            values = weight[row, block * n : block * n + n]
            out = codes[row, block * n : block * n + n]
            for i in range(n):
                cell = min(max(np.floor(values[i] * inverse + f4(256.0)), f4(0.0)), f4(511.0))
                out[i] = cells[np.uint32(np.int32(cell))]


# --- the fit without a minimum ---------------------------------------------------------------

# Offsets in a sub-block's work array, LANES numbers each.
WQQ, WQR, WRR, INVERSE, LEVEL = range(0, 5 * LANES, LANES)
SCALE, STEP, PEAK, LEAST, WHOLE, BEST, ROWS = range(5 * LANES, 12 * LANES, LANES)
# Offsets in a block's work array, after those of ``choose_unit``.
T_WQQ, T_WQR, T_WRR, ERROR, BEST_UNIT, BLOCK_ROWS = range(UNIT_ROWS, UNIT_ROWS + 6 * LANES, LANES)


@kernel
def sums_symmetric(x, w, start, n, least, most, values, t):
    """Round ``x ≈ STEP * q``, and sum wq², wqr and wr² into ``WQQ``, ``WQR`` and ``WRR``.

    q is an integer in least..most or, if ``values`` is not empty, the nearest level of a table:
    ``values[floor(2 v) + 256]``, exact because all midpoints of its levels are half-integers. (With
    an unsigned 32-bit index, in a separate loop, LLVM compiles the look-up to a gather.)
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
    """Search the ``SCALE`` of least weighted error, in each lane.

    ``tries`` are the levels to which the weight of largest magnitude is mapped, of both signs,
    since the scale may be negative.
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
            # Among equal errors the first try wins: sub-blocks with the same try approximate a
            # common unit well. ``size`` bounds the rounding error of ``error``: it is
            # proportional to the sum that is subtracted from and to the squared weights.
            error = wrr - more * wqr
            size = f4(10.0) * wrr + f4(1e-3) * wqq * step * step
            better = error < t[LEAST + lane] - EQUAL * size
            t[LEAST + lane] = error if better else t[LEAST + lane]
            t[SCALE + lane] = step + more if better else t[SCALE + lane]


@kernel
def start_symmetric(x, w, n, least, most, limit, values, tries, units, s, b):
    """Fit the ``SCALE`` of every sub-block separately (``WQQ`` weights its squared error), then the
    block's unit."""
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
            t[WQR + lane] = f4(0.0)  # the correction is already in SCALE
    if limit > f4(0.0):
        choose_unit(s, SCALE, WQQ, -limit, -limit, limit - f4(1.0), units, b)
    else:
        for lane in range(LANES):
            b[UNIT + lane] = s[0, SCALE + lane]


@kernel
def store_symmetric(x, w, n, least, most, limit, values, s, b):
    """Round the parameters to storable values, and sum up over the block for the fit of its unit.

    ``T_WQQ`` to ``T_WRR`` are the sums of ``sums_symmetric`` with the scale in units for q.
    """
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
    """Copy the stored parameters to the best ones in the lanes where their error is smaller."""
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
    ``scales`` (int8 ``[rows, sub-blocks]``, -limit..limit-1). The second start, if any, uses only
    the first try.
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
