"""``weight.bin``: written by coremltools' own code, or only counted, to know its size before."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from compress.errors import DiskFullError
from compress.grids import Array
from compress.model import Weights
from exporters.coreml.planning import ALIGNMENT, Part


class Blobs(Protocol):
    """Where large arrays go."""

    def find(self, name: str) -> int | None:
        """The offset of an array's record, where an earlier run has written it."""
        ...

    def append(self, name: str, values: Array, dtype: str, weight: str) -> int:
        """Take one array; the offset of its record.

        Args:
            name: of the constant.
            values: its array.
            dtype: MIL's.
            weight: that it is of, by our name.
        """
        ...


class BlobFile:
    """``weight.bin``, appended to. ``written`` is told the bytes of every array."""

    def __init__(
        self, writer: Any, path: Path, weights: Weights, written: Callable[[int], None]
    ) -> None:
        self._writer, self._path = writer, path
        self._weights, self._written = weights, written
        if weights.ledger.cut(path):
            with path.open("r+b") as stream:  # the header starts with the number of records
                stream.write(struct.pack("<I", len(weights.ledger)))
        else:
            writer(str(path), True)

    def find(self, name: str) -> int | None:
        """See ``Blobs.find``."""
        if name not in self._weights.ledger:
            return None
        row = self._weights.ledger[name]
        self._written(row["nbytes"])
        return int(row["offset"])

    def append(self, name: str, values: Array, dtype: str, weight: str) -> int:
        """See ``Blobs.append``. The C++ writer flushes when it goes, so it goes with each array.

        Raises:
            DiskFullError: no room; the writer tells only some of the ways in which that comes.
        """
        flat = np.ascontiguousarray(values).reshape(-1)
        if dtype == "fp16":
            flat = flat.view(np.uint16)
        kind = "float" if dtype == "fp32" else dtype
        nbytes = Part("", dtype, values.shape).nbytes
        try:
            offset: int = getattr(self._writer(str(self._path), False), f"write_{kind}_data")(flat)
        except RuntimeError as error:
            raise DiskFullError(f"weight.bin could not be written: {error}") from error
        end = offset + ALIGNMENT + nbytes
        if self._path.stat().st_size < end:
            raise DiskFullError(
                f"{self._path.name} ends before byte {end:,}, which was written",
                hint="is the disk full?",
            )
        self._weights.finish(name, weight, self._path, end, offset=offset, nbytes=nbytes)
        self._written(nbytes)
        return offset


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

    def append(self, name: str, values: Array, dtype: str, weight: str) -> int:
        """Count one array; the offset that its record would have."""
        offset = -(-self.end // ALIGNMENT) * ALIGNMENT
        self.end = offset + ALIGNMENT + Part("", dtype, values.shape).nbytes
        return offset
