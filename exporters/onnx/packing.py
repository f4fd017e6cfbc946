"""Layout of a planned tensor in the external data file.

A tensor on an integer grid becomes two or three arrays as ``com.microsoft::MatMulNBits`` reads
them (onnxruntime ``docs/ContribOperators.md``), with codes packed along the row, the low bits
first; the embedding's, too, which a tied head shares:

    .codes        uint8    [rows, groups, group_size * bits / 8]
    .scales       float16  [rows, groups]
    .zero_points  uint8    [rows, ceil(groups * bits / 8)], asymmetric grids only

Those of experts have one more dimension in front, and no dimension for groups in the codes, as
``com.microsoft::QMoE`` reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from compress.grids import Array, Quantized, get_grid
from compress.grids.affine import Affine
from compress.plan.shapes import PlanEntry

FLOATS = {"F32": "<f4", "F16": "<f2"}
# Offsets are multiples of a cache line, so that mapped arrays are aligned.
ALIGNMENT = 64


@dataclass(frozen=True)
class Piece:
    """One array of the data file.

    Attributes:
        name: of the initializer.
        dtype: numpy spelling: ``<f4``, ``<f2``, ``|u1``.
        offset, nbytes: in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def affine(grid: str) -> Affine:
    """The integer grid of that name."""
    found = get_grid(grid)
    assert isinstance(found, Affine)
    return found


def layout(entries: Iterable[PlanEntry]) -> dict[str, Piece]:
    """Dtype and offset of every array of the plan, by initializer name, in file order."""
    pieces: dict[str, Piece] = {}
    end = 0
    for entry in entries:
        for name, dtype, shape in _arrays(entry):
            offset = -(-end // ALIGNMENT) * ALIGNMENT
            nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            pieces[name] = Piece(name, dtype, shape, offset, nbytes)
            end = offset + nbytes
    return pieces


def _arrays(entry: PlanEntry) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    name = entry.target_name
    if entry.grid in FLOATS:
        yield name, FLOATS[entry.grid], entry.shape
        return
    grid = affine(entry.grid)
    *many, columns = entry.shape
    groups = grid.groups((many[-1], columns))
    packed: tuple[int, ...] = (groups, columns // groups * grid.bits // 8)
    if len(many) > 1:  # experts, as QMoE reads them
        packed = (columns * grid.bits // 8,)
    yield f"{name}.codes", "|u1", (*many, *packed)
    yield f"{name}.scales", "<f2", (*many, groups)
    if not grid.symmetric:
        yield f"{name}.zero_points", "|u1", (*many, -(-groups * grid.bits // 8))


def pack(quantized: Quantized) -> dict[str, Array]:
    """The arrays of some rows: ``codes``, ``scales`` and, asymmetric, ``zero_points``."""
    grid = quantized.grid
    assert isinstance(grid, Affine)
    arrays = quantized.pack()
    packed = {
        "codes": pack_rows(arrays["codes"], grid.bits),
        "scales": arrays["scale"].astype("<f2", copy=False),
    }
    if not grid.symmetric:
        packed["zero_points"] = pack_rows(arrays["zero_point"], grid.bits)
    return packed


def pack_rows(codes: Array, bits: int) -> Array:
    """uint8 codes ``[rows, n]`` → ``[rows, ceil(n * bits / 8)]``, the first code lowest.

    An incomplete last byte is padded with zeros.
    """
    from compress.grids.lanes import join_pairs  # compiles: imported only when needed

    if bits == 8:
        return codes
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return join_pairs(codes)
