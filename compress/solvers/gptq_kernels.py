"""Rounding of a few columns one after the other, each with the errors of those before it.

Rows are the SIMD lanes (see ``compress.grids.lanes``), so that a row's codes depend neither on its
neighbours nor on the number of threads.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np

from compress.grids import Array, Codebook, Float32, Lattice
from compress.grids.lanes import LANES, f4, inverse_of, kernel, over_rows
from compress.solvers.gptq_words import sweep_words

__all__ = ["PIECE", "round_piece"]

PIECE = 32  # columns rounded by one call of the kernel where no span says how many


def round_piece(
    weight: Float32,
    carried: Float32,
    feedback: Float32,
    variances: Float32,
    values: Lattice | Codebook,
    run: Array,
    codes: Array,
    left: Float32,
) -> None:
    """Round some columns, one after the other, over all rows; fills ``codes`` and ``left``.

    Arguments as in ``sweep``, or (codebooks) ``gptq_words.sweep_words``.
    """
    feedback, scale = np.ascontiguousarray(feedback), values.scale

    def sweep_lattice(begin: int, end: int) -> None:
        assert isinstance(values, Lattice)
        offset, levels, even = values.offset, values.levels, values.even
        sweep(weight, carried, feedback, run, scale, offset, levels, even, begin, end, codes, left)

    def sweep_codebook(begin: int, end: int) -> None:
        assert isinstance(values, Codebook)
        book, even = (values.levels, values.starts, values.partners), values.even
        sweep_words(
            weight, carried, feedback, variances, run, scale, book, even, begin, end, codes, left
        )

    over_rows(sweep_lattice if isinstance(values, Lattice) else sweep_codebook, len(weight))


@kernel
def sweep(weight, carried, feedback, run, scale, offset, levels, even, begin, end, codes, errors):
    """Round columns 0..n-1 in this order, rows begin..end.

    Column k is rounded as ``weight + carried + Σ_{j<k} errors[j] * feedback[j, k]``.

    Args:
        weight: float32 ``[rows, n]``.
        carried: float32 ``[rows, n]``: the like sum over all columns before these.
        feedback: float32 ``[n, n]``; what is above its diagonal.
        run: int64 ``[n]``: the run of the lattice that each column is of.
        scale, offset, levels, even: see ``compress.grids.Lattice``; one row, or one for each row.
        codes: uint8 ``[rows, n]``, filled.
        errors: float32 ``[rows, n]``, filled with ``weight`` minus what it became.
    """
    n, runs, top = len(run), scale.shape[1], levels.shape[1] - 1
    x = np.empty((n, LANES), dtype=np.float32)
    left = np.empty((n, LANES), dtype=np.float32)
    step = np.empty((runs, LANES), dtype=np.float32)
    inverse = np.empty((runs, LANES), dtype=np.float32)
    shift = np.empty((runs, LANES), dtype=np.float32)
    midpoint = np.empty((top, LANES), dtype=np.float32)
    code = np.empty(LANES, dtype=np.float32)
    value = np.empty(LANES, dtype=np.float32)
    for row in range(begin, end, LANES):
        for lane in range(LANES):
            source = min(row + lane, end - 1)
            scaled, table = source % len(scale), source % len(levels)
            for k in range(n):
                left[k, lane] = weight[source, k]
                x[k, lane] = left[k, lane] + carried[source, k]
            for k in range(runs):
                step[k, lane] = scale[scaled, k]
                inverse[k, lane] = inverse_of(scale[scaled, k])
                shift[k, lane] = offset[scaled, k]
            for k in range(top):
                midpoint[k, lane] = (levels[table, k] + levels[table, k + 1]) * f4(0.5)
        for k in range(n):
            r = run[k]
            if even:
                for lane in range(LANES):
                    # Codes count from the lowest level, half a step below its midpoint.
                    v = (x[k, lane] + shift[r, lane]) * inverse[r, lane] - midpoint[0, lane]
                    v = min(max(np.floor(v + f4(1.0)), f4(0.0)), f4(top))
                    code[lane] = v
                    value[lane] = v + (midpoint[0, lane] - f4(0.5))
            else:
                code[:] = f4(0.0)
                for i in range(top):
                    for lane in range(LANES):
                        v = (x[k, lane] + shift[r, lane]) * inverse[r, lane]
                        code[lane] += f4(1.0) if v > midpoint[i, lane] else f4(0.0)
                for lane in range(LANES):
                    table = min(row + lane, end - 1) % len(levels)
                    value[lane] = levels[table, np.int64(code[lane])]
            for lane in range(LANES):
                left[k, lane] -= value[lane] * step[r, lane] - shift[r, lane]
            for lane in range(min(LANES, end - row)):
                codes[row + lane, k] = np.uint8(code[lane])
            for i in range(k + 1, n):
                share = feedback[k, i]
                for lane in range(LANES):
                    x[i, lane] += left[k, lane] * share
        for lane in range(min(LANES, end - row)):
            for k in range(n):
                errors[row + lane, k] = left[k, lane]
