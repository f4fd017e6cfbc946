"""Numba kernels of palettes: one-dimensional k-means by dynamic programming; nearest entries."""

# mypy: allow-untyped-defs

from __future__ import annotations

from functools import partial

import numpy as np

from compress.grids import lanes

EXACT = 1024  # groups of up to this many values are clustered value by value
COARSE = 256  # bins of equal width,
FINE = 768  # and the number of cuts within them (more at 6 and 8 bits)

kernel = partial(lanes.kernel, fastmath=())  # cancellation in sums of squares needs exact order


@kernel
def fit_groups(weight, shares, fine, begin, end, lut):
    """Fit the palettes of some groups, ``lut`` float64 ``[groups, levels]``, to ``weight``
    ``[rows, columns]``."""
    rows = weight.shape[0] // lut.shape[0]
    for group in range(begin, end):
        values = weight[group * rows : (group + 1) * rows]
        middle = np.float64(0)  # subtracted before squares are summed, for precision
        for row in range(rows):
            for column in range(values.shape[1]):
                middle += values[row, column]
        middle /= values.size
        if values.size <= EXACT:
            mass, first, second = _sorted_points(values, shares, middle)
        else:
            mass, first, second = _histogram(values, shares, middle, fine)
            if mass.size <= lut.shape[1]:  # few points: two distinct values may share a bin
                mass, first, second = _sorted_points(values, shares, middle)
        _cluster(mass, first, second, lut[group])
        for level in range(lut.shape[1]):
            lut[group, level] += middle


@kernel
def _sorted_points(values, shares, middle):
    """One point per distinct value, ascending: sums of weight, weight·x and weight·x²."""
    flat = values.copy().reshape(-1)
    order = np.argsort(flat)
    sums = np.zeros((3, flat.size))
    m = -1
    for i in range(flat.size):
        value = flat[order[i]]
        if i == 0 or value != flat[order[i - 1]]:
            m += 1
        _add(sums, m, np.float64(value) - middle, shares[order[i] % values.shape[1]])
    return sums[0, : m + 1], sums[1, : m + 1], sums[2, : m + 1]


@kernel
def _histogram(values, shares, middle, fine):
    """One point per occupied bin, ascending: sums of weight, weight·x and weight·x².

    Bins of equal width are cut into ``1 + floor(fine * share)`` pieces each, where ``share`` is the
    bin's share of the values.
    """
    low, high = values.min(), values.max()
    if low == high:
        return _sorted_points(values, shares, middle)
    scale = np.float64(COARSE) * (1 - 1e-12) / (np.float64(high) - np.float64(low))
    held = np.zeros(COARSE, np.int64)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            held[int((np.float64(values[row, column]) - low) * scale)] += 1
    pieces = 1 + held * fine // values.size
    start = np.cumsum(pieces) - pieces
    sums = np.zeros((3, pieces.sum()))
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            place = (np.float64(values[row, column]) - low) * scale
            coarse = int(place)
            point = start[coarse] + int((place - coarse) * pieces[coarse])
            _add(sums, point, np.float64(values[row, column]) - middle, shares[column])
    occupied = sums[0] > 0
    return sums[0][occupied], sums[1][occupied], sums[2][occupied]


@kernel
def _add(sums, point, x, share):
    sums[0, point] += share
    sums[1, point] += share * x
    sums[2, point] += share * x * x


@kernel
def _cluster(mass, first, second, centers):
    """Split ascending points into ``len(centers)`` runs of least squared error; fills ``centers``
    with their means.

    ``cost[j]`` is the least error of points ``0..j`` in ``k`` runs; the last of them starts at
    ``split[k, j]``.
    """
    points, levels = mass.size, min(centers.size, mass.size)
    w, wx, wxx = _prefix(mass), _prefix(first), _prefix(second)
    cost = np.empty(points)
    for j in range(points):
        cost[j] = wxx[j + 1] - wx[j + 1] * wx[j + 1] / w[j + 1]
    split = np.zeros((levels, points), np.int32)
    for k in range(1, levels):
        cost = _next_row(w, wx, wxx, cost, k, split[k])
    stop = points
    for k in range(levels - 1, -1, -1):
        start = split[k, stop - 1] if k else 0
        centers[k] = (wx[stop] - wx[start]) / (w[stop] - w[start])
        stop = start
    centers[levels:] = centers[levels - 1]


@kernel
def _prefix(values):
    sums = np.zeros(values.size + 1)
    for i in range(values.size):
        sums[i + 1] = sums[i] + values[i]
    return sums


@kernel
def _next_row(w, wx, wxx, before, k, split):
    """``min over i of before[i - 1] + error(i..j)`` for every ``j >= k``.

    The best ``i`` does not decrease with ``j``: every 2^n-th ``j`` is solved first, which bounds
    the search for those between.
    """
    points = before.size
    after = np.empty(points)
    step = 1
    while step < points - k:
        step *= 2
    done = step * 2  # solved so far: j = k - 1 + multiples of this, within the points
    while step >= 1:
        for j in range(k - 1 + step, points, done):
            low = split[j - step] if j - step >= k else k
            high = split[j + step] if j + step < points else j
            best, best_i = np.inf, low
            for i in range(max(low, k), min(high, j) + 1):
                s = wx[j + 1] - wx[i]
                error = before[i - 1] + (wxx[j + 1] - wxx[i]) - s * s / (w[j + 1] - w[i])
                if error < best:
                    best, best_i = error, i
            after[j] = best
            split[j] = best_i
        done = step
        step //= 2
    return after


@kernel
def encode_rows(weight, lut, begin, end, codes):
    """Nearest entry of each row's ascending table: the number of midpoints below the value.

    Counting all midpoints vectorizes; a binary search does not, and is slower even for 256 entries.
    """
    rows = weight.shape[0] // lut.shape[0]
    for row in range(begin, end):
        table = lut[row // rows]
        codes[row, :] = 0
        for level in range(lut.shape[1] - 1):
            midpoint = (table[level] + table[level + 1]) * np.float32(0.5)
            for column in range(weight.shape[1]):
                codes[row, column] += weight[row, column] > midpoint


@kernel
def decode_groups(codes, lut, weight):
    rows = codes.shape[0] // lut.shape[0]
    for row in range(codes.shape[0]):
        table = lut[row // rows]
        for column in range(codes.shape[1]):
            weight[row, column] = table[codes[row, column]]
