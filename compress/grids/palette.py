"""Palettes: every weight is an index into a small table of float16 values (Core ML's LUT).

``lut4-g8`` has 16 values for every 8 rows (output channels), ``lut4-tensor`` 16 for the tensor.
The table is the k-means optimum in one dimension, found by dynamic programming instead of by
restarts: over the sorted values when a group is small, over an adaptive histogram when it is
large (each coarse bin is cut in proportion to what it holds, so an outlier costs no resolution).
Nothing is random. The squared error is within 1 % of the optimum (0.1 % up to 4 bits), at about
20 ns per weight for ``lut4-g8`` and 0.6 µs for ``lut8-g8``.

The recurrence is that of Wang & Song, "Ckmeans.1d.dp" (R Journal 3/2, 2011); that the best split
moves monotonically, which makes each of its rows O(m log m), is in Grønlund et al., "Fast exact
k-means, k-medians and Bregman divergence clustering in 1D" (arXiv 1701.07204).
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import numpy as np

from compress.errors import GridError
from compress.grids import Array, Float32, Lattice, Params, Quantized, lanes

EXACT = 1024  # groups of up to this many values are clustered value by value
COARSE = 256  # bins of equal width ...
FINE = 768  # ... and the pieces that they are cut into (at 6 and 8 bits, more)


def make(name: str) -> Palette:
    """``lut4-g8``, ``lut6-g16``, ``lut4-tensor`` …"""
    found = re.fullmatch(r"lut([123468])-(?:g(\d+)|tensor)", name)
    if found is None or found[2] == "0":
        raise GridError(f"there is no grid {name!r}", hint="lut4-g8, lut4-g16, lut4-tensor …")
    return Palette(int(found[1]), int(found[2] or 0))


@dataclass(frozen=True)
class Palette:
    """See the module.

    Attributes:
        bits: of an index: 1, 2, 3, 4, 6 or 8.
        group_rows: rows that share a table; 0 for the whole tensor.
    """

    bits: int
    group_rows: int

    @property
    def name(self) -> str:
        return f"lut{self.bits}-" + (f"g{self.group_rows}" if self.group_rows else "tensor")

    @property
    def span(self) -> int:
        """A table belongs to whole rows."""
        return 0

    @property
    def levels(self) -> int:
        """Values in a table."""
        return 1 << self.bits

    def check(self, shape: tuple[int, int]) -> None:
        """Raise GridError when the groups do not divide the rows."""
        rows = shape[0]
        if self.group_rows and rows % self.group_rows:
            fitting = [size for size in (64, 32, 16, 8, 4, 2, 1) if rows % size == 0]
            fitting = [size for size in fitting if size < self.group_rows] or [1]
            raise GridError(
                f"{self.name}: {rows} rows are not a multiple of {self.group_rows}",
                hint=f"lut{self.bits}-g{fitting[0]} fits, and lut{self.bits}-tensor always does",
            )

    def groups(self, shape: tuple[int, int]) -> int:
        """Tables of a tensor."""
        return shape[0] // (self.group_rows or shape[0])

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Indices, packed without gaps, and float16 tables."""
        indices = (shape[0] * shape[1] * self.bits + 7) // 8
        return indices + self.groups(shape) * self.levels * 2

    def fit(self, weight: Float32, importance: Float32 | None = None) -> Params:
        """Tables of least (weighted) squared error.

        Returns:
            ``lut`` float16 ``[groups, levels]``, ascending. A group with fewer distinct values
            than levels gets them all, the last one repeated.

        Raises:
            GridError: rows that the groups do not divide, a weight that is NaN or beyond float16,
                or an importance that is not a vector of finite numbers >= 0.
        """
        shape = (weight.shape[0], weight.shape[1])
        self.check(shape)
        weight = lanes.checked(weight, self.name)
        shares = lanes.normalized(importance, shape[1], self.name)
        lut = np.empty((self.groups(shape), self.levels), np.float64)
        fine = max(FINE, min(16 * self.levels, 2048))

        def work(begin: int, end: int) -> None:
            _fit_groups(weight, shares, fine, begin, end, lut)

        lanes.over_rows(work, len(lut), unit=1)
        return {"lut": lut.astype(np.float16)}

    def encode(self, weight: Float32, params: Params) -> Array:
        """Nearest table entry, uint8 ``[rows, columns]``; any subset of the columns will do."""
        codes = np.empty(weight.shape, np.uint8)
        table = params["lut"].astype(np.float32)
        weight = np.ascontiguousarray(weight, np.float32)

        def work(begin: int, end: int) -> None:
            _encode_rows(weight, table, begin, end, codes)

        lanes.over_rows(work, len(weight))
        return codes

    def decode(self, codes: Array, params: Params) -> Float32:
        weight = np.empty(codes.shape, np.float32)
        _decode_groups(np.ascontiguousarray(codes), params["lut"].astype(np.float32), weight)
        return weight

    def lattice(self, params: Params) -> Lattice:
        """The tables themselves; see ``compress.grids.LatticeGrid``."""
        none = np.zeros((1, 1), np.float32)
        return Lattice(none + 1, none, params["lut"].astype(np.float32), even=False)

    def pack(self, codes: Array, params: Params) -> dict[str, Array]:
        """``codes`` uint8 ``[rows, columns]`` unpacked, ``lut`` float16 ``[groups, levels]``."""
        return {"codes": codes, **params}

    def quantize(self, weight: Float32, importance: Float32 | None = None) -> Quantized:
        params = self.fit(weight, importance)
        shape = (weight.shape[0], weight.shape[1])
        return Quantized(self.encode(weight, params), params, self, shape)


# --- kernels -------------------------------------------------------------------------------


kernel = partial(lanes.kernel, fastmath=())  # sums of squares that cancel


@kernel
def _fit_groups(weight, shares, fine, begin, end, lut):
    """Some groups of ``lut``, float64 ``[groups, levels]``, from ``weight`` ``[rows, columns]``."""
    rows = weight.shape[0] // lut.shape[0]
    for group in range(begin, end):
        values = weight[group * rows : (group + 1) * rows]
        middle = np.float64(0)  # sums of squares are taken around it, for their precision
        for row in range(rows):
            for column in range(values.shape[1]):
                middle += values[row, column]
        middle /= values.size
        if values.size <= EXACT:
            mass, first, second = _sorted_points(values, shares, middle)
        else:
            mass, first, second = _histogram(values, shares, middle, fine)
            if mass.size <= lut.shape[1]:  # few distinct values: two might have shared a bin
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

    Bins of equal width first; then each is cut into one piece, and one more for every
    ``1 / fine`` of the values that it holds.
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
    """Split ascending points into ``len(centers)`` runs of least squared error; their means.

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

    The best ``i`` does not decrease with ``j``: solving every 2^n-th ``j`` first bounds the
    search for those between.
    """
    points = before.size
    after = np.empty(points)
    step = 1
    while step < points - k:
        step *= 2
    done = step * 2  # the j that are solved are k - 1 + multiples of this, if within the points
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
def _encode_rows(weight, lut, begin, end, codes):
    """Nearest entry of each row's ascending table: how many of its midpoints lie below.

    Counting them all is SIMD; a binary search is not, and is slower even among 256.
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
def _decode_groups(codes, lut, weight):
    rows = codes.shape[0] // lut.shape[0]
    for row in range(codes.shape[0]):
        table = lut[row // rows]
        for column in range(codes.shape[1]):
            weight[row, column] = table[codes[row, column]]
