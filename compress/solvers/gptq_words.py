"""Rounds columns, four at a time, to the words of a codebook; see ``rounding``.

With ``x`` a row's weights corrected for the columns before, the next four columns minimize
``Σ_k D_k (x_k - q_k + Σ_{j<k} (w_j - q_j) U_jk)²`` over the words q (k and j run over these four).
That is ``(t - q) M (t - q)ᵀ`` with ``M = U D Uᵀ`` and a target t found by substitution: the nearest
word in a metric that includes how the four errors compensate each other. Costs of pairs of columns
are tabulated; the cross term of the two pairs takes two more products for each word.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np

from compress.grids.lanes import LANES, WORST, f4, kernel

WORD, LEVELS, PAIRS = 4, 8, 64


@kernel
def metric_of(feedback, variances, k, metric):
    """``U D Uᵀ`` of columns k..k+3."""
    for i in range(WORD):
        for j in range(WORD):
            total = f4(0.0)
            for m in range(max(i, j), WORD):
                left = feedback[k + i, k + m] if m > i else f4(1.0)
                right = feedback[k + j, k + m] if m > j else f4(1.0)
                total += left * right * variances[k + m]
            metric[i, j] = total


@kernel
def aim(x, w, feedback, k, t, signs):
    """Fill the target of columns k..k+3, given their ``x`` and ``w``, and its signs."""
    for i in range(WORD):
        for lane in range(LANES):
            t[i, lane] = x[i, lane]
        for j in range(i):
            share = feedback[k + j, k + i]
            for lane in range(LANES):
                t[i, lane] += (w[j, lane] - t[j, lane]) * share
    for i in range(WORD):
        for lane in range(LANES):
            signs[i, lane] = f4(-1.0) if t[i, lane] < f4(0.0) else f4(1.0)


@kernel
def nearest_word(t, signs, scale, metric, book, r, pairs, cost, cell):
    """Find the word nearest to ``t`` in the metric, with given signs: its cost, and its cell (three
    bits for the level of each column, the first column lowest).

    ``r``: residuals of all levels; ``pairs``: costs of the first and of the last two columns, and
    the cost that the last two add per unit of ``r`` of the first and of the second column.
    """
    levels, starts, partners = book
    one, two, near, far = pairs[0], pairs[1], pairs[2], pairs[3]
    for i in range(WORD):
        for level in range(LEVELS):
            for lane in range(LANES):
                r[i, level, lane] = t[i, lane] - signs[i, lane] * scale[lane] * levels[level]
    for k in range(PAIRS):
        a, b, c, d = r[0, k & 7], r[1, k >> 3], r[2, k & 7], r[3, k >> 3]
        for lane in range(LANES):
            one[k, lane] = (
                metric[0, 0] * a[lane] * a[lane]
                + metric[1, 1] * b[lane] * b[lane]
                + f4(2.0) * metric[0, 1] * a[lane] * b[lane]
            )
            two[k, lane] = (
                metric[2, 2] * c[lane] * c[lane]
                + metric[3, 3] * d[lane] * d[lane]
                + f4(2.0) * metric[2, 3] * c[lane] * d[lane]
            )
            near[k, lane] = f4(2.0) * (metric[0, 2] * c[lane] + metric[0, 3] * d[lane])
            far[k, lane] = f4(2.0) * (metric[1, 2] * c[lane] + metric[1, 3] * d[lane])
    cost[:] = WORST
    for k in range(PAIRS):
        a, b = r[0, k & 7], r[1, k >> 3]
        for place in range(starts[k], starts[k + 1]):
            pair = partners[place]
            found = np.int32(k | pair << 6)
            for lane in range(LANES):
                between = a[lane] * near[pair, lane] + b[lane] * far[pair, lane]
                total = one[k, lane] + two[pair, lane] + between
                better = total < cost[lane]
                cost[lane] = total if better else cost[lane]
                cell[lane] = found if better else cell[lane]


@kernel
def spell(cell, signs, scale, levels, q, mark):
    """Fill the values of a word and its codes."""
    for i in range(WORD):
        for lane in range(LANES):
            level = (cell[lane] >> np.int32(3 * i)) & np.int32(7)
            q[i, lane] = signs[i, lane] * scale[lane] * levels[level]
            mark[i, lane] = level if signs[i, lane] > f4(0.0) else level + np.int32(8)


@kernel
def match_signs(t, metric, parity, signs):
    """Flip the sign of least cost where the product of all signs is not ``parity``."""
    for lane in range(LANES):
        product = signs[0, lane] * signs[1, lane] * signs[2, lane] * signs[3, lane]
        if product != parity[lane]:
            turned, least = 0, WORST
            for i in range(WORD):
                cost = metric[i, i] * abs(t[i, lane])
                if cost < least:
                    turned, least = i, cost
            signs[turned, lane] = -signs[turned, lane]


@kernel
def round_four(x, w, feedback, variances, k, scale, book, work, best, mark):
    """Round columns k..k+3 with unconstrained signs, those of the target.

    ``x``, ``w``: float32 ``[4, LANES]``; ``best`` (values), ``mark`` (codes): filled.
    """
    t, signs, metric, cost, cell, _, _, r, pairs, _ = work
    metric_of(feedback, variances, k, metric)
    aim(x, w, feedback, k, t, signs)
    nearest_word(t, signs, scale, metric, book, r, pairs, cost[0], cell)
    spell(cell, signs, scale, book[0], best, mark)


@kernel
def round_eight(x, w, feedback, variances, k, scale, book, work, best, mark):
    """Round columns k..k+7 with an even number of minus signs: both halves with either parity, and
    the better result. Otherwise as ``round_four``."""
    t, signs, metric, cost, cell, trial, code, r, pairs, rest = work
    parity = cost[3]
    cost[0] = WORST
    for attempt in range(2):
        metric_of(feedback, variances, k, metric)
        aim(x, w, feedback, k, t, signs)
        for lane in range(LANES):
            product = signs[0, lane] * signs[1, lane] * signs[2, lane] * signs[3, lane]
            parity[lane] = -product if attempt else product
        match_signs(t, metric, parity, signs)
        nearest_word(t, signs, scale, metric, book, r, pairs, cost[1], cell)
        spell(cell, signs, scale, book[0], trial[:4], code[:4])
        for i in range(WORD):
            rest[i] = x[WORD + i]
            for j in range(WORD):
                share = feedback[k + j, k + WORD + i]
                for lane in range(LANES):
                    rest[i, lane] += (w[j, lane] - trial[j, lane]) * share
        metric_of(feedback, variances, k + WORD, metric)
        aim(rest, w[WORD:], feedback, k + WORD, t, signs)
        match_signs(t, metric, parity, signs)
        nearest_word(t, signs, scale, metric, book, r, pairs, cost[2], cell)
        spell(cell, signs, scale, book[0], trial[4:], code[4:])
        for lane in range(LANES):
            cost[1, lane] += cost[2, lane]
        keep_better(cost[1], cost[0], trial, code, best, mark)


@kernel
def keep_better(cost, least, trial, code, best, mark):
    """Copy the trial in the lanes where its cost is lower."""
    for i in range(len(best)):
        for lane in range(LANES):
            better = cost[lane] < least[lane]
            best[i, lane] = trial[i, lane] if better else best[i, lane]
            mark[i, lane] = code[i, lane] if better else mark[i, lane]
    for lane in range(LANES):
        least[lane] = min(cost[lane], least[lane])


@kernel
def workspace():
    """Work arrays: target, signs, metric, costs, cells, values and codes of a trial, r and pairs of
    ``nearest_word``, and the inputs of the last four of eight columns."""
    return (
        np.empty((WORD, LANES), np.float32),
        np.empty((WORD, LANES), np.float32),
        np.empty((WORD, WORD), np.float32),
        np.empty((4, LANES), np.float32),
        np.zeros(LANES, np.int32),
        np.empty((2 * WORD, LANES), np.float32),
        np.empty((2 * WORD, LANES), np.int32),
        np.empty((WORD, LEVELS, LANES), np.float32),
        np.empty((4, PAIRS, LANES), np.float32),
        np.empty((WORD, LANES), np.float32),
    )


@kernel
def sweep_words(
    weight, carried, feedback, variances, run, scale, book, even, begin, end, codes, errors
):
    """Round columns 0..n-1 in this order, four at a time, rows begin..end.

    Args:
        weight, carried, feedback, run, errors: as ``rounding.sweep``.
        variances: float32 ``[n]``.
        scale: float32 ``[rows, runs]``.
        book, even: levels, starts and partners, and even, of ``compress.grids.Codebook``.
        codes: uint8 ``[rows, n]``, filled: the level, plus 8 for minus.
    """
    n, size = len(run), 2 * WORD if even else WORD
    x = np.empty((n, LANES), np.float32)
    left = np.empty((n, LANES), np.float32)
    step = np.empty(LANES, np.float32)
    best = np.empty((size, LANES), np.float32)
    mark = np.zeros((size, LANES), np.int32)
    work = workspace()
    for row in range(begin, end, LANES):
        for lane in range(LANES):
            source = min(row + lane, end - 1)
            for k in range(n):
                left[k, lane] = weight[source, k]
                x[k, lane] = left[k, lane] + carried[source, k]
        for k in range(0, n, size):
            for lane in range(LANES):
                step[lane] = scale[min(row + lane, end - 1), run[k]]
            here, now = x[k : k + size], left[k : k + size]
            if even:
                round_eight(here, now, feedback, variances, k, step, book, work, best, mark)
            else:
                round_four(here, now, feedback, variances, k, step, book, work, best, mark)
            for j in range(size):
                for lane in range(LANES):
                    now[j, lane] -= best[j, lane]
                for i in range(k + size, n):
                    share = feedback[k + j, i]
                    for lane in range(LANES):
                        x[i, lane] += now[j, lane] * share
            for lane in range(min(LANES, end - row)):
                for i in range(size):
                    codes[row + lane, k + i] = np.uint8(mark[i, lane])
        for lane in range(min(LANES, end - row)):
            for k in range(n):
                errors[row + lane, k] = left[k, lane]
