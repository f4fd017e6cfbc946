"""The fits and the rounding of the GGUF block grids, as numba kernels.

Thirty-two rows are worked on at once and the rows are the SIMD lanes: a tile is transposed to
``[columns, LANES]``, every sum of a block then runs down the tile lane by lane, and no sum is ever
horizontal. That is what makes these kernels several times faster than scalar C, and it is why a
row's result depends neither on its neighbours nor on the number of threads.

Two primitives carry everything. ``sums_affine`` and ``sums_symmetric`` round a block at a given
scale (and minimum) and return the sums of the residual ``r = x - decoded`` from which both the
error and the least-squares correction of scale and minimum follow. A search is: these sums at
several scales, best correction kept. A refit is: these sums at the stored parameters, correction
applied, parameters rounded as the file rounds them, best kept.

Squared errors are weighted by ``importance * (x² + spread * mean(x²)) ** (power / 2)``: large
weights matter more than their own size tells, the finding behind llama.cpp's own weights, which
are special cases (power 1 or 2). Power 0 is the plain error.
"""

from __future__ import annotations

from collections.abc import Callable
from math import floor, sqrt
from typing import Any

import numpy as np
from numba import njit

LANES = 32

f4 = np.float32
# Half of the smallest step that any GGUF block can express (an f16 scale of 2**-24): what is
# smaller decodes to zero, and as zero it cannot underflow in the sums.
TINY = f4(2.0**-26)
SMALLEST_HALF = f4(2.0**-24)
LARGEST_HALF = f4(65504.0)
WORST = f4(3e38)

# Full fast-math would assume away the infinities that the guards compare with.
FAST = {"reassoc", "contract", "arcp", "nsz"}


def kernel(function: Callable[..., Any]) -> Any:
    """Compile on first call and cache on disk; where no folder is writable, only compile."""
    try:
        return njit(function, nogil=True, error_model="numpy", fastmath=FAST, cache=True)
    except RuntimeError:
        return njit(function, nogil=True, error_model="numpy", fastmath=FAST)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def half(value):  # type: ignore[no-untyped-def]
    """The float16 nearest to a float32, as a float32; saturates, and keeps non-zero non-zero.

    Veltkamp's splitting leaves the upper 11 bits; below 2**-14 the steps are 2**-24, which
    adding and subtracting 0.5 rounds to. No fast-math here: it would cancel both.
    """
    size = min(abs(value), LARGEST_HALF)
    split = size * f4(8193.0)
    rounded = split - (split - size)
    if size < f4(2.0**-14):
        rounded = (size + f4(0.5)) - f4(0.5)
    if size > f4(0.0):
        rounded = min(max(rounded, SMALLEST_HALF), LARGEST_HALF)
    return -rounded if value < f4(0.0) else rounded


@kernel
def load(weight, row, column, n, importance, power, spread, run, x, w):  # type: ignore[no-untyped-def]
    """A transposed tile of weights and the weights of their errors; missing rows are zeros.

    The mean of the squares is taken over ``run`` columns.
    """
    rows = weight.shape[0]
    for lane in range(LANES):
        source = min(row + lane, rows - 1)
        real = f4(1.0) if row + lane < rows else f4(0.0)
        for i in range(n):
            value = weight[source, column + i] * real
            x[i, lane] = value if abs(value) > TINY else f4(0.0)
    mean = np.empty(LANES, dtype=np.float32)
    for start in range(0, n, run):
        mean[:] = f4(0.0)
        for i in range(start, start + run):
            for lane in range(LANES):
                mean[lane] += x[i, lane] * x[i, lane]
        for lane in range(LANES):
            mean[lane] *= spread / f4(run)
        for i in range(start, start + run):
            factor = importance[column + i]
            for lane in range(LANES):
                square = x[i, lane] * x[i, lane] + mean[lane]
                if power == 2:
                    w[i, lane] = factor * square
                elif power == 1:
                    w[i, lane] = factor * sqrt(square)
                elif power == 3:
                    w[i, lane] = factor * (sqrt(mean[lane]) + abs(x[i, lane]))
                else:
                    w[i, lane] = factor


