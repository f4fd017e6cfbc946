"""Some columns, one after the other, over all rows."""

from __future__ import annotations

from compress.grids import Array, Float32, Lattice
from compress.grids.lanes import over_rows
from compress.solvers.gptq_kernels import sweep

__all__ = ["PIECE", "round_piece"]

PIECE = 32  # columns rounded by one call of the kernel where no span says how many


def round_piece(
    weight: Float32,
    carried: Float32,
    feedback: Float32,
    lattice: Lattice,
    run: Array,
    codes: Array,
    left: Float32,
) -> None:
    """Round as ``gptq_kernels.sweep`` does; fills ``codes`` and ``left``."""
    scale, offset, levels, even = lattice.scale, lattice.offset, lattice.levels, lattice.even

    def work(begin: int, end: int) -> None:
        sweep(weight, carried, feedback, run, scale, offset, levels, even, begin, end, codes, left)

    over_rows(work, len(weight))
