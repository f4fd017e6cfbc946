"""Numba kernels of the codebook grids: the best word of four levels, the fit of a block, encoding.

Rows are the SIMD lanes (``lanes.py``), and a tile holds two adjacent sub-blocks of each row:
``[columns of a sub-block, WIDE]`` with ``WIDE = 2 * LANES``. ``codebook.py`` describes the fit.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np

from compress.grids.kquant_kernels import NEARLY_ZERO, keep, load
from compress.grids.lanes import LANES, WORST, f4, half, inverse_of, kernel

WIDE = 2 * LANES
SUB = 32  # columns that share a scale
LEVELS, PAIRS = 8, 64
HIGHEST = np.int32(0x7F7FFFFF)  # the bits of the largest float32
TURN = 12  # bits of a cell below the bits that mark the column with a flipped sign


@kernel
def tabulate(x, w, start, scale, levels, turning, near, far):
    """Weighted squared errors of all levels in columns start..start+3, ``near[column, level]``.

    ``far`` has the errors with the column's sign flipped.
    """
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
    """Errors of pairs of levels: ``bits[i + 8 j] = one[i] + two[j]``, a float32 stored as int32."""
    pair = bits.view(np.float32)
    for j in range(LEVELS):
        for i in range(LEVELS):
            for lane in range(WIDE):
                pair[i + LEVELS * j, lane] = one[i, lane] + two[j, lane]


@kernel
def pair_turned(near, far, column, bits):
    """As ``pair_up`` with the sign of one column flipped; the lowest bit is that column's index."""
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
    """Write the index of each pair into its cost, in the bits above the lowest ``shift``.

    The minimum of such costs then also gives the index.
    """
    for k in range(PAIRS):
        mark = np.int32(k << shift)
        for lane in range(WIDE):
            low = bits[k, lane] & np.int32((1 << shift) - 1)
            bits[k, lane] = (bits[k, lane] & mask) | mark | low


@kernel
def least_of(bits, partners, begin, end, least):
    """The minimum of ``bits`` over ``partners[begin:end]``, whose length is a multiple of 4."""
    least[:] = HIGHEST
    for k in range(begin, end, 4):
        a, b, c, d = partners[k], partners[k + 1], partners[k + 2], partners[k + 3]
        for lane in range(WIDE):
            one = min(bits[a, lane], bits[b, lane])
            two = min(bits[c, lane], bits[d, lane])
            least[lane] = min(least[lane], min(one, two))


@kernel
def search_words(first, second, turned, starts, partners, turning, least, cost, cell):
    """The words of least error: ``cost[0]``, ``cell[0]``; with one sign flipped ``[1]``.

    A cell has three bits for the level of each column, the first column lowest, and above them one
    bit per column, set for the column with the flipped sign.

    Args:
        first, second: int32 ``[64, WIDE]``, bits of the errors of two columns each.
        turned: int32 ``[2, 64, WIDE]``, the same with one sign flipped.
        starts, partners: the second pairs that form words with first pair ``a`` are
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
    """Round ``|x| ≈ scale * q`` to words, with at most one of eight signs flipped.

    Rows of ``s`` receive the sums 0 wq², 1 wqr, 2 wr², as in ``kquant_kernels.sums_symmetric``.

    Args:
        x, w: float32 ``[SUB, WIDE]``, magnitudes and the weights of their squared errors.
        odd: int32 ``[SUB / 8, WIDE]``, 1 where a sign must be flipped; empty where none is.
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
    """Work arrays for one word: near, far, first, second, turned, least, cost, cell."""
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


LARGEST = f4(31.0)  # an integer scale is odd, up to this: 2 * 15 + 1


