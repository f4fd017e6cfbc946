"""Kernels of the codebook grids that deal in blocks: the fit, and codes at given parameters.

A sub-block is rounded whole at several scales; each time the words that came out tell how the error
would grow away from their own best scale. From those parabolas follow the unit of the block and an
odd multiple of it for each sub-block. With the unit as stored, each multiple and its neighbours are
rounded again, and least squares correct the unit. Tiles are as in ``codebook_words.py``.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np

from compress.grids.codebook_words import SUB, TURN, WIDE, round_words, workspace
from compress.grids.kquant_tiles import NEARLY_ZERO, keep, load
from compress.grids.lanes import LANES, WORST, f4, half, inverse_of, kernel

LARGEST = f4(31.0)  # an integer scale is odd, up to this: 2 * 15 + 1


@kernel
def lay_out(tile, weights, x, w, signs, odd):
    """Sub-blocks of a tile side by side: ``x`` magnitudes, ``w`` and ``signs`` (1 for minus)
    ``[pairs, SUB, WIDE]``; ``odd`` the parity of the signs of eight columns, where it is wanted."""
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
    """Round sub-blocks at each try: where the least error of those words is (``wish``), how large
    (``rest``), and how fast it grows from there (``stiff``), each ``[tries, WIDE]``.

    ``tries`` are the levels that the largest magnitude is put on.
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
    """The unit, of ``units`` by which the largest wish is divided, whose odd multiples 1..31 suit
    the sub-blocks best, and those multiples; by the errors that ``search_scales`` knows of.

    ``wish``, ``rest``, ``stiff``: ``[pairs, tries, WIDE]``; ``whole``: ``[sub-blocks, LANES]``.
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
    """Multiples of a unit as stored, each the best of itself and its neighbours when rounded.

    ``unit``, ``whole``: ``[WIDE]``; ``sums[3, WIDE]``: the sums of ``round_words`` with multiples
    for the scale.
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
    ``[rows, sub-blocks]``, 0..15) and ``codes`` (uint8 ``[rows, columns]``, level + 8 for minus).
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
                steps = min(refits - refit, 1)  # neighbours are tried but the last time
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
            # The words of the best once more.
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
    """The nearest words at given scales ``[rows, sub-blocks]``, rows begin..end; ``codes`` as in
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
    """Space for some columns: tile, weights, and what ``lay_out`` and ``round_words`` fill."""
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
    """Cells and signs of a tile as codes of rows row..end, from ``column`` on."""
    for lane in range(min(LANES, end - row)):
        for j in range(2 * len(cells)):
            source = j % 2 * LANES + lane
            for i in range(SUB):
                cell = cells[j // 2, i // 4, source]
                level = (cell >> (3 * (i % 4))) & 7
                minus = signs[j // 2, i, source] ^ ((cell >> (TURN + i % 4)) & 1)
                codes[row + lane, column + j * SUB + i] = np.uint8(level | minus << 3)
