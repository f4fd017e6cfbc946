"""MXFP4, the 4-bit float block of the OCP microscaling formats, as GGUF and MLX lay it out.

    w = 2 ** (e - 128) * level[code]        one byte e (E8M0) per 32 columns

The levels are twice E2M1's values, so that they are integers: 0, 1, 2, 3, 4, 6, 8, 12 and their
negatives. Our codes ascend with the levels; the file has sign and magnitude (bits 3 and 0 to 2).

Sources: OCP Microscaling Formats (MX) Specification 1.0, 5.3; ``block_mxfp4`` in ggml-common.h.

A scale is a power of two, so a fit has only a few to choose from and tries them: the largest weight
goes to a level of 4 to 8, of 8 to 12 (above that it is clipped), or is clipped so that the others
fit better. A coarser scale has no level that these do not have.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from dataclasses import dataclass
from math import frexp, ldexp

import numpy as np

from compress.errors import GridError
from compress.grids import Array, BlockedGrid, Float32, Lattice, Params
from compress.grids.kquant_kernels import ROWS, STEP, WRR, encode_levels, load, sums_symmetric
from compress.grids.lanes import LANES, WORST, checked, kernel, normalized, over_rows

__all__ = ["MicroscalingFloat", "MicroscalingWords", "make"]

BLOCK = 32
LEVELS = np.array([-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12], dtype=np.float32)
ZERO = 7  # the code of zero
# As in kquant.py: midpoints of levels are half-integers, so floor(2 v) + 256 gives the nearest.
CELLS = np.searchsorted((LEVELS[1:] + LEVELS[:-1]) / 2, (np.arange(512) - 256) / 2 + 0.25).astype(
    np.uint8
)
# Code → the nibble in the file, and the inverse (negative zero becomes zero).
NIBBLES = np.array([15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7], dtype=np.uint8)
CODES = np.array([7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1, 0], dtype=np.uint8)
# Exponents to try, relative to the one that maps the largest weight into 8 to 16.
TRIES = np.array([0, 1, -1, -2])
SMALLEST = 2  # with smaller exponents the inverse of the scale overflows float32


@dataclass(frozen=True)
class MicroscalingFloat(BlockedGrid):
    """See the module and ``compress.grids.Grid``."""

    name: str = "MXFP4"
    block: int = BLOCK
    block_bytes: int = 1 + BLOCK // 2
    bits: int = 4
    group_size: int = BLOCK
    symmetric: bool = True

    def fit(self, weight: Float32, importance: Float32 | None = None) -> Params:
        """The exponents of least (weighted) squared error.

        Args:
            weight: float32 ``[rows, columns]``.
            importance: float32 ``[columns]``, non-negative.

        Returns:
            ``e``: uint8 ``[rows, columns / 32]``, 0 where a block is all zeros.

        Raises:
            GridError: a shape that does not fit, a weight that is not finite or exceeds 65504,
                or an importance that is not a vector of finite numbers >= 0.
        """
        self.check(weight.shape)
        weight = checked(weight, self.name)
        rows, columns = weight.shape
        shares = normalized(importance, columns, self.name)
        exponents = np.zeros((rows, columns // BLOCK), dtype=np.uint8)
        values = LEVELS[CELLS]
        over_rows(
            lambda begin, end: fit_powers(weight, shares, values, TRIES, begin, end, exponents),
            rows,
        )
        return {"e": exponents}

    def encode(self, weight: Float32, params: Params) -> Array:
        """The nearest codes, uint8 ``[rows, columns]``, 0..14; 7 is zero.

        Raises:
            GridError: as ``fit``.
        """
        self.check(weight.shape)
        weight = checked(weight, self.name)
        scale = self.lattice(params).scale
        codes = np.empty(weight.shape, dtype=np.uint8)
        over_rows(
            lambda begin, end: encode_levels(weight, scale, CELLS, BLOCK, begin, end, codes),
            len(codes),
        )
        return codes

    def decode(self, codes: Array, params: Params) -> Float32:
        """float32 ``[rows, columns]``, equal bit for bit to gguf-py's decoding of the bytes."""
        scale = np.ldexp(np.float32(1), params["e"].astype(np.int32) - 128)
        values: Float32 = np.take(LEVELS, codes).reshape(*scale.shape, BLOCK)
        values *= scale[..., None]
        decoded: Float32 = values.reshape(codes.shape)
        return decoded

    def lattice(self, params: Params) -> Lattice:
        """See ``compress.grids.LatticeGrid``."""
        exponents = params["e"].astype(np.int32)
        scale = np.ldexp(np.float32(1), exponents - 128)
        scale[exponents < SMALLEST] = 0
        return Lattice(scale, np.zeros_like(scale), LEVELS[None], even=False)

    def pack(self, codes: Array, params: Params) -> dict[str, Array]:
        """``blocks``: uint8 ``[rows, bytes_per_row]``: per block e, then c[i] + 16 c[i+16]."""
        nibbles = np.take(NIBBLES, codes).reshape(*params["e"].shape, 2, BLOCK // 2)
        joined = nibbles[..., 0, :] | (nibbles[..., 1, :] << 4)
        blocks = np.concatenate([params["e"][..., None], joined], axis=-1)
        return {"blocks": blocks.reshape(len(codes), -1)}

    def unpack(self, blocks: Array) -> tuple[Array, Params]:
        """Codes and parameters of packed blocks, the inverse of ``pack``."""
        parts = blocks.reshape(len(blocks), -1, 1 + BLOCK // 2)
        joined = parts[..., 1:]
        nibbles = np.concatenate([joined & 15, joined >> 4], axis=-1)
        return np.take(CODES, nibbles).reshape(len(blocks), -1), {"e": parts[..., 0].copy()}


@dataclass(frozen=True)
class MicroscalingWords(MicroscalingFloat):
    """The same numbers as MLX has them in its mode ``mxfp4``: codes in words, scales apart."""

    name: str = "mxfp4"

    def pack(self, codes: Array, params: Params) -> dict[str, Array]:
        """``weight``: uint32 ``[rows, columns / 8]``, the first code lowest; ``scales``: e."""
        nibbles = np.take(NIBBLES, codes).reshape(len(codes), -1, 2)
        joined = nibbles[..., 0] | (nibbles[..., 1] << 4)
        return {"weight": joined.view("<u4"), "scales": params["e"]}

    def unpack(self, words: Array, scales: Array) -> tuple[Array, Params]:  # type: ignore[override]
        """Codes and parameters of packed words, the inverse of ``pack``."""
        packed = np.ascontiguousarray(words).view(np.uint8)
        nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(words), -1)
        return np.take(CODES, nibbles), {"e": scales.copy()}


def make(name: str) -> MicroscalingFloat:
    """The MXFP4 grid in GGUF's layout, or ``mxfp4`` in MLX's."""
    found = {"MXFP4": MicroscalingFloat, "mxfp4": MicroscalingWords}
    if name not in found:
        raise GridError(f"there is no grid {name!r}", hint="MXFP4, mxfp4")
    return found[name]()


@kernel
def fit_powers(weight, importance, values, tries, begin, end, exponents):
    """Exponents of rows begin..end: uint8 ``[rows, blocks]``. ``values``: see
    ``sums_symmetric``."""
    x = np.empty((BLOCK, LANES), dtype=np.float32)
    w = np.empty((BLOCK, LANES), dtype=np.float32)
    t = np.zeros(ROWS, dtype=np.float32)
    power = np.empty(LANES, dtype=np.int64)
    best = np.empty(LANES, dtype=np.float32)
    best_power = np.empty(LANES, dtype=np.int64)
    for row in range(begin, end, LANES):
        for block in range(exponents.shape[1]):
            load(weight, importance, t[:0], row, block * BLOCK, BLOCK, 0, 0.0, 0, x, w)
            for lane in range(LANES):
                peak = np.float32(0)
                for i in range(BLOCK):
                    peak = max(peak, abs(x[i, lane]))
                power[lane] = frexp(peak)[1] - 4 if peak > 0 else -128
            best[:] = WORST
            for shift in tries:
                for lane in range(LANES):
                    step = ldexp(1.0, power[lane] + shift) if power[lane] > -128 else 0.0
                    t[STEP + lane] = step
                sums_symmetric(x, w, 0, BLOCK, 0.0, 0.0, values, t)
                for lane in range(LANES):
                    error = t[WRR + lane]
                    better = error < best[lane]
                    best[lane] = error if better else best[lane]
                    best_power[lane] = power[lane] + shift if better else best_power[lane]
            for lane in range(min(LANES, end - row)):
                empty = power[lane] == -128
                exponents[row + lane, block] = 0 if empty else np.uint8(best_power[lane] + 128)
