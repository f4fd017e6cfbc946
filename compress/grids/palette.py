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

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from compress.errors import GridError
from compress.grids import Array, BaseGrid, Float32, Lattice, Params


def make(name: str) -> Palette:
    """``lut4-g8``, ``lut6-g16``, ``lut4-tensor`` …"""
    found = re.fullmatch(r"lut([123468])-(?:g(\d+)|tensor)", name)
    if found is None or found[2] == "0":
        raise GridError(f"there is no grid {name!r}", hint="lut4-g8, lut4-g16, lut4-tensor …")
    return Palette(int(found[1]), int(found[2] or 0))


@dataclass(frozen=True)
class Palette(BaseGrid):
    """See the module.

    Attributes:
        bits: of an index: 1, 2, 3, 4, 6 or 8.
        rows: that share a table; 0 for the whole tensor.
    """

    bits: int
    rows: int

    @property
    def name(self) -> str:
        return f"lut{self.bits}-" + (f"g{self.rows}" if self.rows else "tensor")

    @property
    def group_size(self) -> int:
        """0: a table serves whole rows."""
        return 0

    @property
    def group_rows(self) -> int:
        """``rows``."""
        return self.rows

    @property
    def symmetric(self) -> bool:
        """False: a table's values are free."""
        return False

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
        if self.rows and rows % self.rows:
            fitting = [size for size in (64, 32, 16, 8, 4, 2, 1) if rows % size == 0]
            fitting = [size for size in fitting if size < self.rows] or [1]
            raise GridError(
                f"{self.name}: {rows} rows are not a multiple of {self.rows}",
                hint=f"lut{self.bits}-g{fitting[0]} fits, and lut{self.bits}-tensor always does",
            )

    def groups(self, shape: tuple[int, int]) -> int:
        """Tables of a tensor."""
        return shape[0] // (self.rows or shape[0])

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
        from compress.grids import lanes
        from compress.grids import palette_kernels as kernels

        shape = (weight.shape[0], weight.shape[1])
        self.check(weight.shape)
        weight = lanes.checked(weight, self.name)
        shares = lanes.normalized(importance, shape[1], self.name)
        lut = np.empty((self.groups(shape), self.levels), np.float64)
        fine = max(kernels.FINE, min(16 * self.levels, 2048))

        def work(begin: int, end: int) -> None:
            kernels.fit_groups(weight, shares, fine, begin, end, lut)

        lanes.over_rows(work, len(lut), unit=1)
        return {"lut": lut.astype(np.float16)}

    def encode(self, weight: Float32, params: Params) -> Array:
        """Nearest table entry, uint8 ``[rows, columns]``; any subset of the columns will do."""
        from compress.grids import palette_kernels as kernels
        from compress.grids.lanes import over_rows

        codes = np.empty(weight.shape, np.uint8)
        table = params["lut"].astype(np.float32)
        weight = np.ascontiguousarray(weight, np.float32)

        def work(begin: int, end: int) -> None:
            kernels.encode_rows(weight, table, begin, end, codes)

        over_rows(work, len(weight))
        return codes

    def decode(self, codes: Array, params: Params) -> Float32:
        """float32 ``[rows, columns]``: the table's value for each code."""
        from compress.grids import palette_kernels as kernels

        weight = np.empty(codes.shape, np.float32)
        table = params["lut"].astype(np.float32)
        kernels.decode_groups(np.ascontiguousarray(codes), table, weight)
        return weight

    def lattice(self, params: Params) -> Lattice:
        """The tables themselves; see ``compress.grids.LatticeGrid``."""
        none = np.zeros((1, 1), np.float32)
        return Lattice(none + 1, none, params["lut"].astype(np.float32), even=False)

    def pack(self, codes: Array, params: Params) -> dict[str, Array]:
        """``codes`` uint8 ``[rows, columns]`` unpacked, ``lut`` float16 ``[groups, levels]``."""
        return {"codes": codes, **params}