@kernel
def lay_out(tile, weights, x, w, signs, odd):
    """Arrange a tile's sub-blocks in pairs.

    Fills ``x`` (magnitudes), ``w`` and ``signs`` (1 for minus), each ``[pairs, SUB, WIDE]``, and,
    unless it is empty, ``odd``: the parity of the minus signs in eight columns.
    """
    odd[:] = np.int32(0)
    for pair in range(len(x)):
        for i in range(SUB):
            for part in range(2):
                column = (2 * pair + part) * SUB + i
                for lane in range(LANES):
                    value = tile[column, lane]
                    x[pair, i, part * LANES + lane] = abs(value)
                    w[pair, i, part * LANES + lane] = weights[column, lane]
                    minus = np.int32(1) if value < f4(0.0) else np.int32(0)
                    signs[pair, i, part * LANES + lane] = minus
            if odd.shape[1]:
                for lane in range(WIDE):
                    odd[pair, i // 8, lane] ^= signs[pair, i, lane]


@kernel
def search_scales(x, w, odd, tries, book, work, cells, s, wish, rest, stiff):
    """Round sub-blocks at the scale of each try, and describe the error as a parabola of the scale.

    Fills, each ``[tries, WIDE]``: ``wish``, the least-squares scale of the words found; ``rest``,
    the error at that scale; ``stiff``, its second-order coefficient.

    ``tries`` are the levels to which the largest magnitude is mapped.
    """
    peak, step = s[3], s[4]
    peak[:] = f4(0.0)
    for i in range(SUB):
        for lane in range(WIDE):
            peak[lane] = max(peak[lane], x[i, lane])
    for t in range(len(tries)):
        for lane in range(WIDE):
            step[lane] = peak[lane] / tries[t]
        round_words(x, w, odd, step, book, work, cells, s)
        for lane in range(WIDE):
            more = s[1, lane] / max(s[0, lane], NEARLY_ZERO)
            wish[t, lane] = step[lane] + more
            rest[t, lane] = s[2, lane] - more * s[1, lane]
            stiff[t, lane] = s[0, lane]


@kernel
def choose_scales(wish, rest, stiff, units, unit, whole):
    """Choose a block's unit and the odd multiples 1..31 of it that are the sub-blocks' scales.

    The unit is the largest least-squares scale divided by one of ``units``: the one of least total
    error, estimated with the parabolas of ``search_scales``.

    ``wish``, ``rest``, ``stiff``: ``[pairs, tries, WIDE]``; ``whole``, the multiples:
    ``[sub-blocks, LANES]``.
    """
    tries, subs = wish.shape[1], len(whole)
    peak = np.zeros(LANES, np.float32)
    chosen = np.zeros(LANES, np.float32)
    least = np.empty(LANES, np.float32)
    total = np.empty(LANES, np.float32)
    best = np.full(LANES, WORST)
    multiples = np.ones((subs, LANES), np.float32)
    for j in range(subs):
        least[:] = WORST
        for t in range(tries):
            lanes = slice(j % 2 * LANES, j % 2 * LANES + LANES)
            errors = rest[j // 2, t, lanes]
            keep(wish[j // 2, t, lanes], errors, least, chosen)
            keep(errors, errors, least, least)
        for lane in range(LANES):
            peak[lane] = max(peak[lane], chosen[lane])
    for divisor in units:
        total[:] = f4(0.0)
        for j in range(subs):
            least[:] = WORST
            for t in range(tries):
                lanes = slice(j % 2 * LANES, j % 2 * LANES + LANES)
                wanted = wish[j // 2, t, lanes]
                errors = rest[j // 2, t, lanes]
                growth = stiff[j // 2, t, lanes]
                for lane in range(LANES):
                    d = peak[lane] / divisor
                    steps = np.floor(wanted[lane] * inverse_of(d) * f4(0.5))
                    multiple = min(max(f4(2.0) * steps + f4(1.0), f4(1.0)), LARGEST)
                    miss = multiple * d - wanted[lane]
                    error = errors[lane] + growth[lane] * miss * miss
                    better = error < least[lane]
                    least[lane] = error if better else least[lane]
                    multiples[j, lane] = multiple if better else multiples[j, lane]
            for lane in range(LANES):
                total[lane] += least[lane]
        for j in range(subs):
            keep(multiples[j], total, best, whole[j])
        for lane in range(LANES):
            better = total[lane] < best[lane]
            best[lane] = total[lane] if better else best[lane]
            unit[lane] = peak[lane] / divisor if better else unit[lane]


@kernel
def settle_scales(x, w, odd, book, work, cells, steps, s, unit, whole, sums):
    """Replace each multiple by the best of itself and its ``steps`` neighbours on either side.

    Each is rounded with the unit as stored. ``unit``, ``whole``: ``[WIDE]``; ``sums[3, WIDE]``: the
    sums of ``round_words`` with the multiple for the scale.
    """
    scale, multiple, centre = s[3], s[4], s[5]
    for lane in range(WIDE):
        sums[2, lane] = WORST
        centre[lane] = whole[lane]
    for step in range(-steps, steps + 1):
        for lane in range(WIDE):
            multiple[lane] = min(max(centre[lane] + f4(2 * step), f4(1.0)), LARGEST)
            scale[lane] = multiple[lane] * unit[lane]
        round_words(x, w, odd, scale, book, work, cells, s)
        for lane in range(WIDE):
            better = s[2, lane] < sums[2, lane]
            whole[lane] = multiple[lane] if better else whole[lane]
            times = multiple[lane]
            sums[0, lane] = times * times * s[0, lane] if better else sums[0, lane]
            sums[1, lane] = times * s[1, lane] if better else sums[1, lane]
            sums[2, lane] = s[2, lane] if better else sums[2, lane]


@kernel
def fit_words(
    weight, importance, power, spread, run, tries, units, refits, even, book,
    begin, end, d, scales, codes,
):  # fmt: skip
    """Fit ``w = d * (2 scale + 1) * word`` to the blocks of rows begin..end.

    Fills ``d`` (float32 holding float16 values, ``[rows, blocks]``), ``scales`` (uint8
    ``[rows, sub-blocks]``, 0..15) and ``codes`` (uint8 ``[rows, columns]``, level index, plus 8 if
    negative).
    """
    columns = weight.shape[1] // d.shape[1]
    subs, pairs = columns // SUB, columns // SUB // 2
    tile, weights, x, w, signs, odd, cells = tiles(columns, even)
    s = np.empty((6, WIDE), np.float32)
    wish = np.empty((pairs, len(tries), WIDE), np.float32)
    rest = np.empty((pairs, len(tries), WIDE), np.float32)
    stiff = np.empty((pairs, len(tries), WIDE), np.float32)
    whole = np.empty((subs, LANES), np.float32)
    unit = np.empty(LANES, np.float32)
    error = np.empty(LANES, np.float32)
    best_unit = np.empty(LANES, np.float32)
    best_whole = np.empty((subs, LANES), np.float32)
    wide_whole, wide_best = whole.reshape((pairs, WIDE)), best_whole.reshape((pairs, WIDE))
    wide_unit = np.empty(WIDE, np.float32)
    sums = np.empty((3, WIDE), np.float32)
    total = np.empty((3, LANES), np.float32)
    work = workspace()
    row_squares = np.empty(0, np.float32)
    for row in range(begin, end, LANES):
        for block in range(d.shape[1]):
            column = block * columns
            load(
                weight, importance, row_squares, row, column, columns, power, spread, run,
                tile, weights,
            )  # fmt: skip
            lay_out(tile, weights, x, w, signs, odd)
            for pair in range(pairs):
                search_scales(
                    x[pair], w[pair], odd[pair], tries, book, work, cells[pair], s,
                    wish[pair], rest[pair], stiff[pair],
                )  # fmt: skip
            choose_scales(wish, rest, stiff, units, unit, whole)
            error[:] = WORST
            for refit in range(refits + 1):
                steps = min(refits - refit, 1)  # neighbours are tried in all but the last round
                for lane in range(LANES):
                    unit[lane] = half(unit[lane])
                    wide_unit[lane] = wide_unit[LANES + lane] = unit[lane]
                total[:] = f4(0.0)
                for pair in range(pairs):
                    settle_scales(
                        x[pair], w[pair], odd[pair], book, work, cells[pair], steps,
                        s, wide_unit, wide_whole[pair], sums,
                    )  # fmt: skip
                    for k in range(3):
                        for lane in range(LANES):
                            total[k, lane] += sums[k, lane] + sums[k, LANES + lane]
                keep(unit, total[2], error, best_unit)
                for j in range(subs):
                    keep(whole[j], total[2], error, best_whole[j])
                keep(total[2], total[2], error, error)
                for lane in range(LANES):
                    unit[lane] += total[1, lane] / max(total[0, lane], NEARLY_ZERO)
            # Round once more with the best parameters, to get their words.
            for lane in range(LANES):
                wide_unit[lane] = wide_unit[LANES + lane] = best_unit[lane]
            for pair in range(pairs):
                settle_scales(
                    x[pair], w[pair], odd[pair], book, work, cells[pair], steps,
                    s, wide_unit, wide_best[pair], sums,
                )  # fmt: skip
            write_codes(cells, signs, row, end, column, codes)
            for lane in range(min(LANES, end - row)):
                d[row + lane, block] = best_unit[lane]
                for j in range(subs):
                    scales[row + lane, block * subs + j] = np.uint8(best_whole[j, lane] * f4(0.5))


@kernel
def encode_words(weight, importance, scale, even, book, begin, end, codes):
    """Encode rows begin..end at given scales ``[rows, sub-blocks]``; fills ``codes`` as
    ``fit_words``."""
    columns = 2 * SUB
    tile, weights, x, w, signs, odd, cells = tiles(columns, even)
    s = np.empty((4, WIDE), np.float32)
    squares = np.empty(0, np.float32)
    work = workspace()
    for row in range(begin, end, LANES):
        for column in range(0, weight.shape[1], columns):
            load(weight, importance, squares, row, column, columns, 0, f4(0.0), 0, tile, weights)
            lay_out(tile, weights, x, w, signs, odd)
            for lane in range(WIDE):
                source = min(row + lane % LANES, end - 1)
                s[3, lane] = scale[source, column // SUB + lane // LANES]
            round_words(x[0], w[0], odd[0], s[3], book, work, cells[0], s)
            write_codes(cells, signs, row, end, column, codes)


@kernel
def tiles(columns, even):
    """Work arrays for a number of columns: tile, weights, and the outputs of ``lay_out`` and
    ``round_words``."""
    pairs = columns // SUB // 2
    return (
        np.empty((columns, LANES), np.float32),
        np.empty((columns, LANES), np.float32),
        np.empty((pairs, SUB, WIDE), np.float32),
        np.empty((pairs, SUB, WIDE), np.float32),
        np.empty((pairs, SUB, WIDE), np.int32),
        np.empty((pairs, SUB // 8 if even else 0, WIDE), np.int32),
        np.empty((pairs, SUB // 4, WIDE), np.int32),
    )


@kernel
def write_codes(cells, signs, row, end, column, codes):
    """Write the cells and signs of a tile as codes of rows row..end, from ``column`` on."""
    for lane in range(min(LANES, end - row)):
        for j in range(2 * len(cells)):
            source = j % 2 * LANES + lane
            for i in range(SUB):
                cell = cells[j // 2, i // 4, source]
                level = (cell >> (3 * (i % 4))) & 7
                minus = signs[j // 2, i, source] ^ ((cell >> (TURN + i % 4)) & 1)
                codes[row + lane, column + j * SUB + i] = np.uint8(level | minus << 3)
