"""Kernels of the codebook grids that deal in words: which word of four levels is the best.

Rows are the SIMD lanes (``lanes.py``), and two sub-blocks of each row lie beside each other, so
that a tile is ``[columns of a sub-block, WIDE]``: the loops over lanes are short and many here.

The squared error of a word is a sum over its four columns, each with one of eight levels, so it is
one entry of a table of 64 (the first two columns) plus one of another 64. A search over the words
is then a minimum over the entries of the second table that go with each entry of the first: one
load and one minimum per word. What goes with the minimum is carried in the lowest bits of its
mantissa, which makes the choice exact to 2**-16 of the error.

Where the number of minus signs of eight columns has to be even and it is not, exactly one sign is
turned, in either of two words. All ways of turning one are searched along, jointly with the words:
a column that is turned costs ``w (|x| + scale * level)²``, and turning one of the first two columns
leaves the minima over the second table as they are.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np

from compress.grids.lanes import LANES, WORST, f4, kernel

WIDE = 2 * LANES
SUB = 32  # columns that share a scale
LEVELS = 8
PAIRS = 64
HIGHEST = np.int32(0x7F7FFFFF)  # the bits of the largest float32
TURN = 12  # bits of a cell below those that say which column's sign is turned


@kernel
def tabulate(x, w, start, scale, levels, turning, near, far):
    """Squared errors of every level in columns start..start+3: ``near[column, level]``, and
    ``far`` with the sign turned."""
    for i in range(4):
        for level in range(LEVELS):
            value = levels[level]
            for lane in range(WIDE):
                r = x[start + i, lane] - scale[lane] * value
                near[i, level, lane] = w[start + i, lane] * r * r
            if turning:
                for lane in range(WIDE):
                    r = x[start + i, lane] + scale[lane] * value
                    far[i, level, lane] = w[start + i, lane] * r * r


@kernel
def pair_up(one, two, bits):
    """``bits[i + 8 j] = one[i] + two[j]`` as the bits of a float32."""
    pair = bits.view(np.float32)
    for j in range(LEVELS):
        for i in range(LEVELS):
            for lane in range(WIDE):
                pair[i + LEVELS * j, lane] = one[i, lane] + two[j, lane]


@kernel
def pair_turned(near, far, column, bits):
    """As ``pair_up``, one of the two columns turned; the lowest bit says which."""
    pair = bits.view(np.float32)
    for j in range(LEVELS):
        for i in range(LEVELS):
            k = i + LEVELS * j
            for lane in range(WIDE):
                one = far[column, i, lane] + near[column + 1, j, lane]
                two = near[column, i, lane] + far[column + 1, j, lane]
                pair[k, lane] = min(one, two)
                first = np.int32(0) if one < two else np.int32(1)
                bits[k, lane] = (bits[k, lane] & np.int32(-2)) | first


@kernel
def stamp(bits, shift, mask):
    """The number of each pair into the bits above the lowest ``shift`` of its cost."""
    for k in range(PAIRS):
        mark = np.int32(k << shift)
        for lane in range(WIDE):
            low = bits[k, lane] & np.int32((1 << shift) - 1)
            bits[k, lane] = (bits[k, lane] & mask) | mark | low


@kernel
def least_of(bits, partners, begin, end, least):
    """The least of some pairs; ``partners`` come in fours."""
    least[:] = HIGHEST
    for k in range(begin, end, 4):
        a, b, c, d = partners[k], partners[k + 1], partners[k + 2], partners[k + 3]
        for lane in range(WIDE):
            one = min(bits[a, lane], bits[b, lane])
            two = min(bits[c, lane], bits[d, lane])
            least[lane] = min(least[lane], min(one, two))


@kernel
def search_words(first, second, turned, starts, partners, turning, least, cost, cell):
    """The words of least error: ``cost[0]``, ``cell[0]``; with one sign turned ``[1]``.

    A cell is three bits for the level of each column, from the lowest, and above them a bit for
    the column that is turned.

    Args:
        first, second: int32 ``[64, WIDE]``, bits of the errors of two columns each.
        turned: int32 ``[2, 64, WIDE]``, those with one sign turned.
        starts, partners: the second pairs that go with first pair ``a`` are
            ``partners[starts[a] : starts[a + 1]]``.
        least: int32 ``[2, WIDE]``, work space.
    """
    cost[:] = WORST
    first_cost = first.view(np.float32)
    turned_cost = turned[0].view(np.float32)
    second_cost = least.view(np.float32)
    for a in range(PAIRS):
        begin, end = starts[a], starts[a + 1]
        if begin == end:
            continue
        least_of(second, partners, begin, end, least[0])
        for lane in range(WIDE):
            total = first_cost[a, lane] + second_cost[0, lane]
            found = a | (least[0, lane] & np.int32(63)) << np.int32(6)
            better = total < cost[0, lane]
            cost[0, lane] = total if better else cost[0, lane]
            cell[0, lane] = found if better else cell[0, lane]
        if turning:
            for lane in range(WIDE):
                total = turned_cost[a, lane] + second_cost[0, lane]
                column = np.int32(1 << TURN) << (turned[0, a, lane] & np.int32(1))
                found = a | (least[0, lane] & np.int32(63)) << np.int32(6) | column
                better = total < cost[1, lane]
                cost[1, lane] = total if better else cost[1, lane]
                cell[1, lane] = found if better else cell[1, lane]
            least_of(turned[1], partners, begin, end, least[1])
            for lane in range(WIDE):
                total = first_cost[a, lane] + second_cost[1, lane]
                column = np.int32(4 << TURN) << (least[1, lane] & np.int32(1))
                found = a | ((least[1, lane] >> 1) & np.int32(63)) << np.int32(6) | column
                better = total < cost[1, lane]
                cost[1, lane] = total if better else cost[1, lane]
                cell[1, lane] = found if better else cell[1, lane]


@kernel
def round_words(x, w, odd, scale, book, work, cells, s):
    """Round ``|x| ≈ scale * q``: q are words, at most one sign of eight turned.

    Sums into rows of ``s``: 0 wq², 1 wqr, 2 wr², as ``kquant_symmetric.sums_symmetric`` does.

    Args:
        x, w: float32 ``[SUB, WIDE]``, magnitudes and what their squared errors are weighed by.
        odd: int32 ``[SUB / 8, WIDE]``, 1 where a sign has to be turned; empty where none is.
        book: levels, starts, partners; see ``search_words``.
        work: from ``workspace``.
        cells: int32 ``[SUB / 4, WIDE]``, filled.
    """
    levels, starts, partners = book
    near, far, first, second, turned, least, cost, cell = work
    turning = len(odd) > 0
    s[0:3] = f4(0.0)
    for eight in range(0, SUB, 8):
        for word in range(2):
            tabulate(x, w, eight + 4 * word, scale, levels, turning, near, far)
            pair_up(near[0], near[1], first)
            pair_up(near[2], near[3], second)
            stamp(second, 0, np.int32(-64))
            if turning:
                pair_turned(near, far, 0, turned[0])
                pair_turned(near, far, 2, turned[1])
                stamp(turned[1], 1, np.int32(-128))
            search_words(
                first, second, turned, starts, partners, turning, least, cost[word], cell[word]
            )
        if turning:
            turn = odd[eight // 8]
            for lane in range(WIDE):
                here = cost[0, 1, lane] + cost[1, 0, lane] < cost[0, 0, lane] + cost[1, 1, lane]
                one = turn[lane] if here else np.int32(0)
                two = turn[lane] - one
                cell[0, 0, lane] = cell[0, 1, lane] if one else cell[0, 0, lane]
                cell[1, 0, lane] = cell[1, 1, lane] if two else cell[1, 0, lane]
        for word in range(2):
            found = cell[word, 0]
            for lane in range(WIDE):
                cells[eight // 4 + word, lane] = found[lane]
            for i in range(4):
                row = eight + 4 * word + i
                for lane in range(WIDE):
                    level = (found[lane] >> np.int32(3 * i)) & np.int32(7)
                    turned_here = (found[lane] >> np.int32(TURN + i)) & np.int32(1)
                    q = f4(2.0) * f4(level) + f4(1.0)
                    q = levels[7] if level == 7 else q
                    q = -q if turned_here else q
                    r = x[row, lane] - q * scale[lane]
                    t = w[row, lane] * q
                    s[0, lane] += t * q
                    s[1, lane] += t * r
                    s[2, lane] += w[row, lane] * r * r


@kernel
def workspace():
    """Tables of one word: near, far, first, second, turned, least, cost, cell."""
    return (
        np.empty((4, LEVELS, WIDE), np.float32),
        np.empty((4, LEVELS, WIDE), np.float32),
        np.empty((PAIRS, WIDE), np.int32),
        np.empty((PAIRS, WIDE), np.int32),
        np.empty((2, PAIRS, WIDE), np.int32),
        np.empty((2, WIDE), np.int32),
        np.empty((2, 2, WIDE), np.float32),
        np.zeros((2, 2, WIDE), np.int32),
    )