@kernel
def sums_affine(x, w, start, n, top, scale, low, s):  # type: ignore[no-untyped-def]
    """Round ``x ≈ scale * q + low``, q in 0..top, and sum into rows of ``s``:
    0 w, 1 wq, 2 wq², 3 wr, 4 wqr, 5 wr²."""
    inverse = s[6]
    for lane in range(LANES):
        inverse[lane] = f4(1.0) / scale[lane] if scale[lane] > f4(0.0) else f4(0.0)
    w0, wq, wqq, wr, wqr, wrr = s[0], s[1], s[2], s[3], s[4], s[5]
    s[0:6] = f4(0.0)
    for i in range(start, start + n):
        for lane in range(LANES):
            value = x[i, lane] - low[lane]
            q = f4(floor(value * inverse[lane] + f4(0.5)))
            q = min(max(q, f4(0.0)), top)
            r = value - q * scale[lane]
            t = w[i, lane]
            w0[lane] += t
            wq[lane] += t * q
            wqq[lane] += t * q * q
            wr[lane] += t * r
            wqr[lane] += t * q * r
            wrr[lane] += t * r * r


@kernel
def search_affine(x, w, start, n, top, tries, signed, scale, low, s):  # type: ignore[no-untyped-def]
    """The scale and minimum of each lane that give the least weighted error.

    ``tries`` ``[n, 2]`` are numbers of steps laid over the range of the block, beyond ``top`` or
    short of it, and shifts of the levels in steps; each try gives codes, and these their
    least-squares scale and minimum. The minimum stays <= 0 unless ``signed``. The error comes from sums of ``v = x - low`` (three instead of the five of
    ``sums_affine``): it loses digits to cancellation, but a choice at 5 bits can afford that.
    """
    w0, wq, wqq, wv, wqv, least = s[0], s[1], s[2], s[3], s[4], s[5]
    first, span, inverse = s[6], s[7], s[8]
    for lane in range(LANES):
        first[lane] = x[start, lane] if signed else f4(0.0)
        span[lane] = x[start, lane]
    for i in range(start, start + n):
        for lane in range(LANES):
            first[lane] = min(first[lane], x[i, lane])
            span[lane] = max(span[lane], x[i, lane])
    w0[:] = f4(0.0)
    wv[:] = f4(0.0)
    for i in range(start, start + n):
        for lane in range(LANES):
            w0[lane] += w[i, lane]
            wv[lane] += w[i, lane] * (x[i, lane] - first[lane])
    for lane in range(LANES):
        span[lane] -= first[lane]
        least[lane] = WORST
    for attempt in range(len(tries)):
        steps, shift = tries[attempt, 0], tries[attempt, 1] + f4(0.5)
        for lane in range(LANES):
            inverse[lane] = steps / span[lane] if span[lane] > f4(0.0) else f4(0.0)
        wq[:] = f4(0.0)
        wqq[:] = f4(0.0)
        wqv[:] = f4(0.0)
        for i in range(start, start + n):
            for lane in range(LANES):
                v = x[i, lane] - first[lane]
                q = min(max(f4(floor(v * inverse[lane] + shift)), f4(0.0)), top)
                t = w[i, lane] * q
                wq[lane] += t
                wqq[lane] += t * q
                wqv[lane] += t * v
        for lane in range(LANES):
            slope, lower = correction(w0[lane], wq[lane], wqq[lane], wv[lane], wqv[lane])
            if not signed and first[lane] + lower > f4(0.0):
                lower = -first[lane]
                slope = (wqv[lane] - lower * wq[lane]) / max(wqq[lane], f4(1e-30))
            error = -slope * (
                f4(2.0) * (wqv[lane] - lower * wq[lane]) - slope * wqq[lane]
            ) - lower * (f4(2.0) * wv[lane] - lower * w0[lane])
            better = error < least[lane]
            least[lane] = error if better else least[lane]
            scale[lane] = slope if better else scale[lane]
            low[lane] = first[lane] + lower if better else low[lane]


@kernel
def correction(w0, wq, wqq, wr, wqr):  # type: ignore[no-untyped-def]
    """Least-squares change of (scale, minimum), from the sums; none where it is undetermined."""
    determinant = w0 * wqq - wq * wq
    sound = determinant > f4(1e-5) * w0 * wqq
    inverse = f4(1.0) / determinant if sound else f4(0.0)
    return (w0 * wqr - wq * wr) * inverse, (wqq * wr - wq * wqr) * inverse


