"""``weight.bin``: where each array lies, and writing them there slab by slab.

The format is in ``blobs.py``. coremltools has a writer, which wants each array whole and packs it
in memory: half a gigabyte for the head of a large vocabulary. The bytes here are the same.
"""

from __future__ import annotations

import math
import struct
from io import RawIOBase

import numpy as np

from compress.errors import DiskFullError, is_disk_full
from compress.grids import Array
from exporters.coreml.blobs import BITS, BLOB_TYPES, RECORD, SENTINEL
from exporters.coreml.planning import ALIGNMENT, Part

HEADER = struct.Struct("<II56x")  # number of records, version
VERSION = 2
TYPES = {dtype: number for number, dtype in BLOB_TYPES.items()}


class Layout:
    """Where the arrays of a ``weight.bin`` lie, in the order of their coming.

    Attributes:
        offsets: of each array's record, by name.
        end: bytes so far.
    """

    def __init__(self) -> None:
        self.offsets: dict[str, int] = {}
        self.end = ALIGNMENT

    def add(self, name: str, part: Part) -> int:
        """The place of one more array, or of one that has its place; the offset of its record."""
        if name not in self.offsets:
            self.offsets[name] = aligned(self.end)
            self.end = self.offsets[name] + ALIGNMENT + part.nbytes
        return self.offsets[name]


class Blob:
    """One array that is being written to its place, some rows after the other.

    Raises:
        DiskFullError: no room.
    """

    def __init__(self, stream: RawIOBase, offset: int, part: Part) -> None:
        self._stream, self._part = stream, part
        self._begin, self._taken = offset + ALIGNMENT, 0
        padding = 8 * part.nbytes - math.prod(part.shape) * BITS[part.dtype]
        record = RECORD.pack(SENTINEL, TYPES[part.dtype], part.nbytes, self._begin, padding)
        write_at(stream, offset, record)

    def append(self, values: Array) -> int:
        """Write the next rows, of the part's dtype; their bytes."""
        bits = BITS[self._part.dtype]
        assert self._taken * bits % 8 == 0  # slabs begin with a byte
        packed = pack_bits(values, bits)
        write_at(self._stream, self._begin + self._taken * bits // 8, packed.data)
        self._taken += values.size
        return int(packed.nbytes)

    def close(self) -> int:
        """All rows are there; where the array ends in the file."""
        assert self._taken == math.prod(self._part.shape), (self._part, self._taken)
        return self._begin + self._part.nbytes


def write_at(stream: RawIOBase, offset: int, data: bytes | memoryview) -> None:
    """Write bytes at a place of a file without a buffer, whose closing would try once more.

    Raises:
        DiskFullError: no room.
    """
    rest = memoryview(data).cast("B")
    try:
        stream.seek(offset)
        while rest:
            rest = rest[stream.write(rest) :]
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise DiskFullError(f"weight.bin could not be written: {error.strerror}") from error


def aligned(offset: int) -> int:
    """The next multiple of ``ALIGNMENT``."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def pack_bits(values: Array, bits: int) -> Array:
    """The bytes of numbers: sub-byte integers (a byte each here) without gaps, low bits first.

    A last byte that is not full is filled with zeros.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    raw = flat.view(np.uint8)
    if bits >= 8:
        return raw
    if bits == 4 and raw.size % 2 == 0:
        from compress.grids.lanes import join_pairs  # compiles: not before it is needed

        return join_pairs(raw)
    fields = np.unpackbits(raw[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(fields.reshape(-1), bitorder="little")
