"""Two numbers of 4 bits to a byte, the first in its low half: as ONNX and Core ML have them."""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np

from compress.grids import Array
from compress.grids.lanes import kernel

__all__ = ["join_pairs"]


def join_pairs(codes: Array) -> Array:
    """The bytes of numbers.

    Args:
        codes: uint8 or int8, of an even number of columns; of each the low 4 bits count.

    Returns:
        uint8, with half as many columns.
    """
    flat = np.ascontiguousarray(codes).view(np.uint8).reshape(-1)
    joined = np.empty(flat.size // 2, np.uint8)
    join(flat, joined)
    return joined.reshape(*codes.shape[:-1], -1)


@kernel
def join(codes, joined):
    """``joined[i]`` from ``codes[2 i]`` and ``codes[2 i + 1]``."""
    for i in range(len(joined)):
        joined[i] = (codes[2 * i] & 15) | (codes[2 * i + 1] << 4)
