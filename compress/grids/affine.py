"""Uniform integer grids: int4 and int8 with one scale per group of columns.

``int4-g32`` is symmetric: ``w ≈ scale * q``, ``q`` in -8..7. ``int4-g32-asym`` has a zero point:
``w ≈ scale * (q - zero_point)``, ``q`` in 0..15. ``int8-channel`` has one scale per row.

Codes are kept unsigned in both cases (symmetric: ``q + 8``, zero point 8), which is what
``com.microsoft::MatMulNBits`` stores; Core ML's signed form is ``codes - 8``. Scales are float16,
as the files hold them, and the fit knows it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.errors import GridError
from compress.grids import Array, Float32, Params, Quantized

FP16_MAX = 65504.0
# Relative shrinkings of the largest scale that are tried; clipping the largest weight a little
# lowers the squared error of a group. Steps past 0.7 never win at 4 bits.
SHRINKS = np.linspace(1.0, 0.7, 13, dtype=np.float32)


def make(name: str) -> Affine:
    """``int4-g32``, ``int8-g128-asym``, ``int8-channel`` …"""
    found = re.fullmatch(r"int([48])-(?:g(\d+)|channel)(-asym)?", name)
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
class Affine:
    """See the module.

    Attributes:
        bits: 4 or 8.
        group_size: columns that share a scale; 0 for the whole row.
        symmetric: no zero point.
    """

    bits: int
    group_size: int
    symmetric: bool

    @property
    def name(self) -> str:
        group = f"g{self.group_size}" if self.group_size else "channel"
        return f"int{self.bits}-{group}" + ("" if self.symmetric else "-asym")

    @property
    def middle(self) -> int:
        """The code of zero in the symmetric case: 8 or 128."""
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

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        return self.nbytes(shape) * 8 / (shape[0] * shape[1])

    def fit(self, weight: Float32, importance: Float32 | None = None) -> Params:
        """The scale (and zero point) of least squared error among a dozen clippings.

        Symmetric grids put the largest magnitude on ``-2^(bits-1)`` (a signed scale, so that the
        extra negative code is used), then refit the scale by least squares.

        Returns:
            ``scale`` float16 ``[rows, groups]`` and ``zero_point`` uint8 ``[rows, groups]``.

        Raises:
            GridError: weights too large for a float16 scale.
        """
        self.check((weight.shape[0], weight.shape[1]))
        blocks = weight.reshape(weight.shape[0], self.groups((weight.shape[0], weight.shape[1])), -1)
        shares = None
        if importance is not None:
            shares = importance.astype(np.float32).reshape(1, blocks.shape[1], -1)
        fit = self._fit_symmetric if self.symmetric else self._fit_asymmetric
        scale, zero = fit(blocks, shares)
        if not np.isfinite(scale).all():
            raise GridError(f"{self.name}: weights too large for a float16 scale")
        return {"scale": scale, "zero_point": zero}

    def _fit_symmetric(self, blocks: Float32, shares: Float32 | None) -> tuple[Array, Array]:
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(2, keepdims=True), 2)[..., 0]
        zero = np.full(largest.shape, self.middle, np.uint8)
        best = np.zeros(largest.shape, np.float16)
        best_error = np.full(largest.shape, np.inf, np.float32)
        for shrink in SHRINKS:
            start = (largest * (-shrink / self.middle)).astype(np.float32)
            for _ in range(2):  # the given scale, then its least-squares refit
                scale = _float16(start)
                codes = self._codes(blocks, scale, zero) - np.float32(self.middle)
                difference = blocks - codes * scale.astype(np.float32)[..., None]
                error = _weighted_sum(difference * difference, shares)
                better = error < best_error
                best = np.where(better, scale, best)
                best_error = np.where(better, error, best_error)
                top = _weighted_sum(codes * blocks, shares)
                bottom = _weighted_sum(codes * codes, shares)
                start = np.divide(top, bottom, out=start.copy(), where=bottom > 0)
        return best, zero

    def _fit_asymmetric(self, blocks: Float32, shares: Float32 | None) -> tuple[Array, Array]:
        last = float(2**self.bits - 1)
        low = np.minimum(blocks.min(2), 0.0)
        high = np.maximum(blocks.max(2), 0.0)
        best = np.zeros(low.shape, np.float16)
        best_zero = np.zeros(low.shape, np.uint8)
        best_error = np.full(low.shape, np.inf, np.float32)
        for shrink in SHRINKS:
            scale = _float16((high - low) * (shrink / last))
            wide = scale.astype(np.float32)
            safe = np.where(wide == 0, 1.0, wide)
            zero = np.clip(np.rint(-low * shrink / safe), 0, last).astype(np.uint8)
            codes = self._codes(blocks, scale, zero)
            difference = blocks - (codes - zero[..., None]) * wide[..., None]
            error = _weighted_sum(difference * difference, shares)
            better = error < best_error
            best = np.where(better, scale, best)
            best_zero = np.where(better, zero, best_zero)
            best_error = np.where(better, error, best_error)
        return best, best_zero

    def _codes(self, blocks: Float32, scale: Array, zero: Array) -> Float32:
        wide = scale.astype(np.float32)
        inverse = np.divide(1.0, wide, out=np.zeros_like(wide), where=wide != 0)
        codes = np.rint(blocks * inverse[..., None]) + zero[..., None].astype(np.float32)
        return np.clip(codes, 0, 2**self.bits - 1, out=codes)

    def encode(self, weight: Float32, params: Params) -> Array:
        """uint8 ``[rows, columns]``, 0..2^bits-1."""
        blocks = weight.reshape(*params["scale"].shape, -1)
        codes = self._codes(blocks, params["scale"], params["zero_point"])
        return codes.astype(np.uint8).reshape(weight.shape)

    def decode(self, codes: Array, params: Params) -> Float32:
        scale = params["scale"].astype(np.float32)[..., None]
        zero = params["zero_point"].astype(np.float32)[..., None]
        blocks = codes.reshape(*params["scale"].shape, -1).astype(np.float32)
        return ((blocks - zero) * scale).reshape(codes.shape)

    def pack(self, codes: Array, params: Params) -> dict[str, Array]:
        """Neutral arrays; each exporter lays them out as its runtime wants.

        Returns:
            ``codes`` uint8 ``[rows, columns]`` unpacked, ``scale`` float16, ``zero_point`` uint8.
        """
        return {"codes": codes, **params}

    def quantize(self, weight: Float32, importance: Float32 | None = None) -> Quantized:
        params = self.fit(weight, importance)
        shape = (weight.shape[0], weight.shape[1])
        return Quantized(self.encode(weight, params), params, self, shape)


def _float16(values: Float32) -> Array:
    # Flush scales below the smallest normal float16 to zero: their reciprocal is noise.
    halves: Any = values.astype(np.float16)
    return np.where(np.abs(values) < 2.0**-24, np.float16(0), halves)


def _weighted_sum(values: Float32, shares: Float32 | None) -> Float32:
    summed: Float32 = (values if shares is None else values * shares).sum(2, dtype=np.float32)
    return summed
