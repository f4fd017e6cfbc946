"""The fit of the GGUF block grids without a minimum: Q4_0, Q5_0, Q8_0, IQ4_NL, IQ4_XS, Q3_K, Q6_K.

See ``kquant_tiles.py`` for how a fit goes.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np

from compress.grids.kquant_tiles import EQUAL, NEARLY_ZERO, choose_unit, keep, load
from compress.grids.lanes import LANES, WORST, f4, half, inverse_of, kernel


@kernel
def sums_symmetric(x, w, start, n, least, most, values, scale, s):
    """Round ``x ≈ scale * q`` and sum into rows of ``s``: 0 wq², 1 wqr, 2 wr².

    q is an integer in least..most, or, where ``values`` is given, the nearest level of a table:
    ``values[floor(2 v) + 256]``, exact because every midpoint of its levels is a half-integer.
    (An unsigned 32-bit index and a loop of its own are what let the look-up become a gather.)
    """
    wqq, wqr, wrr, inverse, level = s[0], s[1], s[2], s[3], s[4]
    s[0:3] = f4(0.0)
    for lane in range(LANES):
        inverse[lane] = inverse_of(scale[lane])
    for i in range(start, start + n):
        if len(values):
            for lane in range(LANES):
                cell = x[i, lane] * inverse[lane] * f4(2.0) + f4(256.0)
                level[lane] = values[np.uint32(np.int32(min(max(cell, f4(0.0)), f4(511.0))))]
        else:
            for lane in range(LANES):
                q = np.floor(x[i, lane] * inverse[lane] + f4(0.5))
                level[lane] = min(max(q, least), most)
        for lane in range(LANES):
            r = x[i, lane] - level[lane] * scale[lane]
            t = w[i, lane] * level[lane]
            wqq[lane] += t * level[lane]
            wqr[lane] += t * r
            wrr[lane] += w[i, lane] * r * r


@kernel
def search_symmetric(x, w, start, n, least, most, values, tries, scale, s):
    """The scale of each lane that gives the least weighted error.

    ``tries`` are the levels that the weight of largest magnitude is put on, of either sign: which
    sign of the scale suits the block is part of the question.
    """
    peak, step, best = s[5], s[6], s[7]
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
            more = s[1, lane] / max(s[0, lane], NEARLY_ZERO)
            # Of equals the first: sub-blocks that agree share their unit well. What is left by
            # rounding is a part of the sum that it was taken from, and of the weights themselves.
            error = s[2, lane] - more * s[1, lane]
            size = f4(10.0) * s[2, lane] + f4(1e-3) * s[0, lane] * step[lane] * step[lane]
            better = error < best[lane] - EQUAL * size
            best[lane] = error if better else best[lane]
            scale[lane] = step[lane] + more if better else scale[lane]


@kernel
def start_symmetric(x, w, n, least, most, limit, values, tries, units, used, unit, s):
    """The scale of every sub-block by itself (``used``, and ``s`` its sums), and the unit that
    suits all of them."""
    for j in range(len(used)):
        search_symmetric(x, w, j * n, n, least, most, values, tries, used[j], s[j])
        if limit > f4(0.0):
            sums_symmetric(x, w, j * n, n, least, most, values, used[j], s[j])
            for lane in range(LANES):
                used[j, lane] += s[j, 1, lane] / max(s[j, 0, lane], NEARLY_ZERO)
        s[j, 1] = f4(0.0)  # the correction has been made
    unit[:] = used[0]
    if limit > f4(0.0):
        choose_unit(used, s, 0, -limit, -limit, limit - f4(1.0), units, unit)


@kernel
def store_symmetric(x, w, n, least, most, limit, values, unit, whole, used, total, s):
    """Round to what the file stores, and sum up over the block what the unit needs: ``total``,
    rows as in ``sums_symmetric`` with the scale in units for q."""
    for lane in range(LANES):
        unit[lane] = half(unit[lane])
    total[:] = f4(0.0)
    for j in range(len(used)):
        for lane in range(LANES):
            wish = used[j, lane] + s[j, 1, lane] / max(s[j, 0, lane], NEARLY_ZERO)
            nearest = np.floor(wish * inverse_of(unit[lane]) + f4(0.5))
            if limit > f4(0.0):
                whole[j, lane] = min(max(nearest, -limit), limit - f4(1.0))
            used[j, lane] = unit[lane] * whole[j, lane]
        sums_symmetric(x, w, j * n, n, least, most, values, used[j], s[j])
        for lane in range(LANES):
            total[0, lane] += whole[j, lane] * whole[j, lane] * s[j, 0, lane]
            total[1, lane] += whole[j, lane] * s[j, 1, lane]
            total[2, lane] += s[j, 2, lane]


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
    s = np.empty((subs, 8, LANES), dtype=np.float32)
    used = np.empty((subs, LANES), dtype=np.float32)  # the scale that decodes
    whole = np.empty((subs, LANES), dtype=np.float32)
    unit = np.empty(LANES, dtype=np.float32)
    total = np.empty((3, LANES), dtype=np.float32)
    best_whole = np.empty((subs, LANES), dtype=np.float32)
    best_unit = np.empty(LANES, dtype=np.float32)
    error = np.empty(LANES, dtype=np.float32)
    for row in range(begin, end, LANES):
        for block in range(d.shape[1]):
            column = block * columns
            load(weight, importance, row_squares, row, column, columns, power, spread, run, x, w)
            whole[:] = f4(1.0)
            error[:] = WORST
            for start in range(starts):
                some = tries if start == 0 else tries[:1]
                start_symmetric(x, w, n, least, most, limit, values, some, units, used, unit, s)
                for _ in range(refits + 1):
                    store_symmetric(
                        x, w, n, least, most, limit, values, unit, whole, used, total, s
                    )
                    keep(unit, total[2], error, best_unit)
                    for j in range(subs):
                        keep(whole[j], total[2], error, best_whole[j])
                    keep(total[2], total[2], error, error)
                    for lane in range(LANES):
                        unit[lane] += total[1, lane] / max(total[0, lane], NEARLY_ZERO)
            for lane in range(min(LANES, end - row)):
                d[row + lane, block] = best_unit[lane]
                for j in range(subs if limit > f4(0.0) else 0):
                    scales[row + lane, block * subs + j] = np.int8(best_whole[j, lane])
