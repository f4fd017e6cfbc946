"""``weight.bin``: written by coremltools' own code, or only counted, to know its size before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from compress.errors import DiskFullError
from compress.grids import Array
from exporters.coreml.planning import ALIGNMENT, Part


class Blobs(Protocol):
    """Where large arrays go."""

    def append(self, values: Array, dtype: str) -> int:
        """Take one array (``dtype``: MIL's); the offset of its record."""
        ...

    def close(self) -> None:
        """That was the last."""
        ...


class BlobFile:
    """``weight.bin``, appended to. ``written`` is told the bytes of every array."""

    def __init__(self, writer: Any, path: Path, written: Callable[[int], None]) -> None:
        self._writer = writer(str(path))
        self._written = written

    def append(self, values: Array, dtype: str) -> int:
        """Write one array; the offset of its record."""
        flat = np.ascontiguousarray(values).reshape(-1)
        if dtype == "fp16":
            flat = flat.view(np.uint16)
        kind = "float" if dtype == "fp32" else dtype
        try:
            offset: int = getattr(self._writer, f"write_{kind}_data")(flat)
        except RuntimeError as error:
            raise DiskFullError(f"weight.bin could not be written: {error}") from error
        self._written(Part("", dtype, values.shape).nbytes)
        return offset

    def close(self) -> None:
        """The C++ writer flushes when it goes."""
        self._writer = None


class CountedBlobs:
    """A ``weight.bin`` that nobody writes.

    Attributes:
        end: bytes so far.
    """

    def __init__(self) -> None:
        self.end = ALIGNMENT

    def append(self, values: Array, dtype: str) -> int:
        """Count one array; the offset that its record would have."""
        offset = -(-self.end // ALIGNMENT) * ALIGNMENT
        self.end = offset + ALIGNMENT + Part("", dtype, values.shape).nbytes
        return offset

    def close(self) -> None:
        """Nothing is open."""
