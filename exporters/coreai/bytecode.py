"""Reads names and places of the large constants in MLIR bytecode, without MLIR.

The format (mlir.llvm.org/docs/BytecodeFormat), as far as it is needed: a magic number, the version
and the producer's name; then sections, each with an id, a length and perhaps an alignment. Strings
have one section, the bytes of all constants another, and their names and lengths a third::

    strings          count, lengths in reverse (with the final zero), characters
    resource offset  count of external groups, groups: owner, count, (name, length, kind) …
    resource         one after the other: alignment, length, padding, bytes

Numbers are *prefix varints*: the zeros below the lowest one bit of the first byte say how many
bytes follow it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compress.errors import ArtifactError

__all__ = ["Blob", "read_blobs"]

MAGIC = b"ML\xefR"
STRINGS, RESOURCES, RESOURCE_OFFSETS = 0, 5, 6
BLOB = 0  # kind of a resource: bytes; others are flags and names


@dataclass(frozen=True)
class Blob:
    """A large constant of a program.

    Attributes:
        name: of the resource.
        raw: its bytes, memory-mapped.
    """

    name: str
    raw: NDArray[np.uint8]


class Reader:
    """A place in some bytes, which moves on as they are read.

    Raises:
        ArtifactError: an end before the last number.
    """

    def __init__(self, data: NDArray[np.uint8], at: int = 0) -> None:
        self.data, self.at = data, at

    def take(self, count: int) -> NDArray[np.uint8]:
        """The next ``count`` bytes."""
        if count < 0 or self.at + count > len(self.data):
            raise ArtifactError("the program ends too early (truncated?)")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self) -> int:
        """The next prefix varint."""
        first = int(self.take(1)[0])
        if first == 0:
            return int.from_bytes(self.take(8).tobytes(), "little")
        more = (first & -first).bit_length() - 1
        whole = bytes([first]) + self.take(more).tobytes()
        return int.from_bytes(whole, "little") >> (more + 1)

    def text(self) -> str:
        """The characters up to the next zero byte."""
        end = self.at
        while end < len(self.data) and self.data[end]:
            end += 1
        found = self.take(end - self.at).tobytes()
        self.take(1)
        return found.decode("utf-8", "replace")


def read_blobs(path: Path) -> list[Blob]:
    """The large constants of a program, in the order of the file.

    Raises:
        ArtifactError: not MLIR bytecode, damaged or truncated.
    """
    if not path.is_file() or path.stat().st_size < len(MAGIC):
        raise ArtifactError(f"there is no program in {path.name}")
    # Copy-on-write: torch and MLIR need writable memory, the file must not change.
    reader = Reader(np.memmap(path, np.uint8, mode="c"))
    if reader.take(len(MAGIC)).tobytes() != MAGIC:
        raise ArtifactError(f"{path.name} is not MLIR bytecode")
    reader.number()  # the version
    reader.text()  # the producer
    sections = dict(read_sections(reader))
    if RESOURCES not in sections:
        return []
    strings = list(read_strings(sections[STRINGS]))
    return list(read_resources(sections[RESOURCE_OFFSETS], sections[RESOURCES], strings))


def read_sections(reader: Reader) -> Iterator[tuple[int, Reader]]:
    """Id and bytes of each section."""
    while reader.at < len(reader.data):
        kind = int(reader.take(1)[0])
        length = reader.number()
        if kind & 0x80:
            alignment = reader.number()
            reader.take(-reader.at % max(alignment, 1))
        yield kind & 0x7F, Reader(reader.take(length))


def read_strings(reader: Reader) -> Iterator[str]:
    """The strings of a program."""
    count = reader.number()
    if count > len(reader.data):
        raise ArtifactError("the program names more strings than it holds")
    lengths = [reader.number() for _ in range(count)]
    for length in reversed(lengths):
        yield reader.take(length).tobytes().rstrip(b"\0").decode("utf-8", "replace")


def read_resources(offsets: Reader, data: Reader, strings: list[str]) -> Iterator[Blob]:
    """The large constants; other resources are passed over."""
    offsets.number()  # external groups, which come first and look like the others
    while offsets.at < len(offsets.data):
        offsets.number()  # whose resources they are
        for _ in range(offsets.number()):
            name, length, kind = offsets.number(), offsets.number(), int(offsets.take(1)[0])
            entry = Reader(data.take(length))
            if kind != BLOB:
                continue
            entry.number()  # alignment
            size = entry.number()
            if size > length - entry.at or name >= len(strings):
                raise ArtifactError("a constant of the program is damaged")
            yield Blob(strings[name], entry.data[length - size :])
