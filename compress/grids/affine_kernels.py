"""Numba kernels of the uniform integer grids: fit, encode, decode.

Rows are the SIMD lanes (``lanes.py``): 32 rows are transposed to a tile ``[columns, LANES]``, and
sums run over the columns of the tile, separately in each lane. So the result of a row depends
neither on other rows nor on the number of threads.

The search tries a few scales (and zero points) per group. Each try rounds the group to codes once;
the sums of the residual ``r = w - scale * q`` give both the error and the least-squares scale for
these codes, so that a few tries replace dozens of evenly spaced scales. The best scale is rounded
to float16, and used only if its error after that is below the error of the plain fit, which maps
the extremes of the group to the extreme codes.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from functools import partial

import numpy as np

from compress.grids import lanes
from compress.grids.lanes import LANES, LARGEST_HALF, WORST, f4, half, inverse_of

# Without "reassoc", which may expand the squared residuals and so lose digits to cancellation.
kernel = partial(lanes.kernel, fastmath=("contract", "arcp", "nsz"))
SMALL = f4(1e-30)
# Rows of a group's work array, with one column per lane.
WQQ, WQR, WRR, INVERSE, STEP, LEAST, MOST, ROWS = range(8)


@kernel
def load(weight, row, column, n, x, low, high):
    """Transpose rows to a tile (missing rows are zeros); find each lane's minimum and maximum.

    The minimum is at most 0 and the maximum at least 0.

    Returns:
        The number of values that exceed float16's range or are NaN.
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
    """Round ``x ≈ STEP * q``, q in LEAST..MOST of each lane; sums go to rows WQQ, WQR, WRR of
    ``s``.

    All quantities are rows of one array: with one base pointer the loop needs no checks for
    overlap.
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
    """Fit scales (and zero points) of groups of ``n`` columns, for rows begin..end.

    Args:
        weight: float32 ``[rows, columns]``.
        importance: float32 ``[columns]``; empty for equal weights.
        middle: the zero point of a symmetric grid, or -1 for a zero point per group.
        top: the largest code.
        tries: float32 ``[count, 2]``; symmetric: (code minus ``middle`` to which the largest
            magnitude is mapped, unused), else (steps over the range, shift of the zero point).
            The first is the plain fit.
        scale: float32 ``[rows, groups]``, filled with float16 values; signed if symmetric.
        zero: float32 ``[rows, groups]``, filled with whole numbers.

    Returns:
        The number of weights that exceed float16's range or are NaN.
    """
    beyond = 0
    x = np.empty((n, LANES), dtype=np.float32)
    s = np.empty((ROWS, LANES), dtype=np.float32)
    low, high = np.empty(LANES, dtype=np.float32), np.empty(LANES, dtype=np.float32)
    best = np.empty((3, LANES), dtype=np.float32)  # scale, lowest code, error of the best try
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
    """Codes of rows begin..end, uint8 0..top: ``round(w / scale) + zero``, clipped.

    Slices and the intermediate int32 allow LLVM to vectorize the loop.
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
    """Decode rows begin..end to float32: ``(code - zero) * scale``."""
    for row in range(begin, end):
        for group in range(scale.shape[1]):
            step, shift = scale[row, group], zero[row, group]
            for column in range(group * n, group * n + n):
                weight[row, column] = (f4(codes[row, column]) - shift) * step
