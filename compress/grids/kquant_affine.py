"""The fit of the GGUF block grids with a minimum: Q4_1, Q5_1, Q2_K, Q4_K, Q5_K.

See ``kquant_tiles.py`` for how a fit goes.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np

from compress.grids.kquant_tiles import EQUAL, NEARLY_ZERO, choose_unit, keep, load
from compress.grids.lanes import LANES, WORST, f4, half, inverse_of, kernel


@kernel
def correction(w0, wq, wqq, wr, wqr):
    """Least-squares change of (scale, minimum), from the sums; where all codes are equal it is
    undetermined, and the scale alone changes (for codes of zero: the minimum)."""
    determinant = w0 * wqq - wq * wq
    if determinant > f4(1e-5) * w0 * wqq:
        inverse = f4(1.0) / determinant
        return (w0 * wqr - wq * wr) * inverse, (wqq * wr - wq * wqr) * inverse
    if wqq > f4(0.0):
        return wqr / wqq, f4(0.0)
    return f4(0.0), wr / max(w0, NEARLY_ZERO)


@kernel
def change_of_error(w0, wq, wqq, wr, wqr, more, lower):
    """How the error changes when scale and minimum change by (more, lower), the codes staying."""
    two = f4(2.0)
    return more * (more * wqq - two * (wqr - lower * wq)) + lower * (lower * w0 - two * wr)


@kernel
def sums_affine(x, w, start, n, top, scale, low, s):
    """Round ``x ≈ scale * q + low``, q in 0..top, and sum into rows of ``s``:
    0 w, 1 wq, 2 wq², 3 wr, 4 wqr, 5 wr²."""
    w0, wq, wqq, wr, wqr, wrr, inverse = s[0], s[1], s[2], s[3], s[4], s[5], s[6]
    s[0:6] = f4(0.0)
    for lane in range(LANES):
        inverse[lane] = inverse_of(scale[lane])
    for i in range(start, start + n):
        for lane in range(LANES):
            value = x[i, lane] - low[lane]
            q = np.floor(value * inverse[lane] + f4(0.5))
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
def search_affine(x, w, start, n, top, tries, signed, scale, low, s):
    """The scale and minimum of each lane that give the least weighted error.

    ``tries`` ``[n, 2]`` are numbers of steps laid over the range of the sub-block, beyond ``top``
    or short of it, and shifts of the levels in steps; each try gives codes, and these their
    least-squares scale and minimum. The minimum stays <= 0 unless ``signed``.

    The sums are those of ``v = x - first`` instead of a residual, two fewer than ``sums_affine``
    takes: digits are lost to cancellation, but a choice at 5 bits can afford that.
    """
    w0, wq, wqq, wv, wqv, error, least = s[0], s[1], s[2], s[3], s[4], s[5], s[6]
    first, span, inverse = s[7], s[8], s[9]
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
    least[:] = WORST
    for attempt in range(len(tries)):
        steps, shift = tries[attempt, 0], tries[attempt, 1] + f4(0.5)
        for lane in range(LANES):
            inverse[lane] = steps * inverse_of(span[lane])
        wq[:] = f4(0.0)
        wqq[:] = f4(0.0)
        wqv[:] = f4(0.0)
        for i in range(start, start + n):
            for lane in range(LANES):
                v = x[i, lane] - first[lane]
                q = min(max(np.floor(v * inverse[lane] + shift), f4(0.0)), top)
                t = w[i, lane] * q
                wq[lane] += t
                wqq[lane] += t * q
                wqv[lane] += t * v
        for lane in range(LANES):
            a, b, c, d, e = w0[lane], wq[lane], wqq[lane], wv[lane], wqv[lane]
            slope, lower = correction(a, b, c, d, e)
            if not signed and first[lane] + lower > f4(0.0):
                lower = -first[lane]
                slope = (e - lower * b) / max(c, NEARLY_ZERO)
            error[lane] = change_of_error(a, b, c, d, e, slope, lower)
            # Of equals the first: sub-blocks that agree share their unit well. (It is negative.)
            better = error[lane] < least[lane] * (f4(1.0) + EQUAL)
            least[lane] = error[lane] if better else least[lane]
            scale[lane] = slope if better else scale[lane]
            low[lane] = first[lane] + lower if better else low[lane]


@kernel
def whole_affine(s, scale, low, unit, limit, whole):
    """Integers 0..limit for scale and minimum of a sub-block, given the units, for the codes that
    the sums ``s`` at (``scale``, ``low``) were taken with.

    Tries the integers around the least-squares scale, each with the minimum that suits it.
    """
    best = np.full(LANES, WORST)
    for around in range(-1, 2):
        for lane in range(LANES):
            w0, wq, wqq, wr, wqr = s[0, lane], s[1, lane], s[2, lane], s[3, lane], s[4, lane]
            more, lower = correction(w0, wq, wqq, wr, wqr)
            if low[lane] + lower > f4(0.0):
                more = (wqr + low[lane] * wq) / max(wqq, NEARLY_ZERO)
            sc = np.floor((scale[lane] + more) * inverse_of(unit[0, lane]) + f4(0.5))
            sc = min(max(f4(sc) + f4(around), f4(0.0)), limit)
            more = sc * unit[0, lane] - scale[lane]
            lower = (wr - more * wq) / max(w0, NEARLY_ZERO)
            mn = np.floor(-(low[lane] + lower) * inverse_of(unit[1, lane]) + f4(0.5))
            mn = min(max(f4(mn), f4(0.0)), limit)
            lower = -mn * unit[1, lane] - low[lane]
            error = change_of_error(w0, wq, wqq, wr, wqr, more, lower)
            better = error < best[lane]
            best[lane] = error if better else best[lane]
            whole[0, lane] = sc if better else whole[0, lane]
            whole[1, lane] = mn if better else whole[1, lane]


@kernel
def start_affine(x, w, n, top, limit, tries, units, used, wishes, unit, s):
    """Scale and minimum of every sub-block by themselves (``used``, and ``s`` their sums), and the
    units that suit all of them."""
    signed = limit == f4(0.0)
    for j in range(len(used)):
        search_affine(x, w, j * n, n, top, tries, signed, used[j, 0], used[j, 1], s[j])
        sums_affine(x, w, j * n, n, top, used[j, 0], used[j, 1], s[j])
        for lane in range(LANES):
            w0, wq, wqq = s[j, 0, lane], s[j, 1, lane], s[j, 2, lane]
            more, lower = correction(w0, wq, wqq, s[j, 3, lane], s[j, 4, lane])
            scale, down = used[j, 0, lane] + more, -used[j, 1, lane] - lower
            wishes[0, j, lane] = max(scale, f4(0.0))
            wishes[1, j, lane] = down if signed else max(down, f4(0.0))
            # what a miss of the scale costs while the minimum makes up for it, and back
            s[j, 7, lane] = wqq - wq * wq / max(w0, NEARLY_ZERO)
            s[j, 8, lane] = w0 - wq * wq / max(wqq, NEARLY_ZERO)
    for k in range(2):
        unit[k] = wishes[k, 0]
        if not signed:
            choose_unit(wishes[k], s, 7 + k, limit, f4(0.0), limit, units, unit[k])


@kernel
def store_affine(x, w, n, top, limit, unit, whole, used, total, s):
    """Round to what the file stores, and sum up over the block what the units need: ``total``,
    rows as in ``sums_affine`` with (scale, -minimum) in units for (q, 1)."""
    for lane in range(LANES):
        unit[0, lane] = half(unit[0, lane])
        unit[1, lane] = half(unit[1, lane])
    total[:] = f4(0.0)
    for j in range(len(used)):
        if limit > f4(0.0):
            whole_affine(s[j], used[j, 0], used[j, 1], unit, limit, whole[j])
        for lane in range(LANES):
            used[j, 0, lane] = unit[0, lane] * whole[j, 0, lane]
            used[j, 1, lane] = -unit[1, lane] * whole[j, 1, lane]
        sums_affine(x, w, j * n, n, top, used[j, 0], used[j, 1], s[j])
        for lane in range(LANES):
            sc, mn = whole[j, 0, lane], -whole[j, 1, lane]
            total[0, lane] += mn * mn * s[j, 0, lane]
            total[1, lane] += sc * mn * s[j, 1, lane]
            total[2, lane] += sc * sc * s[j, 2, lane]
            total[3, lane] += mn * s[j, 3, lane]
            total[4, lane] += sc * s[j, 4, lane]
            total[5, lane] += s[j, 5, lane]


@kernel
def fit_affine(
    weight, importance, row_squares, power, spread, run, tries, units, refits, starts,
    n, top, limit, begin, end, d, dmin, scales, mins,
):  # fmt: skip
    """Fit ``w = d * scale * q - dmin * min``, q in 0..top, to the blocks of rows begin..end.

    Fills ``d``, ``dmin`` (float32 holding float16 values, ``[rows, blocks]``) and, where ``limit``
    is not 0, ``scales`` and ``mins`` (uint8 ``[rows, sub-blocks]``). Without them the minimum may
    be positive (``dmin`` negative). A second start has the first try only.
    """
    columns = weight.shape[1] // d.shape[1]
    subs = columns // n
    x = np.empty((columns, LANES), dtype=np.float32)
    w = np.empty((columns, LANES), dtype=np.float32)
    s = np.empty((subs, 10, LANES), dtype=np.float32)
    used = np.empty((subs, 2, LANES), dtype=np.float32)  # scale and minimum that decode
    wishes = np.empty((2, subs, LANES), dtype=np.float32)  # scale and -minimum before rounding
    whole = np.empty((subs, 2, LANES), dtype=np.float32)
    unit = np.empty((2, LANES), dtype=np.float32)
    total = np.empty((6, LANES), dtype=np.float32)
    best_whole = np.empty((subs, 2, LANES), dtype=np.float32)
    best_unit = np.empty((2, LANES), dtype=np.float32)
    least = np.empty(LANES, dtype=np.float32)
    for row in range(begin, end, LANES):
        for block in range(d.shape[1]):
            column = block * columns
            load(weight, importance, row_squares, row, column, columns, power, spread, run, x, w)
            whole[:] = f4(1.0)
            least[:] = WORST
            for start in range(starts):
                some = tries if start == 0 else tries[:1]
                start_affine(x, w, n, top, limit, some, units, used, wishes, unit, s)
                for _ in range(refits + 1):
                    store_affine(x, w, n, top, limit, unit, whole, used, total, s)
                    for k in range(2):
                        keep(unit[k], total[5], least, best_unit[k])
                        for j in range(subs):
                            keep(whole[j, k], total[5], least, best_whole[j, k])
                    keep(total[5], total[5], least, least)
                    for lane in range(LANES):
                        a, b, c = total[0, lane], total[1, lane], total[2, lane]
                        more, lower = correction(a, b, c, total[3, lane], total[4, lane])
                        unit[0, lane] = max(unit[0, lane] + more, f4(0.0))
                        unit[1, lane] += lower
                        if limit > f4(0.0):
                            unit[1, lane] = max(unit[1, lane], f4(0.0))
            for lane in range(min(LANES, end - row)):
                d[row + lane, block] = best_unit[0, lane]
                dmin[row + lane, block] = best_unit[1, lane]
                for j in range(subs if limit > f4(0.0) else 0):
                    scales[row + lane, block * subs + j] = np.uint8(best_whole[j, 0, lane])
                    mins[row + lane, block * subs + j] = np.uint8(best_whole[j, 1, lane])