@kernel
def fit_affine(weight, importance, power, spread, run, n, top, tries, rounds, begin, end, scale, low):  # type: ignore[no-untyped-def]
    """Blocks with a float16 scale and minimum of their own (Q4_1, Q5_1), rows begin..end.

    Fills ``scale`` and ``low``, float32 ``[rows, blocks]`` holding float16 values.
    """
    x = np.empty((n, LANES), dtype=np.float32)
    w = np.empty((n, LANES), dtype=np.float32)
    s = np.empty((12, LANES), dtype=np.float32)
    now = np.empty((2, LANES), dtype=np.float32)
    kept = np.empty((3, LANES), dtype=np.float32)
    for row in range(begin, end, LANES):
        for block in range(scale.shape[1]):
            load(weight, row, block * n, n, importance, power, spread, run, x, w)
            now[:] = f4(0.0)
            search_affine(x, w, 0, n, top, tries, True, now[0], now[1], s)
            kept[2] = WORST
            for turn in range(rounds + 1):
                for lane in range(LANES):
                    now[0, lane] = half(max(now[0, lane], f4(0.0)))
                    now[1, lane] = half(now[1, lane])
                sums_affine(x, w, 0, n, top, now[0], now[1], s)
                for lane in range(LANES):
                    better = s[5, lane] < kept[2, lane]
                    for k in range(2):
                        kept[k, lane] = now[k, lane] if better else kept[k, lane]
                    kept[2, lane] = s[5, lane] if better else kept[2, lane]
                    more, lower = correction(
                        s[0, lane], s[1, lane], s[2, lane], s[3, lane], s[4, lane]
                    )
                    now[0, lane] += more
                    now[1, lane] += lower
            for lane in range(min(LANES, end - row)):
                scale[row + lane, block] = kept[0, lane]
                low[row + lane, block] = kept[1, lane]


@kernel
def fit_affine_super(  # type: ignore[no-untyped-def]
    weight, importance, power, spread, run, n, top, limit, tries, rounds, begin, end, d, dmin, scales, mins
):
    """Super-blocks of 256 whose sub-blocks of ``n`` have integer scales and minima 0..limit under
    a float16 ``d`` and ``dmin`` (Q4_K, Q5_K, Q2_K): ``w = d * scale * q - dmin * min``.

    Fills ``d``, ``dmin`` (float32 holding float16 values, ``[rows, super-blocks]``) and ``scales``,
    ``mins`` (uint8 ``[rows, sub-blocks]``).
    """
    subs = 256 // n
    x = np.empty((256, LANES), dtype=np.float32)
    w = np.empty((256, LANES), dtype=np.float32)
    s = np.empty((subs, 12, LANES), dtype=np.float32)
    used = np.empty((2, subs, LANES), dtype=np.float32)  # what decodes: scale and minimum
    whole = np.empty((2, subs, LANES), dtype=np.float32)  # as integers
    unit = np.empty((2, LANES), dtype=np.float32)  # d, dmin
    kept = np.empty((2 * subs + 3, LANES), dtype=np.float32)
    a = np.empty((6, LANES), dtype=np.float32)
    for row in range(begin, end, LANES):
        for block in range(d.shape[1]):
            load(weight, row, block * 256, 256, importance, power, spread, run, x, w)
            used[:] = f4(0.0)
            unit[:] = f4(0.0)
            kept[:] = WORST
            for j in range(subs):
                search_affine(x, w, j * n, n, top, tries, False, used[0, j], used[1, j], s[j])
                sums_affine(x, w, j * n, n, top, used[0, j], used[1, j], s[j])
                for lane in range(LANES):
                    more, lower = correction(
                        s[j, 0, lane], s[j, 1, lane], s[j, 2, lane], s[j, 3, lane], s[j, 4, lane]
                    )
                    unit[0, lane] = max(unit[0, lane], (used[0, j, lane] + more) / limit)
                    unit[1, lane] = max(unit[1, lane], -(used[1, j, lane] + lower) / limit)
            for turn in range(rounds + 1):
                for lane in range(LANES):
                    unit[0, lane] = half(unit[0, lane])
                    unit[1, lane] = half(unit[1, lane])
                a[:] = f4(0.0)
                for j in range(subs):
                    to_whole_affine(s[j], used[0, j], used[1, j], unit, limit, whole[0, j], whole[1, j])
                    for lane in range(LANES):
                        used[0, j, lane] = unit[0, lane] * whole[0, j, lane]
                        used[1, j, lane] = -unit[1, lane] * whole[1, j, lane]
                    sums_affine(x, w, j * n, n, top, used[0, j], used[1, j], s[j])
                    for lane in range(LANES):
                        sc, mn = whole[0, j, lane], whole[1, j, lane]
                        a[0, lane] += mn * mn * s[j, 0, lane]
                        a[1, lane] -= sc * mn * s[j, 1, lane]
                        a[2, lane] += sc * sc * s[j, 2, lane]
                        a[3, lane] -= mn * s[j, 3, lane]
                        a[4, lane] += sc * s[j, 4, lane]
                        a[5, lane] += s[j, 5, lane]
                for k in range(2):
                    keep(unit[k], a[5], kept[2 * subs + 2], kept[2 * subs + k])
                    for j in range(subs):
                        keep(whole[k, j], a[5], kept[2 * subs + 2], kept[2 * j + k])
                keep(a[5], a[5], kept[2 * subs + 2], kept[2 * subs + 2])
                for lane in range(LANES):
                    more, lower = correction(
                        a[0, lane], a[1, lane], a[2, lane], a[3, lane], a[4, lane]
                    )
                    unit[0, lane] = max(unit[0, lane] + more, f4(0.0))
                    unit[1, lane] = max(unit[1, lane] + lower, f4(0.0))
            for lane in range(min(LANES, end - row)):
                d[row + lane, block] = kept[2 * subs, lane]
                dmin[row + lane, block] = kept[2 * subs + 1, lane]
                for j in range(subs):
                    scales[row + lane, block * subs + j] = np.uint8(kept[2 * j, lane])
                    mins[row + lane, block * subs + j] = np.uint8(kept[2 * j + 1, lane])


