"""The fit and the rounding of the uniform integer grids, as numba kernels.

Rows are the SIMD lanes (``lanes.py``): a group of 32 rows is transposed to
``[columns, LANES]`` and every sum runs down the tile lane by lane. A row's result depends neither
on its neighbours nor on the number of threads.

The search tries a few scales (and zero points) per group. Each is rounded to codes once; from the
sums of the residual ``r = w - scale * q`` follow both the error and the least-squares scale for
these codes, so that a handful of tries does what dozens of evenly spaced scales do. The winner is
rounded to float16 and kept only if the error that it then really has is below that of the plain
fit, which puts the extremes of the group on the extreme codes.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from functools import partial

import numpy as np

from compress.grids import lanes
from compress.grids.lanes import LANES, LARGEST_HALF, WORST, f4, half, inverse_of

# No "reassoc": it may expand the squared residuals, whose digits then cancel.
kernel = partial(lanes.kernel, fastmath=("contract", "arcp", "nsz"))
SMALL = f4(1e-30)
# Rows of the work array of a group, a column per lane.
WQQ, WQR, WRR, INVERSE, STEP, LEAST, MOST, ROWS = range(8)


@kernel
def load(weight, row, column, n, x, low, high):
    """A transposed tile (missing rows are zeros), its smallest and largest values (or zero).

    Returns:
        How many are beyond float16, or NaN, of which every comparison is false.
    """
    rows = min(weight.shape[0] - row, LANES)
    if rows == LANES:
        for i in range(n):
            for lane in range(LANES):
                x[i, lane] = weight[row + lane, column + i]
    else:
        x[:] = f4(0.0)
        for i in range(n):
            for lane in range(rows):
                x[i, lane] = weight[row + lane, column + i]
    low[:] = f4(0.0)
    high[:] = f4(0.0)
    beyond = 0
    for i in range(n):
        for lane in range(LANES):
            low[lane] = min(low[lane], x[i, lane])
            high[lane] = max(high[lane], x[i, lane])
            beyond += 0 if abs(x[i, lane]) <= LARGEST_HALF else 1
    return beyond


@kernel
def sums(x, importance, column, n, s):
    """Round ``x ≈ STEP * q``, q in LEAST..MOST of each lane, into rows WQQ, WQR and WRR of ``s``.

    All in one array: one base pointer spares the loop the checks for overlap.
    """
    for lane in range(LANES):
        s[INVERSE, lane] = inverse_of(s[STEP, lane])
        s[WQQ, lane] = f4(0.0)
        s[WQR, lane] = f4(0.0)
        s[WRR, lane] = f4(0.0)
    if len(importance) == 0:
        for i in range(n):
            for lane in range(LANES):
                q = np.floor(x[i, lane] * s[INVERSE, lane] + f4(0.5))
                q = min(max(q, s[LEAST, lane]), s[MOST, lane])
                r = x[i, lane] - q * s[STEP, lane]
                s[WQQ, lane] += q * q
                s[WQR, lane] += q * r
                s[WRR, lane] += r * r
        return
    for i in range(n):
        w = importance[column + i]
        for lane in range(LANES):
            q = np.floor(x[i, lane] * s[INVERSE, lane] + f4(0.5))
            q = min(max(q, s[LEAST, lane]), s[MOST, lane])
            r = x[i, lane] - q * s[STEP, lane]
            s[WQQ, lane] += w * q * q
            s[WQR, lane] += w * q * r
            s[WRR, lane] += w * r * r


@kernel
def fit(weight, importance, n, middle, top, tries, begin, end, scale, zero):
    """Scales (and zero points) of the groups of ``n`` columns, rows begin..end.

    Args:
        weight: float32 ``[rows, columns]``.
        importance: float32 ``[columns]``; empty where all columns count alike.
        middle: the zero point of a symmetric grid, or -1 for a zero point per group.
        top: the largest code.
        tries: float32 ``[count, 2]``; symmetric: (code, less the middle, that the largest
            magnitude is put on, unused), else (steps over the range, shift of the zero point).
            The first is the plain fit.
        scale: float32 ``[rows, groups]``, filled with float16 values; signed if symmetric.
        zero: float32 ``[rows, groups]``, filled with whole numbers.

    Returns:
        How many weights are beyond float16, or NaN.
    """
    beyond = 0
    x = np.empty((n, LANES), dtype=np.float32)
    s = np.empty((ROWS, LANES), dtype=np.float32)
    low, high = np.empty(LANES, dtype=np.float32), np.empty(LANES, dtype=np.float32)
    best = np.empty((3, LANES), dtype=np.float32)  # scale, least code, error of the best try
    plain = np.empty((3, LANES), dtype=np.float32)  # the same of the plain fit
    for row in range(begin, end, LANES):
        for group in range(scale.shape[1]):
            column = group * n
            beyond += load(weight, row, column, n, x, low, high)
            best[2] = WORST
            for attempt in range(len(tries)):
                for lane in range(LANES):
                    if middle >= 0:
                        peak = low[lane] if -low[lane] > high[lane] else high[lane]
                        step = peak / tries[attempt, 0]
                        least = f4(-middle)
                    else:
                        step = (high[lane] - low[lane]) / tries[attempt, 0]
                        shift = tries[attempt, 1] + f4(0.5)
                        least = -np.floor(-low[lane] * inverse_of(step) + shift)
                        least = min(max(least, f4(-top)), f4(0.0))
                    s[STEP, lane] = half(step) if attempt == 0 else step
                    s[LEAST, lane] = least
                    s[MOST, lane] = least + f4(top)
                sums(x, importance, column, n, s)
                for lane in range(LANES):
                    if attempt == 0:
                        plain[0, lane] = s[STEP, lane]
                        plain[1, lane] = s[LEAST, lane]
                        plain[2, lane] = s[WRR, lane]
                    more = s[WQR, lane] / max(s[WQQ, lane], SMALL)
                    error = s[WRR, lane] - more * s[WQR, lane]
                    better = error < best[2, lane]
                    best[0, lane] = s[STEP, lane] + more if better else best[0, lane]
                    best[1, lane] = s[LEAST, lane] if better else best[1, lane]
                    best[2, lane] = error if better else best[2, lane]
            for lane in range(LANES):
                s[STEP, lane] = half(best[0, lane])
                s[LEAST, lane] = best[1, lane]
                s[MOST, lane] = best[1, lane] + f4(top)
            sums(x, importance, column, n, s)
            for lane in range(min(LANES, end - row)):
                better = s[WRR, lane] < plain[2, lane]
                scale[row + lane, group] = s[STEP, lane] if better else plain[0, lane]
                zero[row + lane, group] = -s[LEAST, lane] if better else -plain[1, lane]
    return beyond


@kernel
def encode(weight, n, top, scale, zero, begin, end, codes):
    """uint8 codes 0..top of rows begin..end: ``round(w / scale) + zero``, clipped.

    Slices and the int32 in between let the loop become SIMD.
    """
    limit = f4(top)
    for row in range(begin, end):
        for group in range(scale.shape[1]):
            step, shift = scale[row, group], zero[row, group]
            inverse = inverse_of(step)
            values = weight[row, group * n : group * n + n]
            out = codes[row, group * n : group * n + n]
            for i in range(n):
                q = np.floor(values[i] * inverse + f4(0.5)) + shift
                out[i] = np.uint8(np.int32(min(max(q, f4(0.0)), limit)))


@kernel
def decode(codes, n, scale, zero, begin, end, weight):
    """``(code - zero) * scale`` of rows begin..end, float32."""
    for row in range(begin, end):
        for group in range(scale.shape[1]):
            step, shift = scale[row, group], zero[row, group]
            for column in range(group * n, group * n + n):
                weight[row, column] = (f4(codes[row, column]) - shift) * step
