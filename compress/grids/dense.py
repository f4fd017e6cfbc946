"""Dense grids: F32, F16, BF16. No scales; the codes are the stored numbers themselves.

BF16 has no numpy type, so its codes are uint16, the upper halves of float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.errors import GridError
from compress.grids import Array, BaseGrid, Float32, Params, Quantized

__all__ = ["DenseGrid", "make"]

SIZES = {"F32": 4, "F16": 2, "BF16": 2}


def make(name: str) -> DenseGrid:
    """``F32``, ``F16`` or ``BF16``.

    Raises:
        GridError: another name.
    """
    if name not in SIZES:
        raise GridError(f"there is no grid {name!r}", hint=", ".join(SIZES))
    return DenseGrid(name)


@dataclass(frozen=True)
class DenseGrid(BaseGrid):
    """A float format; see ``compress.grids.Grid``. Tensors may have any number of dimensions."""

    name: str
    group_rows = 1  # rows are independent

    @property
    def bits(self) -> int:
        """16 or 32."""
        return 8 * SIZES[self.name]

    @property
    def group_size(self) -> int:
        """0: there are no scales."""
        return 0

    @property
    def symmetric(self) -> bool:
        """True: there are no zero points."""
        return True

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a stored tensor."""
        return int(np.prod(shape, dtype=np.int64)) * SIZES[self.name]

    def fit(self, weight: Float32, importance: Float32 | None = None) -> Params:
        """An empty dict: there are no parameters."""
        return {}

    def encode(self, weight: Float32, params: Params) -> Array:
        """The nearest stored numbers (ties to even): float32, float16, or uint16 for BF16.

        Raises:
            GridError: F16 and a weight that is not finite or exceeds 65504.
        """
        weight = np.ascontiguousarray(weight, dtype=np.float32)
        if self.name == "F32":
            return weight
        if self.name == "BF16":
            return _upper_halves(weight)
        with np.errstate(over="ignore"):
            halves = weight.astype(np.float16)
        if not np.isfinite(halves).all():
            raise GridError(
                "F16: a weight is not finite or beyond float16's range",
                hint="keep this tensor in BF16 or F32",
            )
        return halves

    def decode(self, codes: Array, params: Params) -> Float32:
        """float32 of the same shape."""
        if self.name == "BF16":
            return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return codes.astype(np.float32)

    def pack(self, codes: Array, params: Params) -> dict[str, Array]:
        """``blocks``: the stored numbers as little-endian bytes, uint8 ``[..., bytes_per_row]``."""
        stored = codes.astype(codes.dtype.newbyteorder("<"), copy=False)
        return {"blocks": np.ascontiguousarray(stored).view(np.uint8)}

    def quantize(self, weight: Float32, importance: Float32 | None = None) -> Quantized:
        """``encode``; the importance changes nothing."""
        codes = self.encode(weight, {})
        return Quantized(codes, {}, self, weight.shape)


def _upper_halves(weight: Float32) -> Array:
    bits = weight.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # Rounding would carry a NaN's payload into the sign; keep it a quiet NaN instead.
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, (bits >> np.uint32(16)) | np.uint32(64), rounded).astype(np.uint16)
