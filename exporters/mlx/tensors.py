"""The arrays of a tensor, and their places in the folder's safetensors files.

A quantized matrix is three arrays, as ``mx.quantized_matmul`` reads them:

    NAME.weight   U32          [rows, columns * bits / 32]
    NAME.scales   F16 or BF16  [rows, columns / group_size]
    NAME.biases   F16 or BF16  the same shape

or two in the mode mxfp4, whose scales are bytes, ``U8``.
Files: https://huggingface.co/docs/safetensors; of at most ``SHARD`` bytes, as mlx-lm's are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.checkpoint.safetensors import MAX_HEADER, header_rows
from compress.errors import ArtifactError
from compress.grids import Array, get_grid
from compress.grids.biased import Biased
from compress.plan.shapes import PlanEntry

__all__ = ["Piece", "Shard", "arrays", "layout", "read_headers"]

SHARD = 5 << 30  # bytes of a file, except where one tensor is larger
NUMPY = {"U32": "<u4", "U8": "|u1", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
PARTS = ("weight", "scales", "biases")


@dataclass(frozen=True)
class Piece:
    """One array of a safetensors file.

    Attributes:
        dtype: as the header names it: ``U32``, ``F16``, ``BF16``, ``F32``.
        file: its name in the folder.
        offset, nbytes: in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    def read(self, folder: Path, rows: slice = slice(None)) -> Array:
        """The array, or some of its rows; bfloat16 as uint16.

        Raises:
            ArtifactError: the file is truncated.
        """
        start, stop, _ = rows.indices(self.shape[0])
        row = self.nbytes // self.shape[0]
        values = np.empty((stop - start, *self.shape[1:]), NUMPY[self.dtype])
        with (folder / self.file).open("rb", buffering=0) as stream:
            stream.seek(self.offset + start * row)
            if stream.readinto(values.reshape(-1).view(np.uint8).data) != values.nbytes:
                raise ArtifactError(f"{self.file} is truncated inside {self.name}")
        return values


@dataclass(frozen=True)
class Shard:
    """One safetensors file before it is written.

    Attributes:
        name: of the file.
        header: its first bytes, with the places of all arrays.
        nbytes: of the whole file.
    """

    name: str
    header: bytes
    nbytes: int


def arrays(entry: PlanEntry) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of each array of a planned tensor, in the order of the file."""
    if entry.grid in NUMPY:
        yield entry.target_name, entry.grid, entry.shape
        return
    grid, (rows, columns) = get_grid(entry.grid), entry.shape
    stem = entry.target_name.removesuffix(".weight")
    yield f"{stem}.weight", "U32", (rows, columns * grid.bits // 32)
    kind = "U8"
    if isinstance(grid, Biased):
        kind = "BF16" if grid.bfloat16 else "F16"
    for part in PARTS[1:] if isinstance(grid, Biased) else PARTS[1:2]:
        yield f"{stem}.{part}", kind, (rows, columns // grid.group_size)


def layout(
    entries: Iterable[PlanEntry], metadata: Mapping[str, str], most: int = SHARD
) -> tuple[list[Shard], dict[str, Piece]]:
    """The files of a plan, and the place of every array by its name.

    Args:
        metadata: of every header.
        most: bytes of a file's arrays.
    """
    groups: list[list[PlanEntry]] = []
    size = 0
    for entry in entries:
        if not groups or size + entry.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    shards: list[Shard] = []
    pieces: dict[str, Piece] = {}
    for number, group in enumerate(groups, start=1):
        name = "model.safetensors"
        if len(groups) > 1:
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        table: dict[str, object] = {"__metadata__": dict(metadata)}
        rows = [row for entry in group for row in arrays(entry)]
        end = 0
        places = []
        for array, dtype, shape in rows:
            begin, end = end, end + math.prod(shape) * np.dtype(NUMPY[dtype]).itemsize
            table[array] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
            places.append((begin, end))
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        for (array, dtype, shape), (begin, last) in zip(rows, places, strict=True):
            pieces[array] = Piece(array, dtype, shape, name, len(header) + begin, last - begin)
        shards.append(Shard(name, header, len(header) + end))
    return shards, pieces


def read_headers(folder: Path) -> tuple[dict[str, Piece], dict[str, str]]:
    """The arrays of a folder's ``model*.safetensors`` by name, and the first file's metadata.

    Raises:
        ArtifactError: no such file, or one that is truncated or damaged.
    """
    pieces: dict[str, Piece] = {}
    metadata: dict[str, str] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise ArtifactError(f"{file.name} is not a safetensors file, or is truncated")
            header = stream.read(length)
        for name, dtype, shape, begin, end in header_rows(file, header):
            if dtype not in NUMPY:
                raise ArtifactError(f"{file.name}: {name[:80]} has the dtype {dtype[:20]}")
            nbytes = math.prod(shape) * np.dtype(NUMPY[dtype]).itemsize
            if min(shape, default=0) < 1 or begin < 0 or end - begin != nbytes:
                raise ArtifactError(f"{file.name}: {name[:80]} has a wrong byte range")
            if 8 + length + end > size:
                raise ArtifactError(
                    f"{file.name} is truncated: {name[:80]} ends at byte {8 + length + end}, "
                    f"the file has {size}"
                )
            pieces[name] = Piece(name, dtype, shape, file.name, 8 + length + begin, nbytes)
        stated = json.loads(header).get("__metadata__")
        if isinstance(stated, dict) and not metadata:
            metadata = {str(key): str(value) for key, value in stated.items()}
    if not pieces:
        raise ArtifactError(f"no model*.safetensors in {folder.name}")
    return pieces, metadata
