"""``weight.bin``, written slab by slab, or only counted, to know its size before.

The layout is in ``blobs.py``. coremltools has a writer, which wants each array whole and packs it
in memory: half a gigabyte for the head of a large vocabulary. The bytes here are the same.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from compress.errors import DiskFullError, is_disk_full
from compress.grids import Array
from compress.plan.shapes import Weights
from exporters.coreml.blobs import BITS, BLOB_TYPES, RECORD, SENTINEL
from exporters.coreml.planning import ALIGNMENT, Part

HEADER = struct.Struct("<II56x")  # number of records, version
VERSION = 2
TYPES = {dtype: number for number, dtype in BLOB_TYPES.items()}


class Blobs(Protocol):
    """Where large arrays go."""

    def find(self, name: str) -> int | None:
        """The offset of an array's record, where an earlier run has written it."""
        ...

    def append(self, name: str, part: Part, slabs: Iterable[Array], weight: str) -> int:
        """Take one array; the offset of its record.

        Args:
            name: of the constant.
            part: its shape and type.
            slabs: its values, some rows at a time, flat or not.
            weight: that it is of, by our name.
        """
        ...


class BlobFile:
    """``weight.bin``, appended to. ``written`` is told the bytes as they come."""

    def __init__(self, path: Path, weights: Weights, written: Callable[[int], None]) -> None:
        self._path, self._weights, self._written = path, weights, written
        if not weights.ledger.cut(path):
            path.write_bytes(HEADER.pack(0, VERSION))

    def find(self, name: str) -> int | None:
        """See ``Blobs.find``."""
        if name not in self._weights.ledger:
            return None
        row = self._weights.ledger[name]
        self._written(row["nbytes"])
        return int(row["offset"])

    def append(self, name: str, part: Part, slabs: Iterable[Array], weight: str) -> int:
        """See ``Blobs.append``.

        Raises:
            DiskFullError: no room.
        """
        size = math.prod(part.shape)
        padding = 8 * part.nbytes - size * BITS[part.dtype]
        with self._path.open("r+b") as stream:
            stream.write(HEADER.pack(len(self._weights.ledger) + 1, VERSION))
            offset = aligned(stream.seek(0, 2))
            begin = offset + ALIGNMENT
            record = RECORD.pack(SENTINEL, TYPES[part.dtype], part.nbytes, begin, padding)
            stream.seek(offset)
            stream.write(record)
            try:
                taken = self._write_slabs(stream, slabs, part.dtype)
                stream.flush()
            except OSError as error:
                if not is_disk_full(error):  # of reading, perhaps
                    raise
                raise DiskFullError(f"weight.bin could not be written: {error.strerror}") from error
        assert taken == size, (name, taken, size)
        end = begin + part.nbytes
        self._weights.finish(name, weight, self._path, end, offset=offset, nbytes=part.nbytes)
        return offset

    def _write_slabs(self, stream: BinaryIO, slabs: Iterable[Array], dtype: str) -> int:
        """The elements that were written."""
        taken = 0
        for slab in slabs:
            assert taken * BITS[dtype] % 8 == 0  # slabs begin with a byte
            packed = pack_bits(slab, BITS[dtype])
            stream.write(packed.data)
            self._written(packed.nbytes)
            taken += slab.size
        return taken


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
        from compress.grids.nibbles import join_pairs  # compiles: not before it is needed

        return join_pairs(raw)
    fields = np.unpackbits(raw[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(fields.reshape(-1), bitorder="little")


class CountedBlobs:
    """A ``weight.bin`` that nobody writes.

    Attributes:
        end: bytes so far.
    """

    def __init__(self) -> None:
        self.end = ALIGNMENT

    def find(self, name: str) -> int | None:
        """Nothing is written."""
        return None

    def append(self, name: str, part: Part, slabs: Iterable[Array], weight: str) -> int:
        """Count one array; the offset that its record would have. No slab is asked for."""
        offset = aligned(self.end)
        self.end = offset + ALIGNMENT + part.nbytes
        return offset
