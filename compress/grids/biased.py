"""Grids with a scale and a bias for each group of columns: ``w = scale * code + bias``.

``affine4-g64``: codes of 4 bits (2, 3, 4, 5, 6 or 8), groups of 64 columns (32, 64 or 128), scale
and bias in float16, or with ``-bf16`` in bfloat16. Unlike a zero point the bias need not be a
multiple of the scale, and unlike the blocks of GGUF a group is as wide as the name says.

A product of a code and a scale has at most 19 significant bits, so ``decode`` rounds once, in the
sum, and the value is the same with a fused multiply-add.

The codes of a row are one little-endian stream of bits, the first code lowest, in words of 32 bits.
Source: ``affine_quantize`` of MLX, https://ml-explore.github.io/mlx/build/html/python/ops.html.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import numpy as np

from compress.errors import GridError
from compress.grids import Array, BaseGrid, Float32, Lattice, Params
from compress.grids.kquant_affine import fit_affine
from compress.grids.kquant_kernels import encode_linear
from compress.grids.lanes import checked, kernel, normalized, over_rows

__all__ = ["Biased", "make"]

# Pairs (steps over the range of the group, shift of the levels in steps), the plain fit first.
# More steps than codes clip the largest weights, which pays in wide groups with few codes.
TRIES: dict[int, tuple[tuple[float, float], ...]] = {
    2: ((3, 0), (3.625, -0.3), (2.625, 0.6), (3.375, -0.5), (4, 0.2), (4.5, -0.75), (5, -1)),
    3: ((7, 0), (7.5, -0.25), (6.5, 0.5), (7.5, 0.25), (8, -0.5), (8.75, -0.875), (9.5, -1.25)),
    4: ((15, 0), (15.5, -0.25), (15.25, 0.25), (14, 1), (15.75, -0.5), (16.5, -1), (17.25, -1)),
    5: ((31, 0), (31.25, -0.125), (30.75, 0.625), (30.5, 0.25), (31.5, 0)),
    6: ((63, 0), (63.25, -0.125), (62.5, 0.5)),
    8: ((255, 0), (254.5, 0.25)),
}
REFITS = 2  # rounds of least squares after the tries, on the parameters as stored


def make(name: str) -> Biased:
    """``affine4-g64``, ``affine8-g128-bf16`` …

    Raises:
        GridError: another name.
    """
    found = re.fullmatch(r"affine([234568])-g(32|64|128)(-bf16)?", name)
    if found is None:
        raise GridError(f"there is no grid {name!r}", hint="affine4-g64, affine3-g32-bf16 …")
    return Biased(int(found[1]), int(found[2]), bool(found[3]))


@dataclass(frozen=True)
class Biased(BaseGrid):
    """See the module and ``compress.grids.Grid``.

    Attributes:
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: columns that share a scale and a bias.
        bfloat16: they are bfloat16, else float16.
    """

    bits: int
    group_size: int
    bfloat16: bool = False
    symmetric = False
    group_rows = 1  # rows are independent

    @property
    def name(self) -> str:
        return f"affine{self.bits}-g{self.group_size}" + ("-bf16" if self.bfloat16 else "")

    @property
    def span(self) -> int:
        """Each group is fitted independently."""
        return self.group_size

    def check(self, shape: tuple[int, int]) -> None:
        """Raise GridError when the groups do not divide the row."""
        columns = shape[1]
        if columns % self.group_size or not columns:
            fitting = [size for size in (128, 64, 32) if columns and columns % size == 0]
            raise GridError(
                f"{self.name}: rows of {columns} columns are not a multiple of {self.group_size}",
                hint=f"group_size {fitting[0]} fits" if fitting else "no group_size fits",
            )

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Codes, scales and biases."""
        rows, columns = shape
        return rows * columns * self.bits // 8 + rows * (columns // self.group_size) * 4

    def fit(self, weight: Float32, importance: Float32 | None = None) -> Params:
        """Scale and bias of (nearly) least weighted squared error, as the file stores them.

        Args:
            weight: float32 ``[rows, columns]``.
            importance: float32 ``[columns]``, non-negative.

        Returns:
            ``scale`` (not negative) and ``bias``, ``[rows, groups]``: float16, or float32 with
            values of bfloat16, which numpy has no type for.

        Raises:
            GridError: a shape that does not fit, a weight that is not finite or exceeds 65504,
                or an importance that is not a vector of finite numbers >= 0.
        """
        self.check((weight.shape[0], weight.shape[1]))
        weight = checked(weight, self.name)
        rows, columns = weight.shape
        shares = normalized(importance, columns, self.name)
        scale = np.zeros((rows, columns // self.group_size), np.float32)
        low, none = np.zeros_like(scale), np.zeros((rows, 0), np.uint8)
        tries, squares = np.array(TRIES[self.bits], np.float32), np.empty(0, np.float32)
        top, zero = np.float32(2**self.bits - 1), np.float32(0)

        def work(begin: int, end: int) -> None:
            fit_affine(
                weight, shares, squares, 0, zero, 0, tries, 1, REFITS, 1, self.group_size,
                top, zero, begin, end, scale, low, none, none,
            )  # fmt: skip

        over_rows(work, rows)
        if not self.bfloat16:
            return {"scale": scale.astype(np.float16), "bias": (-low).astype(np.float16)}
        return self._rounded(weight, shares, scale, -low)

    def _rounded(self, weight: Float32, shares: Float32, scale: Float32, bias: Float32) -> Params:
        """Parameters in bfloat16: the bias is fitted again to the rounded scale."""
        scale = to_bfloat16(scale)
        params = {"scale": scale, "bias": bias}
        left = weight - self.decode(self.encode(weight, params), params)
        groups = (len(weight), -1, self.group_size)
        shares = shares.reshape(1, -1, self.group_size)
        more = (left.reshape(groups) * shares).sum(axis=2) / shares.sum(axis=2)
        return {"scale": scale, "bias": to_bfloat16(bias + more)}

    def encode(self, weight: Float32, params: Params) -> Array:
        """The nearest codes, uint8 ``[rows, columns]``."""
        weight = np.ascontiguousarray(weight, np.float32)
        scale, low = params["scale"].astype(np.float32), -params["bias"].astype(np.float32)
        codes = np.empty(weight.shape, np.uint8)
        zero, top = np.float32(0), np.float32(2**self.bits - 1)
        over_rows(
            lambda begin, end: encode_linear(
                weight, scale, low, self.group_size, zero, top, begin, end, codes
            ),
            len(codes),
        )
        return codes

    def decode(self, codes: Array, params: Params) -> Float32:
        """float32 ``[rows, columns]``: ``code * scale + bias``, rounded once."""
        scale, bias = (params[key].astype(np.float32) for key in ("scale", "bias"))
        values = codes.astype(np.float32).reshape(*scale.shape, self.group_size)
        values *= scale[..., None]
        values += bias[..., None]
        decoded: Float32 = values.reshape(codes.shape)
        return decoded

    def lattice(self, params: Params) -> Lattice:
        """Even steps; see ``compress.grids.LatticeGrid``."""
        scale, bias = (params[key].astype(np.float32) for key in ("scale", "bias"))
        return Lattice(scale, -bias, np.arange(2**self.bits, dtype=np.float32)[None], even=True)

    def pack(self, codes: Array, params: Params) -> dict[str, Array]:
        """The three arrays of the file.

        Returns:
            ``weight``: uint32 ``[rows, columns * bits / 32]``; ``scales`` and ``biases``
            ``[rows, groups]``: float16, or uint16 with the bits of bfloat16.
        """
        rows, columns = codes.shape
        words = np.empty((rows, columns * self.bits // 32), "<u4")
        over_rows(partial(pack_bits, np.ascontiguousarray(codes), self.bits, words), rows)
        scales, biases = (self._stored(params[key]) for key in ("scale", "bias"))
        return {"weight": words, "scales": scales, "biases": biases}

    def unpack(self, words: Array, scales: Array, biases: Array) -> tuple[Array, Params]:
        """Codes and parameters of packed rows, the inverse of ``pack``."""
        words = np.ascontiguousarray(words)
        codes = np.empty((len(words), words.shape[1] * 32 // self.bits), np.uint8)
        over_rows(partial(unpack_bits, words, self.bits, codes), len(words))
        if self.bfloat16:
            scales, biases = (
                (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
                for values in (scales, biases)
            )
        return codes, {"scale": scales, "bias": biases}

    def _stored(self, values: Array) -> Array:
        if not self.bfloat16:
            return values.astype("<f2", copy=False)
        return (values.view(np.uint32) >> np.uint32(16)).astype("<u2")


def to_bfloat16(values: Float32) -> Float32:
    """The nearest numbers of bfloat16, ties to even, as float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


@kernel
def pack_bits(codes, bits, words, begin, end):
    """Join the codes of rows begin..end to one stream of bits each: uint32 ``[rows, words]``."""
    for row in range(begin, end):
        pending, filled, at = np.uint64(0), 0, 0
        for column in range(codes.shape[1]):
            pending |= np.uint64(codes[row, column]) << np.uint64(filled)
            filled += bits
            if filled >= 32:
                words[row, at] = np.uint32(pending & np.uint64(0xFFFFFFFF))
                pending >>= np.uint64(32)
                filled -= 32
                at += 1


@kernel
def unpack_bits(words, bits, codes, begin, end):
    """The inverse of ``pack_bits``: uint8 ``[rows, columns]``."""
    mask = np.uint64(2**bits - 1)
    for row in range(begin, end):
        pending, filled, at = np.uint64(0), 0, 0
        for column in range(codes.shape[1]):
            if filled < bits:
                pending |= np.uint64(words[row, at]) << np.uint64(filled)
                filled += 32
                at += 1
            codes[row, column] = np.uint8(pending & mask)
            pending >>= np.uint64(bits)
            filled -= bits
