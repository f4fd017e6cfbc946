"""Bit layout of the GGUF block grids: codes and parameters to bytes and back.

The layouts are those of ggml (ggml-common.h), little-endian. Below, ``c[i]`` is the code of
column i of the block, ``|`` joins fields in the order of the bytes:

    Q4_0, IQ4_NL  d | c[i] + 16 c[i+16]
    IQ4_XS        d | 2 + 4 bytes scales | per 32 columns: c[i] + 16 c[i+16]
    Q4_1          d m | as Q4_0
    Q5_0, Q5_1    as Q4_0, Q4_1, with the fifth bits of all 32 codes as one uint32 before them
    Q8_0          d | c[i] - 128 as int8
    Q4_K          d dmin | 12 bytes scales and mins | per 64 columns: c[i] + 16 c[i+32]
    Q5_K          as Q4_K, with bit k of 32 bytes before the codes = fifth bit of c[32 k + i]
    Q6_K          per 128 columns: low nibbles c[i] + 16 c[i+64] (i < 64)
                  | high pairs of bits of c[i], c[i+32], c[i+64], c[i+96] | int8 scales | d
    Q3_K          bit k of 32 bytes = third bit of c[32 k + i] | low pairs of bits as in Q2_K
                  | 12 bytes scales | d
    Q2_K          scale + 16 min | per 128 columns: c[i], c[i+32], c[i+64], c[i+96] | d dmin

Scales and mins of Q4_K and Q5_K (6 bits each; j < 4) and scales of Q3_K (6 bits, plus 32):

    byte j      scale[j] + 64 (scale[j+4] >> 4)        byte j < 8   low nibbles of j, j + 8
    byte j + 4  min[j] + 64 (min[j+4] >> 4)            byte j + 8   high pairs of bits of
    byte j + 8  low nibbles of scale[j+4], min[j+4]                 j, j + 4, j + 8, j + 12

Scales of IQ4_XS (6 bits, plus 32): the high pairs of bits of all eight, then their low nibbles two
by two.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compress.grids import Array, Params
from compress.grids.lanes import kernel

Bytes = NDArray[np.uint8]
SIGN = np.uint8(0x80)

# Parameters and runs of codes in the order of the file: name and bytes per block. `low` and
# `high` are the two parts of the codes.
FIELDS: dict[str, tuple[tuple[str, int], ...]] = {
    "Q4_0": (("d", 2), ("low", 16)),
    "Q4_1": (("d", 2), ("m", 2), ("low", 16)),
    "Q5_0": (("d", 2), ("high", 4), ("low", 16)),
    "Q5_1": (("d", 2), ("m", 2), ("high", 4), ("low", 16)),
    "Q8_0": (("d", 2), ("low", 32)),
    "IQ4_NL": (("d", 2), ("low", 16)),
    "IQ4_XS": (("d", 2), ("scales", 6), ("low", 128)),
    "Q2_K": (("scales", 16), ("low", 64), ("d", 2), ("dmin", 2)),
    "Q3_K": (("high", 32), ("low", 64), ("scales", 12), ("d", 2)),
    "Q4_K": (("d", 2), ("dmin", 2), ("scales", 12), ("low", 128)),
    "Q5_K": (("d", 2), ("dmin", 2), ("scales", 12), ("high", 32), ("low", 128)),
    "Q6_K": (("low", 128), ("high", 64), ("scales", 16), ("d", 2)),
}

# How each part of the codes is cut into bit fields: (bits of a field, first bit in the code,
# adjacent columns before the next field of the same byte begins).
PARTS: dict[str, dict[str, tuple[int, int, int]]] = {
    "Q4_0": {"low": (4, 0, 16)},
    "Q4_1": {"low": (4, 0, 16)},
    "Q5_0": {"low": (4, 0, 16), "high": (1, 4, 1)},
    "Q5_1": {"low": (4, 0, 16), "high": (1, 4, 1)},
    "Q8_0": {"low": (8, 0, 32)},
    "IQ4_NL": {"low": (4, 0, 16)},
    "IQ4_XS": {"low": (4, 0, 16)},
    "Q2_K": {"low": (2, 0, 32)},
    "Q3_K": {"low": (2, 0, 32), "high": (1, 2, 32)},
    "Q4_K": {"low": (4, 0, 32)},
    "Q5_K": {"low": (4, 0, 32), "high": (1, 4, 32)},
    "Q6_K": {"low": (4, 0, 64), "high": (2, 4, 32)},
}


def block_bytes(name: str) -> int:
    """Bytes of one block."""
    return sum(size for _, size in FIELDS[name])


def pack(name: str, codes: Array, params: Params, packed: Bytes, begin: int, end: int) -> None:
    """Rows ``begin:end`` of codes, uint8 ``[rows, columns]``, and of parameters, as the bytes of
    ``packed``, uint8 ``[rows, blocks per row, bytes per block]``."""
    codes, blocks = codes[begin:end], packed[begin:end]
    params = {key: values[begin:end] for key, values in params.items()}
    if name == "Q8_0":
        codes = codes ^ SIGN
    flat = blocks.reshape(-1, blocks.shape[2])
    flat_codes = codes.reshape(len(flat), -1)
    start = 0
    for field, size in FIELDS[name]:
        part = blocks[..., start : start + size]
        if field in PARTS[name] and PARTS[name][field][2] == 1:
            flat[:, start : start + size] = np.packbits(flat_codes >> 4, axis=1, bitorder="little")
        elif field in PARTS[name]:
            join_codes(flat_codes, *PARTS[name][field], start, size, flat)
        elif field == "scales":
            part[:] = _join_scales(name, params)
        else:
            part[:] = params[field].astype("<f2")[..., None].view(np.uint8)
        start += size


def unpack(name: str, blocks: Bytes) -> tuple[Array, dict[str, Array]]:
    """The inverse of ``pack``: codes and parameters."""
    bits, _, _ = PARTS[name]["low"]
    _, size = next(field for field in FIELDS[name] if field[0] == "low")
    codes = np.zeros((len(blocks), blocks.shape[1] * size * 8 // bits), dtype=np.uint8)
    params: dict[str, Array] = {}
    start = 0
    for field, size in FIELDS[name]:
        part = np.ascontiguousarray(blocks[..., start : start + size])
        start += size
        if field in PARTS[name]:
            _cut(part, *PARTS[name][field], out=codes)
        elif field == "scales":
            params.update(_cut_scales(name, part))
        else:
            params[field] = part.view("<f2")[..., 0].astype(np.float16)
    if name == "Q8_0":
        codes ^= SIGN
    return codes, params


def _cut(part: Bytes, bits: int, first: int, run: int, out: Array) -> None:
    if bits == 8:
        out |= part.reshape(out.shape)
        return
    joined = part.reshape(*part.shape[:2], -1, run)
    fields = out.reshape(*joined.shape[:3], 8 // bits, run)
    mask = np.uint8((1 << bits) - 1)
    for k in range(8 // bits):
        fields[..., k, :] |= ((joined >> np.uint8(k * bits)) & mask) << np.uint8(first)


def _join_scales(name: str, params: Params) -> Bytes:
    count = {"Q4_K": 8, "Q5_K": 8, "IQ4_XS": 8}.get(name, 16)
    scales = params["scales"].reshape(params["scales"].shape[0], -1, count)
    if name == "Q6_K":
        return scales.view(np.uint8)
    if name == "Q3_K":
        raised = (scales + np.int8(32)).view(np.uint8)
        high = np.zeros((*raised.shape[:2], 4), dtype=np.uint8)
        for k in range(4):
            high |= (raised[..., 4 * k : 4 * k + 4] >> 4) << np.uint8(2 * k)
        return np.concatenate([(raised[..., :8] & 15) | (raised[..., 8:] << 4), high], axis=-1)
    if name == "IQ4_XS":
        raised = (scales + np.int8(32)).view(np.uint8)
        high = np.zeros((*raised.shape[:2], 2), dtype=np.uint8)
        for k in range(4):
            high |= (raised[..., k::4] >> 4) << np.uint8(2 * k)
        return np.concatenate([high, (raised[..., ::2] & 15) | (raised[..., 1::2] << 4)], axis=-1)
    mins = params["mins"].reshape(scales.shape)
    if name == "Q2_K":
        return np.asarray(scales | (mins << 4))
    return np.concatenate(
        [
            scales[..., :4] | ((scales[..., 4:] >> 4) << 6),
            mins[..., :4] | ((mins[..., 4:] >> 4) << 6),
            (scales[..., 4:] & 15) | (mins[..., 4:] << 4),
        ],
        axis=-1,
    )


def _cut_scales(name: str, part: Bytes) -> dict[str, Array]:
    rows = part.shape[0]
    if name == "Q6_K":
        return {"scales": part.view(np.int8).reshape(rows, -1)}
    if name == "Q3_K":
        low = np.concatenate([part[..., :8] & 15, part[..., :8] >> 4], axis=-1)
        high = np.concatenate([(part[..., 8:] >> np.uint8(2 * k)) & 3 for k in range(4)], axis=-1)
        return {"scales": ((low | (high << 4)).view(np.int8) - np.int8(32)).reshape(rows, -1)}
    if name == "IQ4_XS":
        scales = np.empty((*part.shape[:2], 8), dtype=np.uint8)
        scales[..., ::2], scales[..., 1::2] = part[..., 2:] & 15, part[..., 2:] >> 4
        for k in range(4):
            scales[..., k::4] |= ((part[..., :2] >> np.uint8(2 * k)) & 3) << np.uint8(4)
        return {"scales": (scales.view(np.int8) - np.int8(32)).reshape(rows, -1)}
    if name == "Q2_K":
        return {"scales": (part & 15).reshape(rows, -1), "mins": (part >> 4).reshape(rows, -1)}
    head, middle, tail = part[..., :4], part[..., 4:8], part[..., 8:]
    scales = np.concatenate([head & 63, (tail & 15) | ((head >> 6) << 4)], axis=-1)
    mins = np.concatenate([middle & 63, (tail >> 4) | ((middle >> 6) << 4)], axis=-1)
    return {"scales": scales.reshape(rows, -1), "mins": mins.reshape(rows, -1)}


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
