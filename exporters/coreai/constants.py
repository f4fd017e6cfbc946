"""The writer's file of packed arrays, and the constants of the graph, which reference its pages.

The program is one file with the weights inside, made in one go after the last tensor. Until then
the arrays are in a file of their own, each at its offset, written some rows at a time; the
program's constants are views of that file, so that memory holds none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import RawIOBase

import numpy as np
from numpy.typing import NDArray

from compress.decoder.config import DecoderConfig, split_name
from compress.files import write_at
from compress.grids import Array, Quantized, get_grid, pack_bits
from compress.grids.sparse import SparseGrid
from compress.plan.shapes import Plan, PlanEntry
from compress.plan.weights import Weights
from exporters.coreai.library import CoreAI, Value
from exporters.coreai.planning import ALIGNMENT, FLOATS, Part, parts

# Most weights of a tensor in memory at once: the solver's temporaries are several times the float32
# weight, the codes a quarter of it.
SLABS = 1 << 23
FLOATING = ("", "values", "scale", "lut")  # parts of float16, or wider
STEP = 256  # rows: all groups of rows divide it, and their codes fill whole bytes


@dataclass(frozen=True)
class Piece:
    """One array of the file.

    Attributes:
        name: of the constant in the program.
        part: shape and type.
        offset: in the file.
    """

    name: str
    part: Part
    offset: int


def layout(entries: Iterable[PlanEntry]) -> dict[str, dict[str, Piece]]:
    """The arrays of every entry, by target name and name of the part."""
    found: dict[str, dict[str, Piece]] = {}
    end = 0
    for entry in entries:
        pieces = {}
        for part in parts(entry.grid, entry.shape):
            offset = -(-end // ALIGNMENT) * ALIGNMENT
            pieces[part.name] = Piece(part.array_name(entry.target_name), part, offset)
            end = offset + part.nbytes
        found[entry.target_name] = pieces
    return found


def write_entry(
    stream: RawIOBase, entry: PlanEntry, pieces: dict[str, Piece], weights: Weights
) -> Iterator[int]:
    """Write the arrays of an entry at their offsets, some rows at a time; yields their bytes."""
    places = {name: piece.offset for name, piece in pieces.items()}
    for arrays in slabs_of(entry, weights):
        for name, values in arrays.items():
            if name in FLOATING:
                bits = 8 * values.itemsize
            else:
                bits = 1 if name == "mask" else get_grid(entry.grid).bits
            packed = pack_bits(values, bits)
            write_at(stream, places[name], packed.data)
            places[name] += packed.nbytes
            yield packed.nbytes
    for name, piece in pieces.items():
        assert places[name] == piece.offset + piece.part.nbytes, (entry.name, name)


def slabs_of(entry: PlanEntry, weights: Weights) -> Iterator[dict[str, Array]]:
    """The arrays of an entry by the names of its ``parts``, some rows at a time."""
    if entry.name.startswith("rope."):
        number = int(entry.name.partition("_")[2] or 0)
        tables = weights.config.ropes[number].cos_sin(entry.shape[0])
        yield {"": tables[entry.name.startswith("rope.sin")].astype(np.float16)}
        return
    slabs: Sequence[slice | None] = [None]  # all rows at once, where they share one table
    if len(entry.shape) == 2 and get_grid(entry.grid).group_rows:
        slabs = weights.slabs(entry.shape, SLABS, STEP)
    if entry.grid not in FLOATS:
        yield from weights.in_slabs(entry.name, get_grid(entry.grid), slabs, as_stored)
        return
    for rows in slabs:
        yield {"": get_grid(entry.grid).encode(weights.read(entry.name, rows), {})}


def as_stored(quantized: Quantized) -> dict[str, Array]:
    """Convert a grid's packed arrays to those of ``planning.parts``, by name."""
    packed, grid = quantized.pack(), quantized.grid
    if isinstance(grid, SparseGrid):
        grid = grid.inner
    if grid.name == "F16":  # of a sparse one
        packed["values"] = packed.pop("codes")
        return packed
    if not grid.symmetric:  # palettes, too
        return packed
    # Symmetric codes have zero point 8 or 128; Core AI's are signed and have 0. uint8 wraps around.
    middle = np.uint8(1 << (grid.bits - 1))
    del packed["zero_point"]
    return {**packed, "codes": packed["codes"] - middle}


class Constants:
    """Makes the constants of ``graph.Decoder``; the same name gives the same one.

    Args:
        library: coreai-core, with a program under construction.
        plan: the grid of each weight.
        config: the model.
        data: the file of packed arrays, uint8; must stay until the program is saved.
    """

    def __init__(
        self, library: CoreAI, plan: Plan, config: DecoderConfig, data: NDArray[np.uint8]
    ) -> None:
        self._library, self._data = library, data
        self._pieces = layout(plan.entries)
        self._entries = {entry.name: entry for entry in plan.entries}
        for entry in plan.entries if config.block_repeat > 1 else ():  # the same constants
            block, role, kind = split_name(entry.name)
            for repeat in range(config.block_repeat) if block is not None else ():
                self._entries[f"blocks.{(block or 0) + repeat}.{role}.{kind}"] = entry
        self._values: dict[str, Value] = {}

    def __call__(self, name: str) -> Value:
        """A weight, bias or table by packlight's name, decoded: float16, norms float32."""
        entry = self._entries[name]
        if entry.target_name not in self._values:
            self._values[entry.target_name] = self._decoded(entry)
        return self._values[entry.target_name]

    def _decoded(self, entry: PlanEntry) -> Value:
        ops, pieces = self._library.ops, self._pieces[entry.target_name]
        values = {name: self._stored(piece) for name, piece in pieces.items()}
        if "" in values:
            return values[""]
        if "mask" in values:
            name = "codes" if "codes" in values else "values"
            there = ops.build_sparse_with_bitmask(values[name], values["mask"])
            if "lut" in values:  # which has no entry for zero
                axis = ops.constant(np.array(0, np.int16))
                there = ops.lut_to_sparse_with_bitmask(there, values["lut"], axis)
            values["codes"] = ops.sparse_with_bitmask_to_dense(there)
            if "scale" not in values:
                return values["codes"]
        if "lut" in values:
            return ops.lut_to_dense(values["codes"], values["lut"], np.array(0, np.int16))
        codes, scales = pieces["codes"].part, pieces["scale"].part
        zero_point = values.get("zero_point")
        if zero_point is None:
            zero_point = self._library.zeros(codes.dtype, scales.shape)
        zeros = self._library.zeros("fp16", scales.shape)  # added after scaling
        return ops.blockwise_shift_scale(values["codes"], values["scale"], zero_point, zeros)

    def _stored(self, piece: Piece) -> Value:
        part = piece.part
        data = self._data[piece.offset : piece.offset + part.nbytes]
        return self._library.stored(piece.name, part.dtype, part.shape, data, ALIGNMENT)


def file_bytes_of(entries: Iterable[PlanEntry]) -> int:
    """Bytes of the file of packed arrays."""
    pieces = [piece for found in layout(entries).values() for piece in found.values()]
    return max(piece.offset + piece.part.nbytes for piece in pieces)