@kernel
def keep(value, error, least, kept):  # type: ignore[no-untyped-def]
    """``kept = value`` in the lanes whose error is below the least so far."""
    for lane in range(LANES):
        kept[lane] = value[lane] if error[lane] < least[lane] else kept[lane]


@kernel
def to_whole_affine(s, scale, low, unit, limit, whole_scale, whole_low):  # type: ignore[no-untyped-def]
    """Integer scale and minimum of a sub-block, in ``unit`` = (d, dmin), for the codes that the
    sums ``s`` at (``scale``, ``low``) were taken with.

    Tries the integers around the least-squares scale, each with the minimum that suits it.
    """
    best = np.empty(LANES, dtype=np.float32)
    best[:] = WORST
    for around in range(-1, 2):
        for lane in range(LANES):
            w0, wq, wqq, wr, wqr = s[0, lane], s[1, lane], s[2, lane], s[3, lane], s[4, lane]
            d, dmin = unit[0, lane], unit[1, lane]
            more, lower = correction(w0, wq, wqq, wr, wqr)
            if low[lane] + lower > f4(0.0):
                lower = -low[lane]
                more = (wqr - lower * wq) / max(wqq, f4(1e-30))
            inverse = f4(1.0) / d if d > f4(0.0) else f4(0.0)
            sc = f4(floor((scale[lane] + more) * inverse + f4(0.5))) + f4(around)
            sc = min(max(sc, f4(0.0)), limit)
            more = sc * d - scale[lane]
            lower = (wr - more * wq) / max(w0, f4(1e-30))
            inverse = f4(1.0) / dmin if dmin > f4(0.0) else f4(0.0)
            mn = f4(floor(-(low[lane] + lower) * inverse + f4(0.5)))
            mn = min(max(mn, f4(0.0)), limit)
            lower = -mn * dmin - low[lane]
            error = -more * (f4(2.0) * (wqr - lower * wq) - more * wqq) - lower * (
                f4(2.0) * wr - lower * w0
            )
            better = error < best[lane]
            best[lane] = error if better else best[lane]
            whole_scale[lane] = sc if better else whole_scale[lane]
            whole_low[lane] = mn if better else whole_low[lane]


