"""Constants without values: placeholders for the graph, filled one at a time while writing.

coremltools keeps the array of every constant until the end. An array with strides of zero has the
right shape and type and no memory, so the graph is built of those; ``fill`` computes the real
bytes when the writer comes to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.decoder.config import split_name
from compress.grids import Array, Quantized, get_grid
from compress.grids.sparse import SparseGrid
from compress.plan.shapes import Plan, PlanEntry, Weights
from exporters.coreml.planning import SPARSE_NAMES, Part, parts

OPERATIONS = {
    "data": "constexpr_blockwise_shift_scale",
    "indices": "constexpr_lut_to_dense",
    "data_mask": "constexpr_sparse_blockwise_shift_scale",
    "indices_mask": "constexpr_lut_to_sparse",
}
# Weights held at once, of a tensor that has more: the solver's temporaries are several times the
# float32 weight, the codes a quarter of it.
SLABS = 1 << 23
STEP = 256  # rows: all groups of rows divide it, and their codes fill whole bytes

Var = Any  # coremltools has no types


class LazyConstants:
    """The ``Constants`` of ``graph.Decoder``.

    Args:
        mb: coremltools' builder.
        storage: MIL dtype name → the numpy dtype by which coremltools knows it.
        plan: which grid each weight has.
        weights: where to pull from.
    """

    def __init__(
        self, mb: Any, storage: dict[str, np.dtype[Any]], plan: Plan, weights: Weights
    ) -> None:
        self._mb = mb
        self._storage = storage
        self._weights = weights
        self._entries = {entry.name: entry for entry in plan.entries}
        self._vars: dict[str, Var] = {}
        self._fills: dict[str, tuple[Part, Callable[[], Iterable[Array]]]] = {}
        self._sources: dict[str, str] = {}  # constant → weight
        self._held: tuple[str, dict[str, list[Array]]] = ("", {})

    # --- what the graph asks for --------------------------------------------------------------

    def weight(self, name: str) -> Var:
        """A matrix: decompressed by Core ML when it loads, or as it runs."""
        entry = self._entries[self._stored(name)]
        if entry.target_name not in self._vars:
            self._vars[entry.target_name] = self._matrix(entry)
        return self._vars[entry.target_name]

    def vector(self, name: str) -> Var:
        """A norm weight or a bias."""
        entry = self._entries[self._stored(name)]
        (part,) = parts(entry.grid, entry.shape)
        return self._constant(entry.target_name, part, partial(self._read, entry), entry.name)

    def array(self, name: str, shape: tuple[int, ...], make: Callable[[], NDArray[Any]]) -> Var:
        """A float16 constant that the program needs and no checkpoint has."""
        return self._constant(name, Part("val", "fp16", shape), lambda: (make(),))

    def _stored(self, name: str) -> str:
        """Blocks that repeat a stored block (MobileLLM-LS) use its constants."""
        block, role, kind = split_name(name)
        if block is None:
            return name
        repeat = self._weights.config.block_repeat
        return f"blocks.{block - block % repeat}.{role}.{kind}"

    def _matrix(self, entry: PlanEntry) -> Var:
        pieces = parts(entry.grid, entry.shape)
        if len(pieces) == 1:
            return self._constant(
                entry.target_name, pieces[0], partial(self._read, entry), entry.name
            )
        inputs = {
            part.name: self._constant(
                f"{entry.target_name}_{part.name}",
                part,
                partial(self._packed_part, entry, part.name),
                entry.name,
            )
            for part in pieces
        }
        if pieces[0].name in OPERATIONS:
            operation = getattr(self._mb, OPERATIONS[pieces[0].name])
            if not pieces[0].name.endswith("_mask"):
                return operation(**inputs, name=entry.target_name)
            mask, values = operation(**inputs, name=f"{entry.target_name}_sparse")
            inputs = {"mask": mask, "nonzero_data": values}
        return self._mb.constexpr_sparse_to_dense(**inputs, name=entry.target_name)

    def _constant(
        self, name: str, part: Part, make: Callable[[], Iterable[Array]], weight: str = ""
    ) -> Var:
        if name not in self._vars:
            self._vars[name] = self._mb.const(val=self._hollow(part), name=name)
            self._fills[name] = (part, make)
            self._sources[name] = weight
        return self._vars[name]

    def _hollow(self, part: Part) -> NDArray[Any]:
        """An array of the part's shape and type that takes the memory of a row at most."""
        dtype = self._storage[part.dtype]
        if part.name.endswith("mask"):  # coremltools counts its ones
            row = (np.arange(part.shape[1]) < part.ones).astype(dtype)
            return np.lib.stride_tricks.as_strided(row, part.shape, (0, row.itemsize))
        return np.lib.stride_tricks.as_strided(
            np.zeros(1, dtype), part.shape, (0,) * len(part.shape)
        )

    # --- what the writer asks for -------------------------------------------------------------

    def is_lazy(self, name: str) -> bool:
        """Whether the constant of that name is a placeholder."""
        return name in self._fills

    def part(self, name: str) -> Part:
        """Shape and type of a constant."""
        return self._fills[name][0]

    def weight_of(self, name: str) -> str:
        """Our name of the weight that a constant is of; empty for what no checkpoint has."""
        return self._sources[name]

    def fill(self, name: str) -> Iterator[Array]:
        """The values of a constant, some rows at a time, each computed when it is asked for."""
        part, make = self._fills[name]
        for values in make():
            yield np.asarray(values, self._storage[part.dtype])

    def _read(self, entry: PlanEntry) -> Iterator[Array]:
        """A plain constant."""
        for rows in self._slabs(entry):
            yield self._weights.read(entry.name, rows)

    def _packed_part(self, entry: PlanEntry, which: str) -> Iterator[Array]:
        """A part of a compressed matrix. The parts behind it are kept until they are asked for:
        they come next, and all but those of a sparse matrix are small beside the first."""
        name, kept = self._held
        if name == entry.name and which in kept:
            yield from kept.pop(which)
            return
        self._held = ("", {})  # before the next one needs the room
        names = [part.name for part in parts(entry.grid, entry.shape)]
        later: dict[str, list[Array]] = {key: [] for key in names[names.index(which) + 1 :]}
        slabs = self._slabs(entry)
        for piece in self._weights.in_slabs(entry.name, get_grid(entry.grid), slabs, as_stored):
            yield piece[which]
            for key in later:
                later[key].append(piece[key])
        self._held = (entry.name, later)

    def _slabs(self, entry: PlanEntry) -> Sequence[slice | None]:
        """Runs of rows; None for all of them at once, where they share one table."""
        if len(entry.shape) == 1 or entry.grid.endswith("-tensor"):
            return [None]
        return self._weights.slabs(entry.shape, SLABS, STEP)


