"""Numba kernels: the fit of the GGUF block grids with a minimum (Q4_1, Q5_1, Q2_K, Q4_K, Q5_K).

``kquant_kernels.py`` describes the steps of a fit.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np

from compress.grids.kquant_kernels import EQUAL, NEARLY_ZERO, UNIT, UNIT_ROWS, choose_unit, load
from compress.grids.lanes import LANES, WORST, f4, half, inverse_of, kernel

# Offsets in a sub-block's work array, LANES numbers each.
W, WQ, WQQ, WR, WQR, WRR = range(0, 6 * LANES, LANES)  # the sums
SCALE, LOW, INVERSE, FIRST, SPAN, LEAST = range(6 * LANES, 12 * LANES, LANES)
WISH_SCALE, WISH_LOW, COST_SCALE, COST_LOW = range(12 * LANES, 16 * LANES, LANES)
WHOLE_SCALE, WHOLE_LOW, BEST_SCALE, BEST_LOW, ROWS = range(16 * LANES, 21 * LANES, LANES)
# Offsets in a block's work array, after those of ``choose_unit`` for both units.
LOWER_UNIT = UNIT + UNIT_ROWS
T_W, T_WQ, T_WQQ, T_WR, T_WQR, T_WRR = range(2 * UNIT_ROWS, 2 * UNIT_ROWS + 6 * LANES, LANES)
ERROR, BEST_UNIT, BEST_LOWER_UNIT, BLOCK_ROWS = range(
    2 * UNIT_ROWS + 6 * LANES, 2 * UNIT_ROWS + 10 * LANES, LANES
)


@kernel
def correction(w0, wq, wqq, wr, wqr):
    """Least-squares correction of (scale, minimum) from the sums.

    It is undetermined where all codes are equal; then only the scale changes (the minimum where all
    codes are zero).
    """
    determinant = w0 * wqq - wq * wq
    both, scale = determinant > f4(1e-5) * w0 * wqq, wqq > f4(0.0)
    inverse = f4(1.0) / (determinant if both else f4(1.0))
    more = wqr / wqq if scale else f4(0.0)
    lower = f4(0.0) if scale else wr / max(w0, NEARLY_ZERO)
    more = (w0 * wqr - wq * wr) * inverse if both else more
    return more, (wqq * wr - wq * wqr) * inverse if both else lower


@kernel
def change_of_error(w0, wq, wqq, wr, wqr, more, lower):
    """Change of the error when scale and minimum change by (more, lower) at fixed codes."""
    two = f4(2.0)
    return more * (more * wqq - two * (wqr - lower * wq)) + lower * (lower * w0 - two * wr)


@kernel
def sums_affine(x, w, start, n, top, t):
    """Round ``x ≈ SCALE * q + LOW``, q in 0..top, and sum w, wq, wq², wr, wqr and wr² into ``W`` to
    ``WRR``."""
    for lane in range(LANES):
        t[INVERSE + lane] = inverse_of(t[SCALE + lane])
    t[W : WRR + LANES] = f4(0.0)
    for i in range(start, start + n):
        for lane in range(LANES):
            value = x[i, lane] - t[LOW + lane]
            q = np.floor(value * t[INVERSE + lane] + f4(0.5))
            q = min(max(q, f4(0.0)), top)
            r = value - q * t[SCALE + lane]
            weight = w[i, lane]
            t[W + lane] += weight
            t[WQ + lane] += weight * q
            t[WQQ + lane] += weight * q * q
            t[WR + lane] += weight * r
            t[WQR + lane] += weight * q * r
            t[WRR + lane] += weight * r * r


@kernel
def search_affine(x, w, start, n, top, tries, signed, t):
    """Search the ``SCALE`` and ``LOW`` of least weighted error, in each lane.

    ``tries`` ``[n, 2]``: the number of steps over the range of the sub-block, above or below
    ``top``, and a shift of the levels in steps. Each try gives codes, and the codes their
    least-squares scale and minimum, which is <= 0 unless ``signed``.

    The sums use ``v = x - FIRST`` instead of a residual (``WR``, ``WQR``) and are two fewer than in
    ``sums_affine``. This loses digits to cancellation, but is precise enough for up to 5 bits.
    """
    for lane in range(LANES):
        t[FIRST + lane] = x[start, lane] if signed else f4(0.0)
        t[SPAN + lane] = x[start, lane]
        t[W + lane] = f4(0.0)
        t[WR + lane] = f4(0.0)
        t[LEAST + lane] = WORST
    for i in range(start, start + n):
        for lane in range(LANES):
            t[FIRST + lane] = min(t[FIRST + lane], x[i, lane])
            t[SPAN + lane] = max(t[SPAN + lane], x[i, lane])
    for i in range(start, start + n):
        for lane in range(LANES):
            t[W + lane] += w[i, lane]
            t[WR + lane] += w[i, lane] * (x[i, lane] - t[FIRST + lane])
    for lane in range(LANES):
        t[SPAN + lane] = inverse_of(t[SPAN + lane] - t[FIRST + lane])
    for attempt in range(len(tries)):
        steps, shift = tries[attempt, 0], tries[attempt, 1] + f4(0.5)
        for lane in range(LANES):
            t[INVERSE + lane] = steps * t[SPAN + lane]
            t[WQ + lane] = f4(0.0)
            t[WQQ + lane] = f4(0.0)
            t[WQR + lane] = f4(0.0)
        for i in range(start, start + n):
            for lane in range(LANES):
                v = x[i, lane] - t[FIRST + lane]
                q = min(max(np.floor(v * t[INVERSE + lane] + shift), f4(0.0)), top)
                wq = w[i, lane] * q
                t[WQ + lane] += wq
                t[WQQ + lane] += wq * q
                t[WQR + lane] += wq * v
        for lane in range(LANES):
            a, b, c = t[W + lane], t[WQ + lane], t[WQQ + lane]
            d, e, first = t[WR + lane], t[WQR + lane], t[FIRST + lane]
            slope, lower = correction(a, b, c, d, e)
            above = not signed and first + lower > f4(0.0)
            lower = -first if above else lower
            slope = (e - lower * b) / max(c, NEARLY_ZERO) if above else slope
            error = change_of_error(a, b, c, d, e, slope, lower)
            # Among equal errors the first try wins: sub-blocks with the same try approximate a
            # common unit well. (The error is negative here.)
            better = error < t[LEAST + lane] * (f4(1.0) + EQUAL)
            t[LEAST + lane] = error if better else t[LEAST + lane]
            t[SCALE + lane] = slope if better else t[SCALE + lane]
            t[LOW + lane] = first + lower if better else t[LOW + lane]


@kernel
def whole_affine(t, b, limit):
    """Round a sub-block's scale and minimum to integers 0..limit of given units.

    The codes are those of the sums at (``SCALE``, ``LOW``). Tries the integers around the
    least-squares scale, each with its best minimum.
    """
    for lane in range(LANES):
        w0, wq, wqq = t[W + lane], t[WQ + lane], t[WQQ + lane]
        wr, wqr, scale, low = t[WR + lane], t[WQR + lane], t[SCALE + lane], t[LOW + lane]
        unit, lower_unit = b[UNIT + lane], b[LOWER_UNIT + lane]
        per_unit, per_lower = inverse_of(unit), inverse_of(lower_unit)
        more, lower = correction(w0, wq, wqq, wr, wqr)
        alone = (wqr + low * wq) / max(wqq, NEARLY_ZERO)
        more = alone if low + lower > f4(0.0) else more
        nearest = np.floor((scale + more) * per_unit + f4(0.5))
        least, best, best_low = WORST, f4(0.0), f4(0.0)
        for around in (f4(-1.0), f4(0.0), f4(1.0)):
            whole = min(max(nearest + around, f4(0.0)), limit)
            more = whole * unit - scale
            lower = (wr - more * wq) / max(w0, NEARLY_ZERO)
            whole_low = np.floor(-(low + lower) * per_lower + f4(0.5))
            whole_low = min(max(whole_low, f4(0.0)), limit)
            lower = -whole_low * lower_unit - low
            error = change_of_error(w0, wq, wqq, wr, wqr, more, lower)
            better = error < least
            least = error if better else least
            best = whole if better else best
            best_low = whole_low if better else best_low
        t[WHOLE_SCALE + lane] = best
        t[WHOLE_LOW + lane] = best_low


@kernel
def start_affine(x, w, n, top, limit, tries, units, s, b):
    """Fit scale and minimum of every sub-block separately (with their sums), then the block's
    units."""
    signed = limit == f4(0.0)
    for j in range(len(s)):
        t = s[j]
        search_affine(x, w, j * n, n, top, tries, signed, t)
        sums_affine(x, w, j * n, n, top, t)
        for lane in range(LANES):
            w0, wq, wqq = t[W + lane], t[WQ + lane], t[WQQ + lane]
            more, lower = correction(w0, wq, wqq, t[WR + lane], t[WQR + lane])
            scale, down = t[SCALE + lane] + more, -t[LOW + lane] - lower
            t[WISH_SCALE + lane] = max(scale, f4(0.0))
            t[WISH_LOW + lane] = down if signed else max(down, f4(0.0))
            # Curvature of the error in the scale with the best minimum, and the reverse.
            t[COST_SCALE + lane] = wqq - wq * wq / max(w0, NEARLY_ZERO)
            t[COST_LOW + lane] = w0 - wq * wq / max(wqq, NEARLY_ZERO)
    if signed:
        for lane in range(LANES):
            b[UNIT + lane] = s[0, WISH_SCALE + lane]
            b[LOWER_UNIT + lane] = s[0, WISH_LOW + lane]
    else:
        choose_unit(s, WISH_SCALE, COST_SCALE, limit, f4(0.0), limit, units, b)
        lower = b[UNIT_ROWS:]
        choose_unit(s, WISH_LOW, COST_LOW, limit, f4(0.0), limit, units, lower)


@kernel
def store_affine(x, w, n, top, limit, s, b):
    """Round the parameters to storable values, and sum up over the block for the fit of its units.

    ``T_W`` to ``T_WRR`` are the sums of ``sums_affine`` with (scale, -minimum) in units for (q, 1).
    """
    for lane in range(LANES):
        b[UNIT + lane] = half(b[UNIT + lane])
        b[LOWER_UNIT + lane] = half(b[LOWER_UNIT + lane])
    b[T_W : T_WRR + LANES] = f4(0.0)
    for j in range(len(s)):
        t = s[j]
        if limit > f4(0.0):
            whole_affine(t, b, limit)
        for lane in range(LANES):
            t[SCALE + lane] = b[UNIT + lane] * t[WHOLE_SCALE + lane]
            t[LOW + lane] = -b[LOWER_UNIT + lane] * t[WHOLE_LOW + lane]
        sums_affine(x, w, j * n, n, top, t)
        for lane in range(LANES):
            scale, low = t[WHOLE_SCALE + lane], -t[WHOLE_LOW + lane]
            b[T_W + lane] += low * low * t[W + lane]
            b[T_WQ + lane] += scale * low * t[WQ + lane]
            b[T_WQQ + lane] += scale * scale * t[WQQ + lane]
            b[T_WR + lane] += low * t[WR + lane]
            b[T_WQR + lane] += scale * t[WQR + lane]
            b[T_WRR + lane] += t[WRR + lane]


@kernel
def keep_affine(s, b):
    """Copy the stored parameters to the best ones in the lanes where their error is smaller."""
    for j in range(len(s)):
        t = s[j]
        for lane in range(LANES):
            better = b[T_WRR + lane] < b[ERROR + lane]
            scale, low = t[WHOLE_SCALE + lane], t[WHOLE_LOW + lane]
            t[BEST_SCALE + lane] = scale if better else t[BEST_SCALE + lane]
            t[BEST_LOW + lane] = low if better else t[BEST_LOW + lane]
    for lane in range(LANES):
        better = b[T_WRR + lane] < b[ERROR + lane]
        unit, lower = b[UNIT + lane], b[LOWER_UNIT + lane]
        b[BEST_UNIT + lane] = unit if better else b[BEST_UNIT + lane]
        b[BEST_LOWER_UNIT + lane] = lower if better else b[BEST_LOWER_UNIT + lane]
        b[ERROR + lane] = b[T_WRR + lane] if better else b[ERROR + lane]


@kernel
def refit_affine(limit, b):
    """The units of least error for given codes and integers."""
    for lane in range(LANES):
        w0, wq, wqq = b[T_W + lane], b[T_WQ + lane], b[T_WQQ + lane]
        more, lower = correction(w0, wq, wqq, b[T_WR + lane], b[T_WQR + lane])
        b[UNIT + lane] = max(b[UNIT + lane] + more, f4(0.0))
        unit = b[LOWER_UNIT + lane] + lower
        b[LOWER_UNIT + lane] = max(unit, f4(0.0)) if limit > f4(0.0) else unit


@kernel
def fit_affine(
    weight, importance, row_squares, power, spread, run, tries, units, refits, starts,
    n, top, limit, begin, end, d, dmin, scales, mins,
):  # fmt: skip
    """Fit ``w = d * scale * q - dmin * min``, q in 0..top, to the blocks of rows begin..end.

    Fills ``d``, ``dmin`` (float32 holding float16 values, ``[rows, blocks]``) and, where ``limit``
    is not 0, ``scales`` and ``mins`` (uint8 ``[rows, sub-blocks]``). Without them the minimum may
    be positive (``dmin`` negative). The second start, if any, uses only the first try.
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
            s[:, WHOLE_SCALE : WHOLE_LOW + LANES] = f4(1.0)
            b[ERROR : ERROR + LANES] = WORST
            for start in range(starts):
                some = tries if start == 0 else tries[:1]
                start_affine(x, w, n, top, limit, some, units, s, b)
                for _ in range(refits + 1):
                    store_affine(x, w, n, top, limit, s, b)
                    keep_affine(s, b)
                    refit_affine(limit, b)
            for lane in range(min(LANES, end - row)):
                d[row + lane, block] = b[BEST_UNIT + lane]
                dmin[row + lane, block] = b[BEST_LOWER_UNIT + lane]
                for j in range(subs if limit > f4(0.0) else 0):
                    scales[row + lane, block * subs + j] = np.uint8(s[j, BEST_SCALE + lane])
                    mins[row + lane, block * subs + j] = np.uint8(s[j, BEST_LOW + lane])