@kernel
def sums_symmetric(x, w, start, n, least, most, values, scale, s):  # type: ignore[no-untyped-def]
    """Round ``x ≈ scale * q`` and sum into rows of ``s``: 0 wq², 1 wqr, 2 wr².

    q is an integer in least..most, or, where ``values`` is given, the nearest level of a table:
    ``values[floor(2 * v) + 256]``, exact because every midpoint of its levels is a half-integer.
    """
    wqq, wqr, wrr, inverse = s[0], s[1], s[2], s[3]
    for lane in range(LANES):
        inverse[lane] = f4(1.0) / scale[lane] if scale[lane] != f4(0.0) else f4(0.0)
    s[0:3] = f4(0.0)
    if len(values):
        for i in range(start, start + n):
            for lane in range(LANES):
                v = min(max(x[i, lane] * inverse[lane], f4(-127.75)), f4(127.75))
                q = values[int(floor(v + v)) + 256]
                r = x[i, lane] - q * scale[lane]
                t = w[i, lane]
                wqq[lane] += t * q * q
                wqr[lane] += t * q * r
                wrr[lane] += t * r * r
        return
    for i in range(start, start + n):
        for lane in range(LANES):
            q = f4(floor(x[i, lane] * inverse[lane] + f4(0.5)))
            q = min(max(q, least), most)
            r = x[i, lane] - q * scale[lane]
            t = w[i, lane]
            wqq[lane] += t * q * q
            wqr[lane] += t * q * r
            wrr[lane] += t * r * r


@kernel
def search_symmetric(x, w, start, n, least, most, values, tries, scale, s):  # type: ignore[no-untyped-def]
    """The scale of each lane that gives the least weighted error.

    ``tries`` are the levels that the weight of largest magnitude is put on, negative ones
    included: which sign of the scale suits the block is part of the question.
    """
    peak, step, best = s[4], s[5], s[6]
    peak[:] = f4(0.0)
    for i in range(start, start + n):
        for lane in range(LANES):
            peak[lane] = x[i, lane] if abs(x[i, lane]) > abs(peak[lane]) else peak[lane]
    best[:] = WORST
    for level in tries:
        for lane in range(LANES):
            step[lane] = peak[lane] / level
        sums_symmetric(x, w, start, n, least, most, values, step, s)
        for lane in range(LANES):
            more = s[1, lane] / max(s[0, lane], f4(1e-30))
            error = s[2, lane] - more * s[1, lane]
            better = error < best[lane]
            best[lane] = error if better else best[lane]
            scale[lane] = step[lane] + more if better else scale[lane]


@kernel
def fit_symmetric(  # type: ignore[no-untyped-def]
    weight, importance, power, spread, run, n, least, most, values, tries, rounds, begin, end, d
):
    """Blocks with a float16 scale of their own (Q4_0, Q5_0, Q8_0, IQ4_NL), rows begin..end.

    Fills ``d``, float32 ``[rows, blocks]`` holding float16 values.
    """
    x = np.empty((n, LANES), dtype=np.float32)
    w = np.empty((n, LANES), dtype=np.float32)
    s = np.empty((7, LANES), dtype=np.float32)
    now = np.empty(LANES, dtype=np.float32)
    kept = np.empty((2, LANES), dtype=np.float32)
    for row in range(begin, end, LANES):
        for block in range(d.shape[1]):
            load(weight, row, block * n, n, importance, power, spread, run, x, w)
            now[:] = f4(0.0)
            search_symmetric(x, w, 0, n, least, most, values, tries, now, s)
            kept[:] = WORST
            for _ in range(rounds + 1):
                for lane in range(LANES):
                    now[lane] = half(now[lane])
                sums_symmetric(x, w, 0, n, least, most, values, now, s)
                keep(now, s[2], kept[1], kept[0])
                keep(s[2], s[2], kept[1], kept[1])
                for lane in range(LANES):
                    now[lane] += s[1, lane] / max(s[0, lane], f4(1e-30))
            for lane in range(min(LANES, end - row)):
                d[row + lane, block] = kept[0, lane]


