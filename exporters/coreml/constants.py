"""Constants without values: placeholders for the graph, whose arrays are written afterwards.

coremltools keeps the array of every constant until the end. An array with strides of zero has the
right shape and type and no memory, so the graph is built of those, with the place in ``weight.bin``
each array will be; ``stored`` then has the arrays of one tensor, some rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.decoder.config import split_name
from compress.grids import Array, Grid, Quantized, get_grid
from compress.grids.sparse import SparseGrid
from compress.plan.shapes import Plan, PlanEntry
from compress.plan.weights import Weights
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


class Constants:
    """The constants of ``graph.Decoder``.

    Args:
        mb: coremltools' builder.
        storage: MIL dtype name → the numpy dtype by which coremltools knows it.
        plan: which grid each weight has.
        block_repeat: times that each stored block runs.

    Attributes:
        parts: shape and type of every placeholder, by name.
        entries: the entry that a placeholder holds the whole of, by its name; none for computed
            arrays and for parts of compressed matrices.
        computed: what makes the arrays that no checkpoint has, by name.
    """

    def __init__(
        self, mb: Any, storage: dict[str, np.dtype[Any]], plan: Plan, block_repeat: int
    ) -> None:
        self._mb, self._storage = mb, storage
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
        self.computed: dict[str, Callable[[], NDArray[Any]]] = {}

    def weight(self, name: str) -> Var:
        """A matrix: decompressed by Core ML when it loads, or as it runs."""
        entry = self._planned[name]
        if entry.target_name in self._vars:
            return self._vars[entry.target_name]
        pieces = self._pieces[entry.name]
        if len(pieces) == 1:
            self.entries[entry.target_name] = entry
            return self._constant(entry.target_name, pieces[0])
        inputs = {part.name: self._constant(constant_name(entry, part), part) for part in pieces}
        operation = getattr(self._mb, OPERATIONS.get(pieces[0].name, "constexpr_sparse_to_dense"))
        if pieces[0].name in OPERATIONS and pieces[0].name.endswith("_mask"):
            mask, values = operation(**inputs, name=f"{entry.target_name}_sparse")
            inputs = {"mask": mask, "nonzero_data": values}
            operation = self._mb.constexpr_sparse_to_dense
        self._vars[entry.target_name] = operation(**inputs, name=entry.target_name)
        return self._vars[entry.target_name]

    def vector(self, name: str) -> Var:
        """A norm weight or a bias."""
        entry = self._planned[name]
        (part,) = self._pieces[entry.name]
        self.entries[entry.target_name] = entry
        return self._constant(entry.target_name, part)

    def array(self, name: str, shape: tuple[int, ...], make: Callable[[], NDArray[Any]]) -> Var:
        """A float16 constant that the program needs and no checkpoint has."""
        self.computed[name] = make
        return self._constant(name, Part("val", "fp16", shape))

    def values(self, name: str, weights: Weights | None) -> NDArray[Any]:
        """A small constant, which stands in the graph itself; zeros without ``weights``."""
        part = self.parts[name]
        if name in self.computed:
            found = self.computed[name]()
        elif weights is not None:
            found = weights.read(self.entries[name].name)
        else:
            found = np.zeros(part.shape, np.float32)
        return np.asarray(found, self._storage[part.dtype]).reshape(part.shape)

    def _constant(self, name: str, part: Part) -> Var:
        """A constant whose array has the part's shape and type, and the memory of a row at most."""
        if name not in self._vars:
            dtype = self._storage[part.dtype]
            row, strides = np.zeros(1, dtype), (0,) * len(part.shape)
            if part.name.endswith("mask"):  # coremltools counts its ones
                row = (np.arange(part.shape[1]) < part.ones).astype(dtype)
                strides = (0, row.itemsize)
            placeholder = np.lib.stride_tricks.as_strided(row, part.shape, strides)
            self._vars[name] = self._mb.const(val=placeholder, name=name)
            self.parts[name] = part
        return self._vars[name]


def constant_name(entry: PlanEntry, part: Part) -> str:
    """The constant that holds one array of an entry."""
    return entry.target_name if part.name == "val" else f"{entry.target_name}_{part.name}"


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
    """The arrays of ``planning.parts``, by name, from a grid's neutral ones."""
    if isinstance(quantized.grid, SparseGrid):
        return sparse_as_stored(quantized, quantized.grid)
    return dense_as_stored(quantized.pack(), quantized.grid)


def sparse_as_stored(quantized: Quantized, grid: SparseGrid) -> dict[str, Array]:
    """The mask, and what is there as on the inner grid."""
    packed = quantized.pack()
    mask = packed.pop("mask")
    if grid.inner.name == "F16":
        return {"mask": mask, "nonzero_data": packed["codes"]}
    stored = dense_as_stored(packed, grid.inner)
    codes = "indices" if "indices" in stored else "data"
    mask_name, values_name = SPARSE_NAMES[codes]
    return {mask_name: mask, values_name: stored.pop(codes), **stored}


def dense_as_stored(packed: dict[str, Array], grid: Grid) -> dict[str, Array]:
    """Codes, scales and tables under Core ML's names."""
    codes = packed["codes"]
    if "lut" in packed:
        groups, levels = packed["lut"].shape
        return {"indices": codes, "lut": packed["lut"].reshape(groups, 1, levels, 1)}
    if not grid.symmetric:
        return {"data": codes, "scale": packed["scale"], "offset": packed["zero_point"]}
    # Symmetric codes have their zero at 8 or 128; int4 and int8 have it at 0. uint8 wraps around.
    middle = np.uint8(1 << (grid.bits - 1))
    return {"data": (codes - middle).view(np.int8), "scale": packed["scale"]}
