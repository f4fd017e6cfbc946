"""Decodes integers with a float16 scale for each block of a row to float32, in one pass.

The arithmetic is ``constexpr.blockwise_shift_scale``'s, product rounded to float16 and widened, bit
for bit but for the sign of zeros; from packed int4 it takes a third of its time or less.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compress.grids.lanes import f4, kernel
from exporters.coreml.blobs import BITS, Packed
from exporters.coreml.constexpr import Compressed, Constant, decode

__all__ = ["decode_blocks", "has_blocks"]

CODES = ("int4", "uint4", "int8", "uint8")
TINY = f4(2.0**-14)  # float16's steps are the same below
# To the nearest 11 bits of float32's 24, ties to even: as integers.
PLACE, ONE, UP, KEEP = np.int32(13), np.int32(1), np.int32(0xFFF), np.int32(~0x1FFF)
LARGEST = f4(128.0)  # of a scale whose products with differences of codes are all finite


def has_blocks(constant: Constant) -> bool:
    """Whether ``decode_blocks`` can decode a constant: a matrix with blocks along its rows."""
    if not isinstance(constant, Compressed) or len(constant.shape) != 2:
        return False
    data, scale = constant.inputs.get("data"), constant.inputs.get("scale")
    offset = constant.inputs.get("offset")
    if constant.kind != "constexpr_blockwise_shift_scale":
        return False
    if not isinstance(data, Packed) or not isinstance(scale, Packed) or data.dtype not in CODES:
        return False
    if scale.dtype != "fp16" or scale.shape[0] != data.shape[0] or data.shape[1] % scale.shape[1]:
        return False
    whole = data.shape[1] // scale.shape[1] * BITS[data.dtype] % 8 == 0
    shifts = isinstance(offset, Packed) and BITS[offset.dtype] <= 8 and offset.shape == scale.shape
    return whole and (offset is None or shifts)


def decode_blocks(constant: Constant) -> Tensor:
    """The numbers of a constant for which ``has_blocks``, float32 ``[rows, columns]``."""
    assert isinstance(constant, Compressed)
    data, scale = constant.inputs["data"], constant.inputs["scale"]
    offset = constant.inputs.get("offset")
    assert isinstance(data, Packed) and isinstance(scale, Packed) and not isinstance(offset, str)
    scales = decode(scale).to(torch.float32).numpy()
    shifts = np.zeros_like(scales)
    if offset is not None:
        shifts += decode(offset).to(torch.float32).numpy()
    signed = 1 << (BITS[data.dtype] - 1) if data.dtype.startswith("int") else 0
    shifts += np.float32(signed)  # codes with their sign bit turned over count from the lowest
    found = np.empty(data.shape, np.float32)
    raw = np.ascontiguousarray(data.raw)
    nibbles = BITS[data.dtype] == 4
    blocks(raw, scales, shifts, np.uint8(signed), nibbles, found, found.view(np.int32))
    return torch.from_numpy(found)


def fill_blocks(raw, scale, shift, turn, nibbles, out, bits):
    """``half(((code ^ turn) - shift) * scale)`` of every code.

    Args:
        raw: uint8: a code each, or two with the first in the low half.
        scale, shift: float32 ``[rows, blocks]``.
        turn: uint8, the sign bit of signed codes.
        nibbles: whether a byte has two codes.
        out: float32 ``[rows, columns]``, filled; ``bits`` is the same memory as int32.
    """
    rows, count = scale.shape
    columns = out.shape[1]
    size, sign, low = columns // count, np.int32(turn), np.int32(15)
    for row in range(rows):
        values, integers = out[row], bits[row]
        if nibbles:
            pairs = raw[row * (columns // 2) : (row + 1) * (columns // 2)]
            for i in range(columns // 2):
                pair = np.int32(pairs[i])
                values[2 * i] = f4((pair & low) ^ sign)
                values[2 * i + 1] = f4((pair >> np.int32(4)) ^ sign)
        else:
            codes = raw[row * columns : (row + 1) * columns]
            for i in range(columns):
                values[i] = f4(np.int32(codes[i]) ^ sign)
        regular = True
        for block in range(count):
            factor, less = scale[row, block], shift[row, block]
            part = values[block * size : (block + 1) * size]
            for i in range(size):
                part[i] = (part[i] - less) * factor
            regular = regular and TINY <= abs(factor) < LARGEST
        if regular:  # no product is subnormal or infinite
            for i in range(columns):
                value = integers[i]
                integers[i] = (value + UP + ((value >> PLACE) & ONE)) & KEEP
            continue
        for i in range(columns):
            exact = values[i]
            if abs(exact) < TINY:
                values[i] = (exact + f4(0.75)) - f4(0.75)  # to a multiple of 2**-24
            elif abs(exact) >= f4(65520.0):
                values[i] = f4(np.inf) if exact > f4(0.0) else f4(-np.inf)
            else:
                value = integers[i]
                integers[i] = (value + UP + ((value >> PLACE) & ONE)) & KEEP


blocks = kernel(fill_blocks, fastmath=())
