"""Matrices that a checkpoint stores as MXFP4 (gpt_oss): read as they are, or decoded.

``NAME_blocks`` uint8 ``[experts, rows, columns / 32, 16]`` has two codes a byte, the earlier column
in the low half; ``NAME_scales`` uint8 ``[experts, rows, columns / 32]`` has an exponent of each 32
columns. Source: ``integrations/mxfp4.py`` of transformers 4.57.6; OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compress.decoder.config import WeightMap
from compress.errors import CheckpointError

if TYPE_CHECKING:
    from compress.checkpoint.checkpoint import Checkpoint
    from compress.checkpoint.safetensors import TensorInfo
    from compress.checkpoint.sources import Source

__all__ = ["ggml_rows", "packed_rows", "read_packed", "unpacked"]

Bytes = NDArray[np.uint8]

LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
NOT_A_NUMBER = 255  # as an exponent


def read_packed(checkpoint: Checkpoint, name: str, expert: int, rows: slice) -> tuple[Bytes, Bytes]:
    """Codes ``[rows, columns / 32, 16]`` and exponents ``[rows, columns / 32]`` of some rows of an
    expert's matrix.

    Raises:
        CheckpointError: a short read, or an exponent that is no number.
    """
    blocks, scales = (
        _read(checkpoint, checkpoint.tensors[f"{name}_{part}"], expert, rows)
        for part in ("blocks", "scales")
    )
    if (scales == NOT_A_NUMBER).any():
        raise CheckpointError(f"{name}_scales has exponents that stand for NaN")
    return blocks, scales


def _read(checkpoint: Checkpoint, info: TensorInfo, expert: int, rows: slice) -> Bytes:
    step = rows.step or 1
    each = math.prod(info.shape[2:])
    count = max(min(rows.stop, info.shape[1]) - rows.start, 0)
    whole = np.empty((count, *info.shape[2:]), np.uint8)
    remote = checkpoint.remote
    elsewhere = remote is not None and info.file.name in remote.files
    stream = remote.open(info.file) if remote and elsewhere else info.file.open("rb", buffering=0)
    with stream:
        stream.seek(info.offset + (expert * info.shape[1] + rows.start) * each)
        flat, done = whole.reshape(-1).data, 0
        while done < whole.nbytes:
            got = stream.readinto(flat[done:])
            if not got:
                raise CheckpointError(f"{info.file.name} is truncated inside {info.name}")
            done += got
    return whole[::step]


def packed_rows(source: Source, name: str, rows: slice) -> Bytes:
    """Rows of an expert's matrix as ggml's blocks (``ggml_rows``).

    Args:
        source: of the stored weights.
        name: ``blocks.3.experts.17.up_proj.weight``.
    """
    (part,) = WeightMap(source.config).parts(name)
    assert part.expert is not None
    begin, end = (part.start + n * part.step for n in (rows.start, rows.stop))
    window = slice(begin, end, part.step)
    return ggml_rows(*read_packed(source.checkpoint, part.source, part.expert, window))


def _codes(blocks: Bytes) -> Bytes:
    """One code a byte, ``[rows, columns / 32, 32]``, in order of columns."""
    return np.stack((blocks & 15, blocks >> 4), axis=-1).reshape(*blocks.shape[:2], 32)


def unpacked(blocks: Bytes, scales: Bytes) -> NDArray[np.float32]:
    """The matrix, float32 ``[rows, columns]``."""
    values = LEVELS[_codes(blocks)]
    values *= np.ldexp(np.float32(1), scales.astype(np.int32) - 127)[..., None]
    found: NDArray[np.float32] = values.reshape(len(blocks), -1)
    return found


def ggml_rows(blocks: Bytes, scales: Bytes) -> Bytes:
    """The same codes and exponents in ggml's ``block_mxfp4``: exponent, then sixteen bytes with the
    codes of columns i and i + 16; uint8 ``[rows, columns / 32 * 17]``."""
    codes = _codes(blocks)
    joined = codes[..., :16] | (codes[..., 16:] << 4)
    found: Bytes = np.concatenate([scales[..., None], joined], axis=-1)
    return found.reshape(len(blocks), -1)
