"""Reads the header of a GGUF file: keys and the tensor table, no weights.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. gguf-py's reader makes an array
of every token (seconds for a vocabulary of 150,000); here the entries of long lists are skipped.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from compress.errors import ArtifactError
from compress.files import open_plain

SHOWN = 8  # entries of a list that are shown
LARGEST = 64_000_000  # bytes of a header: those of the largest vocabularies have some 20 MB
STRING, ARRAY, BOOL = 8, 9, 7
# gguf_metadata_value_type → struct format.
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}


@dataclass(frozen=True)
class Listed:
    """A list: its first entries and its length."""

    first: tuple[Any, ...]
    count: int

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.first))
        return f"[{shown}{', …' if self.count > len(self.first) else ''}] ({self.count})"


@dataclass(frozen=True)
class TensorRow:
    """One row of the tensor table.

    Attributes:
        shape: ``[rows, columns]``.
        kind: a ``ggml_type``.
        start: offset of its bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


def read_head(path: Path) -> tuple[dict[str, Any], list[TensorRow]]:
    """Read the keys and the tensor table.

    Raises:
        ArtifactError: not a GGUF file of version 2 or 3, or a damaged one.
    """
    try:
        with open_plain(path) as stream:
            return _Head(stream, path.name).read()
    except OSError as error:
        raise ArtifactError(f"{path.name} cannot be read: {error.strerror}") from error


class _Head:
    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.stream = stream
        self.name = name
        self.size = os.fstat(stream.fileno()).st_size

    def read(self) -> tuple[dict[str, Any], list[TensorRow]]:
        if self.stream.read(4) != b"GGUF":
            raise ArtifactError(f"{self.name} is not a GGUF file")
        version = self.number("I")
        if version not in (2, 3):
            raise ArtifactError(f"{self.name} is a GGUF file of version {version}, not 2 or 3")
        tensors, keys = self.count(), self.count()
        metadata = {self.string(): self.value(self.number("I")) for _ in range(keys)}
        rows = [self.tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self.damaged()
        data = -(-self.stream.tell() // alignment) * alignment
        return metadata, [replace(row, start=data + row.start) for row in rows]

    def tensor(self) -> TensorRow:
        name = self.string()
        dimensions = self.number("I")
        if dimensions > 4:  # GGML_MAX_DIMS
            raise self.damaged()
        shape = tuple(self.number("Q") for _ in range(dimensions))
        kind = self.number("I")
        return TensorRow(name, shape[::-1], kind, self.number("Q"))

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.array(self.number("I"), self.count())
        if kind not in NUMBERS:
            raise self.damaged()
        number = self.number(NUMBERS[kind])
        return bool(number) if kind == BOOL else number

    def array(self, kind: int, count: int) -> Listed:
        if kind == ARRAY:  # llama.cpp does not read nested lists either
            raise self.damaged()
        first = tuple(self.value(kind) for _ in range(min(count, SHOWN)))
        rest = count - len(first)
        if kind in NUMBERS:
            self.stream.seek(rest * struct.calcsize(NUMBERS[kind]), os.SEEK_CUR)
        else:
            for _ in range(rest):
                self.value(kind)
        return Listed(first, count)

    def string(self) -> str:
        return self.take(self.count()).decode("utf-8", "replace")

    def count(self) -> int:
        """A count of items of at least a byte each: checked against the file's size."""
        count = int(self.number("Q"))
        if count > min(self.size, LARGEST) or self.stream.tell() > LARGEST:
            raise self.damaged()
        return count

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def take(self, size: int) -> bytes:
        data = self.stream.read(size)
        if len(data) != size:
            raise self.damaged()
        return data

    def damaged(self) -> ArtifactError:
        return ArtifactError(f"{self.name} is a damaged or truncated GGUF file")