@kernel
def fit_symmetric_super(  # type: ignore[no-untyped-def]
    weight, importance, power, spread, run, n, least, most, limit, tries, rounds, begin, end, d, scales
):
    """Super-blocks of 256 whose sub-blocks of ``n`` have integer scales -limit..limit-1 under a
    float16 ``d`` (Q6_K, Q3_K): ``w = d * scale * q``.

    Fills ``d`` (float32 holding float16 values, ``[rows, super-blocks]``) and ``scales`` (int8
    ``[rows, sub-blocks]``).
    """
    subs = 256 // n
    x = np.empty((256, LANES), dtype=np.float32)
    w = np.empty((256, LANES), dtype=np.float32)
    s = np.empty((subs, 7, LANES), dtype=np.float32)
    used = np.empty((subs, LANES), dtype=np.float32)  # what decodes
    whole = np.empty((subs, LANES), dtype=np.float32)  # as integers
    unit = np.empty(LANES, dtype=np.float32)  # d
    kept = np.empty((subs + 2, LANES), dtype=np.float32)
    a = np.empty((3, LANES), dtype=np.float32)
    values = np.empty(0, dtype=np.float32)
    for row in range(begin, end, LANES):
        for block in range(d.shape[1]):
            load(weight, row, block * 256, 256, importance, power, spread, run, x, w)
            used[:] = f4(0.0)
            unit[:] = f4(0.0)
            kept[:] = WORST
            for j in range(subs):
                search_symmetric(x, w, j * n, n, least, most, values, tries, used[j], s[j])
                for lane in range(LANES):
                    scale = used[j, lane] / -limit
                    unit[lane] = scale if abs(scale) > abs(unit[lane]) else unit[lane]
                    s[j, 1, lane] = f4(0.0)
            for _ in range(rounds + 1):
                for lane in range(LANES):
                    unit[lane] = half(unit[lane])
                a[:] = f4(0.0)
                for j in range(subs):
                    for lane in range(LANES):
                        wish = used[j, lane] + s[j, 1, lane] / max(s[j, 0, lane], f4(1e-30))
                        inverse = f4(1.0) / unit[lane] if unit[lane] != f4(0.0) else f4(0.0)
                        nearest = f4(floor(wish * inverse + f4(0.5)))
                        whole[j, lane] = min(max(nearest, -limit), limit - f4(1.0))
                        used[j, lane] = unit[lane] * whole[j, lane]
                    sums_symmetric(x, w, j * n, n, least, most, values, used[j], s[j])
                    for lane in range(LANES):
                        a[0, lane] += whole[j, lane] * whole[j, lane] * s[j, 0, lane]
                        a[1, lane] += whole[j, lane] * s[j, 1, lane]
                        a[2, lane] += s[j, 2, lane]
                keep(unit, a[2], kept[subs + 1], kept[subs])
                for j in range(subs):
                    keep(whole[j], a[2], kept[subs + 1], kept[j])
                keep(a[2], a[2], kept[subs + 1], kept[subs + 1])
                for lane in range(LANES):
                    unit[lane] += a[1, lane] / max(a[0, lane], f4(1e-30))
            for lane in range(min(LANES, end - row)):
                d[row + lane, block] = kept[subs, lane]
                for j in range(subs):
                    scales[row + lane, block * subs + j] = np.int8(kept[j, lane])


@kernel
def encode_linear(weight, scale, minimum, n, zero, top, begin, end, codes):  # type: ignore[no-untyped-def]
    """Nearest codes 0..top of ``scale * (code - zero) - minimum``, rows begin..end; zero where
    the scale is zero. ``scale`` and ``minimum``: float32 ``[rows, columns / n]``."""
    for row in range(begin, end):
        for block in range(scale.shape[1]):
            step = scale[row, block]
            inverse = f4(1.0) / step if step != f4(0.0) else f4(0.0)
            for i in range(block * n, block * n + n):
                v = (weight[row, i] + minimum[row, block]) * inverse + (zero + f4(0.5))
                codes[row, i] = np.uint8(min(max(f4(floor(v)), f4(0.0)), top))


@kernel
def encode_levels(weight, scale, table, n, begin, end, codes):  # type: ignore[no-untyped-def]
    """Nearest codes of ``scale * level[code]``; ``table`` as for ``sums_symmetric``, of codes."""
    for row in range(begin, end):
        for block in range(scale.shape[1]):
            step = scale[row, block]
            inverse = f4(1.0) / step if step != f4(0.0) else f4(0.0)
            for i in range(block * n, block * n + n):
                v = min(max(weight[row, i] * inverse, f4(-127.75)), f4(127.75))
                codes[row, i] = table[int(floor(v + v)) + 256]
