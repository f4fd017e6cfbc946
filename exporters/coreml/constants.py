"""Placeholders for the graph's constants, whose arrays are written to ``weight.bin`` afterwards.

coremltools keeps the array of every constant until the end. An array with strides of zero has the
right shape and type and no memory, so the graph is built from those, with the offset of each array
in ``weight.bin`` (``Layout``); ``stored`` then yields the arrays of one tensor, some rows at a
time, and a ``Blob`` writes each at its offset.

The format of ``weight.bin`` is in ``blobs.py``. coremltools has a writer, which needs each array
whole and packs it in memory: half a gigabyte for the head of a large vocabulary. The bytes here are
the same.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import RawIOBase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.decoder.config import DecoderConfig, split_name
from compress.files import write_at
from compress.grids import Array, Quantized, get_grid, pack_bits
from compress.grids.sparse import SparseGrid
from compress.plan.shapes import Plan, PlanEntry
from compress.plan.weights import Weights
from exporters.coreml.blobs import BITS, BLOB_TYPES, RECORD, SENTINEL
from exporters.coreml.planning import ALIGNMENT, SPARSE_NAMES, Part, parts

OPERATIONS = {
    "data": "constexpr_blockwise_shift_scale",
    "indices": "constexpr_lut_to_dense",
    "data_mask": "constexpr_sparse_blockwise_shift_scale",
    "indices_mask": "constexpr_lut_to_sparse",
}
# Most weights of a tensor in memory at once: the solver's temporaries are several times the float32
# weight, the codes a quarter of it.
SLABS = 1 << 23
STEP = 256  # rows: all groups of rows divide it, and their codes fill whole bytes

HEADER = struct.Struct("<II56x")  # number of records, version
VERSION = 2
TYPES = {dtype: number for number, dtype in BLOB_TYPES.items()}

Var = Any  # coremltools has no types


class Constants:
    """Makes the constants of ``graph.Decoder``.

    Args:
        mb: coremltools' builder.
        storage: MIL dtype name → coremltools' numpy dtype for it.
        plan: the grid of each weight.
        config: the model.

    Attributes:
        parts: shape and type of every placeholder, by name.
        entries: the plan's entry of each uncompressed placeholder, by name; computed arrays and
            parts of compressed matrices have none.
    """

    def __init__(
        self, mb: Any, storage: dict[str, np.dtype[Any]], plan: Plan, config: DecoderConfig
    ) -> None:
        self._mb, self._storage, self._ropes = mb, storage, config.ropes
        block_repeat = config.block_repeat
        self._planned = {entry.name: entry for entry in plan.entries}
        for entry in plan.entries if block_repeat > 1 else ():  # MobileLLM-LS: the same constants
            block, role, kind = split_name(entry.name)
            for repeat in range(block_repeat) if block is not None else ():
                number = (block or 0) + repeat
                self._planned[f"blocks.{number}.{role}.{kind}"] = entry
        self._pieces = {entry.name: parts(entry.grid, entry.shape) for entry in plan.entries}
        self._vars: dict[str, Var] = {}
        self.parts: dict[str, Part] = {}
        self.entries: dict[str, PlanEntry] = {}

    def weight(self, name: str) -> Var:
        """A matrix, which Core ML decompresses when it loads or runs the program; a norm's weight
        or a bias, as it is."""
        entry = self._planned[name]
        if entry.target_name in self._vars:
            return self._vars[entry.target_name]
        pieces = self._pieces[entry.name]
        if len(pieces) == 1:
            self.entries[entry.target_name] = entry
            return self._constant(entry.target_name, pieces[0])
        stem = entry.target_name
        inputs = {part.name: self._constant(f"{stem}_{part.name}", part) for part in pieces}
        operation = getattr(self._mb, OPERATIONS.get(pieces[0].name, "constexpr_sparse_to_dense"))
        if pieces[0].name in OPERATIONS and pieces[0].name.endswith("_mask"):
            mask, values = operation(**inputs, name=f"{entry.target_name}_sparse")
            inputs = {"mask": mask, "nonzero_data": values}
            operation = self._mb.constexpr_sparse_to_dense
        self._vars[entry.target_name] = operation(**inputs, name=entry.target_name)
        return self._vars[entry.target_name]

    def array(self, name: str, shape: tuple[int, ...]) -> Var:
        """A float16 constant that is not in the checkpoint: a table of cos or sin (``rope_cos``,
        ``rope_sin``), or zeros."""
        return self._constant(name, Part("val", "fp16", shape))

    def values(self, name: str, weights: Weights | None) -> NDArray[Any]:
        """The array of an uncompressed constant; without ``weights``, zeros for a checkpoint's."""
        part = self.parts[name]
        if name.startswith("rope_"):
            number = int(name.removeprefix("rope_")[4:] or 0)  # after ``cos_`` or ``sin_``
            found = self._ropes[number].cos_sin(part.shape[0])[name.startswith("rope_sin")]
        elif weights is not None and name in self.entries:
            found = weights.read(self.entries[name].name)
        else:
            found = np.zeros(part.shape, np.float32)
        return np.asarray(found, self._storage[part.dtype]).reshape(part.shape)

    def _constant(self, name: str, part: Part) -> Var:
        """A constant whose array has the part's shape and type, with memory for at most a row."""
        if name not in self._vars:
            dtype = self._storage[part.dtype]
            row, strides = np.zeros(1, dtype), (0,) * len(part.shape)
            if part.name.endswith("mask"):  # coremltools counts the ones in it
                row = (np.arange(part.shape[1]) < part.ones).astype(dtype)
                strides = (0, row.itemsize)
            placeholder = np.lib.stride_tricks.as_strided(row, part.shape, strides)
            self._vars[name] = self._mb.const(val=placeholder, name=name)
            self.parts[name] = part
        return self._vars[name]


