"""Kernels of the GGUF block grids that deal in codes: nearest codes, and codes to bit fields."""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np

from compress.grids.lanes import f4, kernel


@kernel
def encode_linear(weight, scale, minimum, n, zero, top, begin, end, codes):
    """Nearest codes 0..top of ``scale * (code - zero) - minimum``, rows begin..end; zero where
    the scale is zero. ``scale`` and ``minimum``: float32 ``[rows, columns / n]``."""
    for row in range(begin, end):
        for block in range(scale.shape[1]):
            step, low = scale[row, block], minimum[row, block]
            inverse = f4(1.0) / step if step != f4(0.0) else f4(0.0)
            values = weight[row, block * n : block * n + n]
            out = codes[row, block * n : block * n + n]
            for i in range(n):
                v = (values[i] + low) * inverse + (zero + f4(0.5))
                out[i] = np.uint8(np.int32(min(max(v, f4(0.0)), top)))


@kernel
def encode_levels(weight, scale, cells, n, begin, end, codes):
    """Nearest codes of ``scale * level[code]``, where ``cells[floor(2 v) + 256]`` is the code of
    the level nearest to v; rows begin..end."""
    for row in range(begin, end):
        for block in range(scale.shape[1]):
            step = scale[row, block]
            inverse = f4(2.0) / step if step != f4(0.0) else f4(0.0)
            values = weight[row, block * n : block * n + n]
            out = codes[row, block * n : block * n + n]
            for i in range(n):
                cell = min(max(np.floor(values[i] * inverse + f4(256.0)), f4(0.0)), f4(511.0))
                out[i] = cells[np.uint32(np.int32(cell))]


@kernel
def join_codes(codes, bits, first, run, start, size, blocks):
    """Bit fields of codes into bytes ``start..start + size`` of every block.

    Each byte holds ``8 / bits`` fields of ``bits`` bits, cut from bit ``first`` of codes that are
    ``run`` columns apart. ``codes``: uint8 ``[blocks, columns]``, ``blocks``: ``[blocks, bytes]``.
    """
    fields = 8 // bits
    mask = np.uint8((1 << bits) - 1)
    for block in range(len(blocks)):
        for begin in range(0, size, run):
            out = blocks[block, start + begin : start + begin + run]
            for k in range(fields):
                source = codes[block, begin * fields + k * run : begin * fields + (k + 1) * run]
                for i in range(run):
                    field = np.uint8(((source[i] >> first) & mask) << (k * bits))
                    out[i] = field if k == 0 else out[i] | field