class HollowConstants(LazyConstants):
    """Constants that stay without values, to know how large a package will be."""

    def fill(self, name: str) -> Iterator[Array]:
        """Zeros without memory."""
        part, _ = self._fills[name]
        yield np.broadcast_to(np.zeros(1, self._storage[part.dtype]), part.shape)


def as_stored(quantized: Quantized) -> dict[str, Array]:
    """The arrays of ``planning.parts``, by name, from a grid's neutral ones."""
    if isinstance(quantized.grid, SparseGrid):
        return sparse_as_stored(quantized, quantized.grid)
    return dense_as_stored(quantized.pack(), quantized.grid.name)


def sparse_as_stored(quantized: Quantized, grid: SparseGrid) -> dict[str, Array]:
    """The mask, and what is there as on the inner grid."""
    packed = quantized.pack()
    mask = packed.pop("mask")
    if grid.inner.name == "F16":
        return {"mask": mask, "nonzero_data": packed["codes"]}
    stored = dense_as_stored(packed, grid.inner.name)
    codes = "indices" if "indices" in stored else "data"
    mask_name, values_name = SPARSE_NAMES[codes]
    return {mask_name: mask, values_name: stored.pop(codes), **stored}


def dense_as_stored(packed: dict[str, Array], grid: str) -> dict[str, Array]:
    """Codes, scales and tables under Core ML's names."""
    codes = packed["codes"]
    if "lut" in packed:
        groups, levels = packed["lut"].shape
        return {"indices": codes, "lut": packed["lut"].reshape(groups, 1, levels, 1)}
    if grid.endswith("-asym"):
        return {"data": codes, "scale": packed["scale"], "offset": packed["zero_point"]}
    # Symmetric codes have their zero at 8 or 128; int4 and int8 have it at 0. uint8 wraps around.
    middle = np.uint8(8 if grid.startswith("int4") else 128)
    return {"data": (codes - middle).view(np.int8), "scale": packed["scale"]}
