"""Reads constant arrays from a Core ML package's weights file.

``weight.bin`` (coremltools' MILBlob format, version 2): a 64-byte header, then for every blob a
64-byte record at the offset that the graph names, and the data where the record says::

    record:  u32 0xDEADBEEF | u32 type | u64 bytes | u64 data offset | u64 padding bits | 4 x u64 0

Sub-byte integers are packed without gaps, low bits first: the first int4 is the low nibble.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from compress.errors import ArtifactError

__all__ = ["BITS", "DATA_TYPES", "Blobs", "Packed"]

# MIL.proto's DataType, by the names of MIL's text format.
DATA_TYPES = {
    1: "bool",
    2: "string",
    10: "fp16",
    11: "fp32",
    12: "fp64",
    21: "int8",
    22: "int16",
    23: "int32",
    24: "int64",
    25: "int4",
    31: "uint8",
    32: "uint16",
    33: "uint32",
    34: "uint64",
    35: "uint4",
    36: "uint2",
    37: "uint1",
    38: "uint6",
    39: "uint3",
}
BITS = {"bool": 8} | {
    name: int(name.lstrip("fpuint"))
    for name in DATA_TYPES.values()
    if name not in ("bool", "string")
}
BLOB_TYPES = {
    1: "fp16",
    2: "fp32",
    3: "uint8",
    4: "int8",
    6: "int16",
    7: "uint16",
    8: "int4",
    9: "uint1",
    10: "uint2",
    11: "uint4",
    12: "uint3",
    13: "uint6",
    14: "int32",
    15: "uint32",
}
RECORD = struct.Struct("<IIQQQ32x")
SENTINEL = 0xDEADBEEF
MODEL_PREFIX = "@model_path/"


@dataclass(frozen=True)
class Packed:
    """A stored constant array: ``raw`` is uint8, one-dimensional, memory-mapped."""

    dtype: str
    shape: tuple[int, ...]
    raw: NDArray[np.uint8]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Blobs:
    """The files of a package's ``weights`` folder, memory-mapped at first use."""

    def __init__(self, model_folder: Path) -> None:
        self.folder = model_folder
        self._files: dict[str, NDArray[np.uint8]] = {}

    def read(self, file_name: str, offset: int, dtype: str, shape: tuple[int, ...]) -> Packed:
        """Read the blob whose record is at ``offset``, and check it against the declared type.

        Raises:
            ArtifactError: no such file, no record there, another type or length, or truncated.
        """
        data = self._map(file_name)
        where = f"{PurePosixPath(file_name).name} at byte {offset}"
        if offset + RECORD.size > len(data):
            raise ArtifactError(f"{where}: past the end of the file (truncated?)")
        record = data[offset : offset + RECORD.size].tobytes()
        sentinel, blob_type, nbytes, start, _ = RECORD.unpack(record)
        if sentinel != SENTINEL:
            raise ArtifactError(f"{where}: no weight record there (damaged?)")
        if BLOB_TYPES.get(blob_type) != dtype:
            found = BLOB_TYPES.get(blob_type, f"type {blob_type}")
            raise ArtifactError(f"{where}: holds {found}, the program declares {dtype}")
        expected = (math.prod(shape) * BITS[dtype] + 7) // 8
        if nbytes != expected:
            raise ArtifactError(f"{where}: {nbytes} bytes where {dtype} {shape} needs {expected}")
        if start + nbytes > len(data):
            raise ArtifactError(f"{where}: its data ends past the end of the file (truncated?)")
        return Packed(dtype, shape, data[start : start + nbytes])

    def _map(self, file_name: str) -> NDArray[np.uint8]:
        if file_name not in self._files:
            relative = PurePosixPath(file_name.removeprefix(MODEL_PREFIX))
            if relative.is_absolute() or ".." in relative.parts:
                raise ArtifactError(f"the program reads a file outside of its package: {file_name}")
            path = self.folder / relative
            if not path.is_file() or path.stat().st_size == 0:
                raise ArtifactError(f"the weights are missing: {path}")
            # Copy-on-write: torch needs writable memory, the file must not change.
            self._files[file_name] = np.memmap(path, dtype=np.uint8, mode="c")
        return self._files[file_name]