def stored(entry: PlanEntry, weights: Weights) -> Iterator[dict[str, Array]]:
    """The arrays of an entry by the names of its ``parts``, some rows at a time."""
    slabs: Sequence[slice | None] = [None]  # all rows at once, where they share one table
    if len(entry.shape) == 2 and get_grid(entry.grid).group_rows:
        slabs = weights.slabs(entry.shape, SLABS, STEP)
    if len(parts(entry.grid, entry.shape)) == 1:
        for rows in slabs:
            yield {"val": weights.read(entry.name, rows)}
        return
    yield from weights.in_slabs(entry.name, get_grid(entry.grid), slabs, as_stored)


def as_stored(quantized: Quantized) -> dict[str, Array]:
    """Convert a grid's packed arrays to those of ``planning.parts``, by name."""
    packed, grid = quantized.pack(), quantized.grid
    mask = packed.pop("mask", None)  # of a sparse grid; the others are those of the inner one
    if isinstance(grid, SparseGrid):
        grid = grid.inner
    codes = packed["codes"]
    if grid.name == "F16":
        found = {"val": codes}
    elif "lut" in packed:
        groups, levels = packed["lut"].shape
        found = {"indices": codes, "lut": packed["lut"].reshape(groups, 1, levels, 1)}
    elif not grid.symmetric:
        found = {"data": codes, "scale": packed["scale"], "offset": packed["zero_point"]}
    else:
        # Symmetric codes have zero point 8 or 128; int4 and int8 have 0. uint8 wraps around.
        middle = np.uint8(1 << (grid.bits - 1))
        found = {"data": (codes - middle).view(np.int8), "scale": packed["scale"]}
    if mask is None:
        return found
    name = next(iter(found))
    mask_name, values_name = SPARSE_NAMES[name]
    return {mask_name: mask, values_name: found.pop(name), **found}


# --- weight.bin ---------------------------------------------------------------------------------


@dataclass
class Layout:
    """Offsets of the arrays in ``weight.bin``, in the order they are added.

    Attributes:
        offsets: of each array's record, by name.
        end: bytes so far.
    """

    offsets: dict[str, int] = field(default_factory=dict)
    end: int = ALIGNMENT

    def add(self, name: str, part: Part) -> int:
        """Assign an array its offset, once; returns the offset of its record."""
        if name not in self.offsets:
            self.offsets[name] = -(-self.end // ALIGNMENT) * ALIGNMENT
            self.end = self.offsets[name] + ALIGNMENT + part.nbytes
        return self.offsets[name]


class Blob:
    """Writes one array at its offset, some rows at a time."""

    def __init__(self, stream: RawIOBase, offset: int, part: Part) -> None:
        self._stream, self._part = stream, part
        self._begin, self._taken = offset + ALIGNMENT, 0
        padding = 8 * part.nbytes - math.prod(part.shape) * BITS[part.dtype]
        record = RECORD.pack(SENTINEL, TYPES[part.dtype], part.nbytes, self._begin, padding)
        write_at(stream, offset, record)

    def append(self, values: Array) -> int:
        """Write the next rows, of the part's dtype; returns their bytes."""
        bits = BITS[self._part.dtype]
        assert self._taken * bits % 8 == 0  # slabs start at a whole byte
        packed = pack_bits(values, bits)
        write_at(self._stream, self._begin + self._taken * bits // 8, packed.data)
        self._taken += values.size
        return int(packed.nbytes)

    def close(self) -> int:
        """After the last row; returns the offset of the array's end in the file."""
        assert self._taken == math.prod(self._part.shape), (self._part, self._taken)
        return self._begin + self._part.nbytes
