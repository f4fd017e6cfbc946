"""Some columns, one after the other, over all rows."""

from __future__ import annotations

import numpy as np

from compress.grids import Array, Codebook, Float32, Lattice
from compress.grids.lanes import over_rows
from compress.solvers.gptq_kernels import sweep
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
    """The kernel of a grid (see ``gptq_kernels``, ``gptq_words``); fills ``codes`` and ``left``."""
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
