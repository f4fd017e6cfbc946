"""Uniform integer grids: int2, int4 and int8 with one scale per group of columns.

``int4-g32`` is symmetric: ``w ≈ scale * q``, ``q`` in -8..7. ``int4-g32-asym`` has a zero point:
``w ≈ scale * (q - zero_point)``, ``q`` in 0..15. ``int8-channel`` has one scale per row.

Codes are stored unsigned in both cases (symmetric: ``q + 8``, zero point 8), which is what
``com.microsoft::MatMulNBits`` stores; Core ML's signed form is ``codes - 8``. Scales are float16,
as in the files, and the fit accounts for that rounding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from compress.errors import GridError
from compress.grids import Array, BaseGrid, Float32, Lattice, Params

NARROW = 64  # columns of a group; wider groups have larger outliers
# Scales that the search tries, the plain fit first, by bits, symmetry and group width. The others
# were chosen greedily on groups of 32 and 128 normal, Student-t, Laplace and real weights: five
# tries reach an error within 0.2 % of that of seven.
# Symmetric: the code to which the largest magnitude is mapped. Asymmetric: steps over the range
# of the group, shift of the zero point.
TRIES: dict[tuple[int, bool, str], list[tuple[float, float]]] = {
    (4, True, "narrow"): [(level, 0) for level in (-8, -8.6, -7.2, -8.2, -7.8)],
    (4, True, "wide"): [(level, 0) for level in (-8, -8.6, -9.2, -8.2, -9.6)],
    (4, True, "channel"): [(-8 * share, 0) for share in (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6)],
    (4, False, "narrow"): [(15, 0), (15.75, -0.5), (14.25, 0), (15.75, 0), (13.5, 0)],
    (4, False, "wide"): [(15, 0), (15.75, -0.5), (16.5, -1), (15.75, 0), (17.25, -1)],
    (4, False, "channel"): [
        (15, 0), (16.5, -0.5), (18, 0), (19.5, -1), (21, 0), (22.5, -1), (24, 0),
    ],
    (2, True, "narrow"): [(level, 0) for level in (-2, -3, -2.4, 2.5, -4)],
    (2, True, "wide"): [(level, 0) for level in (-2, -3, -4, 3, -2.4)],
    (2, True, "channel"): [(level, 0) for level in (-2, -4, -3, 4, 3)],
    (2, False, "narrow"): [(3, 0), (4, 0), (3.5, 0), (4.5, 0), (5, 0)],
    (2, False, "wide"): [(3, 0), (4, 0), (4.5, 0), (3.5, 0), (5, 0)],
    (2, False, "channel"): [(3, 0), (4.5, 0), (4, 0), (5, 0), (6, 0)],
    **{(8, True, width): [(level, 0) for level in (-128, -124.8, 121.6, -118.4)]
       for width in ("narrow", "wide", "channel")},
    **{(8, False, width): [(steps, 0) for steps in (255, 252.5, 250, 247.4)]
       for width in ("narrow", "wide", "channel")},
}  # fmt: skip


def make(name: str) -> Affine:
    """``int4-g32``, ``int8-g128-asym``, ``int8-channel`` …"""
    found = re.fullmatch(r"int([248])-(?:g(\d+)|channel)(-asym)?", name)
    if found is None:
        raise GridError(f"there is no grid {name!r}")
    bits, group, asym = found.groups()
    size = int(group) if group else 0
    if size and (size < 16 or size > 256 or size & (size - 1)):
        raise GridError(
            f"{name}: group_size {size} is not a power of two between 16 and 256",
            hint="16, 32, 64, 128 or 256",
        )
    return Affine(int(bits), size, asym is None)


@dataclass(frozen=True)
class Affine(BaseGrid):
    """See the module.

    Attributes:
        bits: 2, 4 or 8.
        group_size: columns that share a scale; 0 for the whole row.
        symmetric: no zero point.
    """

    bits: int
    group_size: int
    symmetric: bool
    group_rows = 1  # rows are independent

    @property
    def name(self) -> str:
        group = f"g{self.group_size}" if self.group_size else "channel"
        return f"int{self.bits}-{group}" + ("" if self.symmetric else "-asym")

    @property
    def span(self) -> int:
        """Each group is fitted independently."""
        return self.group_size

    @property
    def middle(self) -> int:
        """The code of zero in the symmetric case: 2, 8 or 128."""
        return 1 << (self.bits - 1)

    def check(self, shape: tuple[int, int]) -> None:
        """Raise GridError when the groups do not divide the row."""
        columns = shape[1]
        if self.group_size and columns % self.group_size:
            fitting = [size for size in (256, 128, 64, 32, 16) if columns % size == 0]
            raise GridError(
                f"{self.name}: rows of {columns} columns are not a multiple of {self.group_size}",
                hint=f"group_size {fitting[0]} fits" if fitting else "no group_size fits",
            )

    def groups(self, shape: tuple[int, int]) -> int:
        """Groups in one row."""
        return shape[1] // (self.group_size or shape[1])

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Codes, float16 scales and (asymmetric) packed zero points."""
        rows, columns = shape
        groups = self.groups(shape)
        zeros = 0 if self.symmetric else rows * ((groups * self.bits + 7) // 8)
        return rows * columns * self.bits // 8 + rows * groups * 2 + zeros

    def fit(self, weight: Float32, importance: Float32 | None = None) -> Params:
        """The scale (and zero point) of least squared error among a few, each refitted.

        A symmetric scale is signed: the largest magnitude goes on the extra negative code. The
        error is never above that of the plain fit (extremes on the extreme codes).

        Returns:
            ``scale`` float16 ``[rows, groups]`` and ``zero_point`` uint8 ``[rows, groups]``.

        Raises:
            GridError: the groups do not divide the row, or a weight that is NaN or beyond float16.
        """
        from compress.grids import affine_kernels as kernels
        from compress.grids.lanes import beyond_float16, normalized, over_rows, to_half

        rows, columns = weight.shape
        self.check((rows, columns))
        groups = self.groups((rows, columns))
        weight = np.ascontiguousarray(weight, np.float32)
        shares = np.empty(0, np.float32)
        if importance is not None:
            shares = normalized(importance, columns, self.name)
        width = "wide" if self.group_size > NARROW else "narrow" if self.group_size else "channel"
        tries = np.array(TRIES[self.bits, self.symmetric, width], np.float32)
        scale = np.empty((rows, groups), np.float32)
        zero = np.empty((rows, groups), np.float32)
        middle = self.middle if self.symmetric else -1
        top, size = 2**self.bits - 1, columns // groups
        beyond: list[int] = []

        def work(begin: int, end: int) -> None:
            found = kernels.fit(weight, shares, size, middle, top, tries, begin, end, scale, zero)
            beyond.append(found)

        over_rows(work, rows)
        if any(beyond):
            raise beyond_float16(self.name)
        middles = np.full(zero.shape, self.middle, np.uint8)
        zeros = middles if self.symmetric else zero.astype(np.uint8)
        return {"scale": to_half(scale), "zero_point": zeros}

    def encode(self, weight: Float32, params: Params) -> Array:
        """uint8 ``[rows, columns]``, 0..2^bits-1."""
        from compress.grids import affine_kernels as kernels
        from compress.grids.lanes import from_half, over_rows

        codes = np.empty(weight.shape, np.uint8)
        weight = np.ascontiguousarray(weight, np.float32)
        scale, zero = from_half(params["scale"]), params["zero_point"].astype(np.float32)
        size = weight.shape[1] // scale.shape[1]

        def work(begin: int, end: int) -> None:
            kernels.encode(weight, size, 2**self.bits - 1, scale, zero, begin, end, codes)

        over_rows(work, weight.shape[0])
        return codes

    def decode(self, codes: Array, params: Params) -> Float32:
        """float32 ``[rows, columns]``: ``(code - zero_point) * scale``."""
        from compress.grids import affine_kernels as kernels
        from compress.grids.lanes import over_rows

        weight = np.empty(codes.shape, np.float32)
        scale, zero = (params[key].astype(np.float32) for key in ("scale", "zero_point"))
        size = codes.shape[1] // scale.shape[1]

        def work(begin: int, end: int) -> None:
            kernels.decode(codes, size, scale, zero, begin, end, weight)

        over_rows(work, codes.shape[0])
        return weight

    def lattice(self, params: Params) -> Lattice:
        """Even steps with offset ``scale * zero_point``; see ``compress.grids.LatticeGrid``."""
        scale = params["scale"].astype(np.float32)
        levels = np.arange(2**self.bits, dtype=np.float32)
        return Lattice(scale, scale * params["zero_point"], levels[None], even=True)

    def pack(self, codes: Array, params: Params) -> dict[str, Array]:
        """Unpacked arrays; each exporter lays them out for its runtime.

        Returns:
            ``codes`` uint8 ``[rows, columns]`` unpacked, ``scale`` float16, ``zero_point`` uint8.
        """
        return {"codes": codes, **params}
