"""safetensors files, read by byte range and written one tensor at a time.

The layout (8 bytes of header length, little-endian; JSON; data without gaps) is that of
https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint.not_a_checkpoint import not_a_weight
from compress.decoder.config_json import short
from compress.decoder.names import BUFFERS
from compress.errors import CheckpointError
from compress.machine import in_threads

__all__ = [
    "BYTES",
    "TensorInfo",
    "check_finite",
    "header_rows",
    "read_range",
    "round_to",
    "scan_safetensors",
    "write_safetensors",
]

Float32 = NDArray[np.float32]

BYTES: dict[str, int] = {"F32": 4, "F16": 2, "BF16": 2}
PACKED = ("_blocks", "_scales")  # of names of MXFP4 (``compress.checkpoint.packed``), dtype U8
Opened = Callable[[Path], io.RawIOBase]
"""Opens a shard by its path, for reading, seekable."""

CHUNK = 1 << 16  # values converted at a time: input and output fit in a core's cache
PIECE = 1 << 20  # least values for a thread
INFINITE = 0x7F80  # of bfloat16: an exponent of ones
MAX_HEADER = 8 << 20  # bytes: some 60,000 tensors; the reference implementation takes 100 MB
MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a shard header describes it.

    Attributes:
        dtype: ``F32``, ``F16`` or ``BF16``; ``U8`` of ``PACKED``.
        file: the shard.
        offset: of the first byte in the file; -1 in a pickle.
        nbytes: length.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def scan_safetensors(
    file: Path, opened: Callable[[Path], BinaryIO] | None = None
) -> dict[str, TensorInfo]:
    """The tensors of a file, from its header; known buffers that are not float are left out.

    Args:
        file: the shard.
        opened: opens a shard that is elsewhere.

    Raises:
        CheckpointError: not a safetensors file, truncated, or with weights that are not float.
    """
    with file.open("rb") if opened is None else opened(file) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if size < 8 or length > size - 8:
            lfs = prefix == b"version "
            raise CheckpointError(
                f"{file.name} is not a safetensors file, or is truncated",
                hint="it is a Git LFS pointer: run git lfs pull" if lfs else "",
            )
        if length > MAX_HEADER:
            raise CheckpointError(
                f"{file.name} has a header of {length:,} bytes, more than {MAX_HEADER:,}"
            )
        rows = header_rows(file, stream.read(length))
    start = 8 + length
    tensors = {}
    for name, dtype, shape, begin, end in rows:
        packed = dtype == "U8" and name.endswith(PACKED)
        if dtype not in BYTES and not packed:
            if BUFFERS.search(name):
                continue
            raise not_a_weight(file.name, name, dtype)
        expected = math.prod(shape) * (1 if packed else BYTES[dtype])
        whole = min(shape, default=0) >= 0 and end - begin == expected
        if not whole or begin < 0:
            raise CheckpointError(f"{file.name}: {short(name)} has a wrong byte range")
        if start + end > size:
            raise CheckpointError(
                f"{file.name} is truncated: {short(name)} ends at byte {start + end}, "
                f"the file has {size}",
                hint="download it again",
            )
        tensors[name] = TensorInfo(name, dtype, shape, file, start + begin, end - begin)
    return tensors


def read_range(
    info: TensorInfo,
    start_row: int,
    count: int,
    *,
    checked: bool = True,
    opened: Opened | None = None,
) -> Float32:
    """``count`` values from row ``start_row`` on, float32, flat.

    The kernel is advised to prefetch as many bytes after them.

    Args:
        opened: opens a shard that is elsewhere.

    Raises:
        CheckpointError: a short read, or, ``checked``, NaN/Inf among the values.
    """
    size = BYTES[info.dtype]
    offset = info.offset + start_row * math.prod(info.shape[1:]) * size
    values = np.empty(count, np.float32)

    finite: list[bool] = []
    try:
        in_threads(partial(_read_into, info, opened, offset, values, finite), count, PIECE)
        if opened is None and hasattr(os, "posix_fadvise") and count:
            handle = os.open(info.file, os.O_RDONLY)
            try:
                end, ahead = offset + count * size, count * size
                os.posix_fadvise(handle, end, ahead, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(handle)
    except OSError as error:
        raise CheckpointError(f"{info.file.name} cannot be read: {error.strerror}") from error
    if checked and not all(finite):
        check_finite(info.name, values)
    return values


def check_finite(name: str, values: Float32) -> None:
    """Refuse NaN and Inf.

    Raises:
        CheckpointError: how many there are, and in which tensor.
    """
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        raise CheckpointError(f"{name} has {bad} NaN or Inf value(s)")


def _read_into(
    info: TensorInfo,
    opened: Opened | None,
    offset: int,
    whole: Float32,
    finite: list[bool],
    begin: int,
    end: int,
) -> None:
    """Fill ``whole[begin:end]`` from the bytes at ``offset``.

    ``finite`` gets True only where all values are finite; False means that ``check_finite`` must
    decide.

    Raises:
        CheckpointError: a short read.
        OSError: a failed read.
    """
    if info.dtype == "BF16":
        from compress.grids.lanes import widen_bfloat16  # compiles: imported only when needed

    kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[info.dtype]
    values = whole[begin:end]
    raw = np.empty(min(CHUNK, values.size), kind)
    fine = True
    there = info.file.open("rb", buffering=0) if opened is None else opened(info.file)
    with there as stream, np.errstate(all="ignore"):
        stream.seek(offset + begin * BYTES[info.dtype])
        for start in range(0, values.size, CHUNK):
            part = values[start : start + CHUNK]
            stored = raw[: part.size]
            read = 0
            while read < stored.nbytes:
                got = stream.readinto(stored.view(np.uint8)[read:].data)
                if not got:
                    raise CheckpointError(f"{info.file.name} is truncated inside {info.name}")
                read += got
            if info.dtype == "BF16":
                fine &= bool(widen_bfloat16(stored, part.view(np.uint32)) < INFINITE)
            else:
                part[:] = stored
                # A finite sum means finite values (it may also overflow); a quarter of the cost of
                # checking each value.
                fine &= math.isfinite(float(part.sum()))
    finite.append(fine)


def header_rows(file: Path, header: bytes) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    """Name, dtype, shape, first and last byte of each tensor of a safetensors header."""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        rows = []
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            numbers = (*entry["shape"], begin, end)
            if any(type(number) is not int or number >= 2**63 for number in numbers):
                raise ValueError(name)
            if len(entry["shape"]) > MAX_DIMENSIONS:
                raise ValueError(name)
            rows.append((name, str(entry["dtype"]), tuple(entry["shape"]), begin, end))
        return rows
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file.name} has a damaged header") from error


def write_safetensors(
    path: Path,
    headers: Mapping[str, tuple[str, tuple[int, ...]]],
    values: Iterable[Float32],
) -> None:
    """Write a safetensors file.

    Args:
        path: of the file.
        headers: name → dtype (``F32``, ``F16``, ``BF16``) and shape, in the order of the data.
        values: of each tensor in that order, float32; taken one at a time.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}  # required by transformers
    end = 0
    for name, (dtype, shape) in headers.items():
        begin, end = end, end + math.prod(shape) * BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little"))
        stream.write(header)
        for (dtype, _), tensor in zip(headers.values(), values, strict=True):
            encode(tensor, dtype).tofile(stream)


def encode(values: Float32, dtype: str) -> NDArray[np.generic]:
    """Values in the file's dtype: float32, float16, or uint16 with the bits of bfloat16."""
    if dtype == "F32":
        return values.astype("<f4", copy=False)
    if dtype == "F16":
        return values.astype("<f2")
    bits = np.ascontiguousarray(values, dtype="<f4").view(np.uint32)
    # To nearest, ties to even.
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")


def round_to(values: Float32, dtype: str) -> Float32:
    """Values rounded to ``dtype``, as float32."""
    if dtype != "BF16":
        return encode(values, dtype).astype(np.float32)
    return (encode(values, dtype).astype(np.uint32) << 16).view(np.float32)
