"""Grids: the arithmetic of each number format, and nothing else.

A grid chooses its parameters (``fit``: scales, zero points, tables), converts weights to codes and
back (``encode``, ``decode``), and lays out the bytes of its format (``pack``). It knows neither
files nor calibration. Solvers call grids; exporters write what ``pack`` returns.

Shapes: a weight is float32 ``[rows, columns]`` = ``[out_features, in_features]``; groups and
blocks run along the columns (the input dimension), palettes span groups of rows.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from compress.errors import GridError

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Params = Mapping[str, Array]

__all__ = [
    "Array", "BaseGrid", "BlockedGrid", "Codebook", "CodebookGrid", "Float32", "Grid", "Lattice",
    "LatticeGrid", "Params", "Quantized", "get_grid", "pack_bits", "register_grid",
]  # fmt: skip


@runtime_checkable
class Grid(Protocol):
    """One number format.

    Attributes:
        name: as in recipes: ``Q4_K``, ``int4-g32``, ``lut4-g8``, ``F16``. Only ``get_grid``
            parses it; other code reads the attributes below.
        bits: of a code: 4 for ``Q4_K`` and ``lut4-g8``; of a number for ``F16``, 16.
        group_size: columns that share a scale; 0 where whole rows do, or where there is none.
        group_rows: rows that share parameters: 8 for ``lut4-g8``, 0 where all rows of a tensor do
            (``lut4-tensor``), 1 for the other grids, whose rows are independent.
        symmetric: zero points and minima are not stored. False for palettes.

    Example:
        >>> grid = get_grid("lut4-g8")
        >>> isinstance(grid, Grid), grid.group_rows, grid.nbytes((8, 64))
        (True, 8, 288)
    """

    @property
    def name(self) -> str: ...

    @property
    def bits(self) -> int: ...

    @property
    def group_size(self) -> int: ...

    @property
    def group_rows(self) -> int: ...

    @property
    def symmetric(self) -> bool: ...

    def check(self, shape: tuple[int, int]) -> None:
        """Raise GridError (with the reason and a hint) when ``shape`` does not fit the grid."""
        ...

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Exact bytes of a packed tensor: codes, scales, minima, look-up tables."""
        ...

    def fit(self, weight: Float32, importance: Float32 | None = None) -> Params:
        """Choose scales (zero points, minima, tables) for ``weight``.

        Args:
            weight: float32 ``[rows, columns]``.
            importance: float32 ``[columns]``, non-negative weights of the squared error (mean of
                squares of the input), or None for the grid's best unweighted fit.
        """
        ...

    def encode(self, weight: Float32, params: Params) -> Array:
        """Integer codes, uint8 ``[rows, columns]`` (dense float grids: the values themselves)."""
        ...

    def decode(self, codes: Array, params: Params) -> Float32:
        """Weights as a runtime reconstructs them, float32 ``[rows, columns]``."""
        ...

    def pack(self, codes: Array, params: Params) -> dict[str, Array]:
        """The arrays that are written to the file, in the format's layout."""
        ...

    def quantize(self, weight: Float32, importance: Float32 | None = None) -> Quantized:
        """``fit`` then ``encode``; a grid may fuse the two."""
        ...


class BaseGrid:
    """Default methods of grids; a grid need not inherit from it."""

    @property
    def group_rows(self) -> int:
        """Rows that share parameters: 1, they are independent."""
        return 1

    def check(self, shape: tuple[int, int]) -> None:
        """Accept every shape."""

    def quantize(self: Grid, weight: Float32, importance: Float32 | None = None) -> Quantized:
        """``fit``, then ``encode``."""
        params = self.fit(weight, importance)
        shape = (weight.shape[0], weight.shape[1])
        return Quantized(self.encode(weight, params), params, self, shape)


class BlockedGrid(BaseGrid):
    """A GGUF type: each row is cut into blocks of equal bytes, with parameters of their own.

    Attributes:
        name: ggml's name.
        block: columns of a block, 32 or 256.
        block_bytes: of a packed block.
    """

    name: str
    block: int
    block_bytes: int
    group_rows = 1  # rows are independent

    @property
    def span(self) -> int:
        """See ``LatticeGrid``: each block is fitted independently."""
        return self.block

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise GridError when the rows are not whole blocks."""
        if len(shape) != 2 or shape[1] % self.block or shape[1] == 0:
            raise GridError(
                f"{self.name}: rows of {shape[-1]} columns are not whole blocks of {self.block}",
                hint="Q8_0, Q5_0, Q4_0, IQ4_NL, MXFP4 need a multiple of 32; F16 takes any length",
            )

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the packed blocks."""
        self.check(shape)
        return shape[0] * (shape[1] // self.block) * self.block_bytes


@dataclass(frozen=True)
class Lattice:
    """The values that each weight may take once the parameters are fixed.

    ``w = scale * levels[code] - offset``, where the columns are cut into as many equal runs as
    ``scale`` has columns, and the rows into as many as an array has rows.

    Attributes:
        scale: float32 ``[rows or 1, runs]``, of either sign; 0 where all weights are ``-offset``.
        offset: float32, the shape of ``scale``.
        levels: float32 ``[groups of rows, codes]``, ascending.
        even: the levels are 1 apart, so that the nearest is found by rounding.
    """

    scale: Float32
    offset: Float32
    levels: Float32
    even: bool


@runtime_checkable
class LatticeGrid(Grid, Protocol):
    """A grid whose columns can be rounded one at a time, after its parameters are chosen.

    Attributes:
        span: columns that can be fitted independently: ``fit`` of those columns alone gives their
            part of the parameters (joined along the columns). 0 where parameters belong to whole
            rows.
    """

    @property
    def span(self) -> int: ...

    def lattice(self, params: Params) -> Lattice:
        """The values that ``decode`` computes, bit for bit, for solvers that round by column."""
        ...


@dataclass(frozen=True)
class Codebook:
    """The joint values of four adjacent columns once the parameters are fixed.

    ``w = ± scale * levels[code & 7]``, minus where ``code & 8``; the columns are cut into as many
    equal runs as ``scale`` has columns. The four levels are a word of the codebook: the last two of
    those whose first two are ``a = code_0 + 8 code_1`` are ``code_2 + 8 code_3``, one of
    ``partners[starts[a] : starts[a + 1]]``.

    Attributes:
        scale: float32 ``[rows, runs]``, not negative.
        levels: float32 ``[8]``, positive, ascending.
        starts: int64 ``[65]``.
        partners: int64, the same number more than once perhaps.
        even: of eight adjacent columns, an even number is negative.
    """

    scale: Float32
    levels: Float32
    starts: Array
    partners: Array
    even: bool


@runtime_checkable
class CodebookGrid(Grid, Protocol):
    """A grid whose columns are rounded 4 or 8 at a time, after its parameters are chosen.

    Attributes:
        span: see ``LatticeGrid``.
        together: adjacent columns that are rounded together: 4, or 8 where those share the parity
            of their signs.
    """

    @property
    def span(self) -> int: ...

    @property
    def together(self) -> int: ...

    def codebook(self, params: Params) -> Codebook:
        """The values that ``decode`` computes, bit for bit."""
        ...


@dataclass(frozen=True)
class Quantized:
    """A tensor after quantization: what a solver returns and an exporter packs.

    Attributes:
        codes: as ``grid.encode`` returns them: uint8 ``[rows, columns]``, dense grids the values.
        params: as ``grid.fit`` returns them.
        grid: of codes and parameters.
        shape: ``(rows, columns)`` of the weight.
        fallen: rows for which the solver fell back on a simpler one.

    Example:
        >>> grid = get_grid("int8-channel")
        >>> weight = np.eye(2, 32, dtype=np.float32)
        >>> params = grid.fit(weight)
        >>> quantized = Quantized(grid.encode(weight, params), params, grid, (2, 32))
        >>> quantized.decode()[:, :2].round(2).tolist()
        [[1.0, -0.0], [-0.0, 1.0]]
    """

    codes: Array
    params: Params
    grid: Grid
    shape: tuple[int, int]
    fallen: int = 0

    @property
    def bits_per_weight(self) -> float:
        """Bits that the packed tensor takes for each of its weights, scales and tables included."""
        return self.grid.nbytes(self.shape) * 8 / (self.shape[0] * self.shape[1])

    def decode(self) -> Float32:
        """The weights as a runtime reconstructs them, float32 ``[rows, columns]``."""
        return self.grid.decode(self.codes, self.params)

    def rows(self, rows: slice) -> Quantized:
        """Some of the rows: whole groups of them where rows share parameters."""
        start, stop, _ = rows.indices(self.shape[0])

        def part(values: Array) -> Array:
            count = len(values)  # of rows, or of groups of rows
            return values[start * count // self.shape[0] : stop * count // self.shape[0]]

        params = {name: part(values) for name, values in self.params.items()}
        return Quantized(part(self.codes), params, self.grid, (stop - start, self.shape[1]))

    def pack(self) -> dict[str, Array]:
        """The arrays that the file holds."""
        return self.grid.pack(self.codes, self.params)


def pack_bits(values: Array, bits: int) -> Array:
    """Pack numbers to bytes: sub-byte integers (one per byte here) without gaps, low bits first.

    An incomplete last byte is padded with zeros.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    raw = flat.view(np.uint8)
    if bits >= 8:
        return raw
    if bits == 4 and raw.size % 2 == 0:
        from compress.grids.lanes import join_pairs  # compiles: imported only when needed

        return join_pairs(raw)
    fields = np.unpackbits(raw[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(fields.reshape(-1), bitorder="little")


# Rows of the table of grids: a pattern that the whole name matches → the function ``make(name)``
# that returns the Grid, or the name of a module that has one. Modules are loaded at first use:
# numba takes a second to import. The first pattern that matches counts.
GRIDS: dict[str, str | Callable[[str], Grid]] = {
    r"(?:F32|F16|BF16)": "compress.grids.dense",
    r"(?:Q\d_[01K]|IQ4_NL|IQ4_XS)": "compress.grids.kquant",
    r"IQ3_(?:S|XXS)": "compress.grids.codebook",
    r"MXFP4|mxfp4": "compress.grids.mxfp4",
    r"int[248]-(?:g\d+|channel)(?:-asym)?": "compress.grids.affine",
    r"affine[234568]-g(?:32|64|128)(?:-bf16)?": "compress.grids.biased",
    r"lut[123468]-(?:g\d+|tensor)": "compress.grids.palette",
    r"(?:\d+of\d+|s\d+)-(?:int[48]-.+|lut\d-.+|F16)": "compress.grids.sparse",
}


def register_grid(pattern: str, make: str | Callable[[str], Grid]) -> None:
    """Add a row to the table of grids: ``get_grid`` finds names of the pattern from now on.

    That makes the grid known to ``quantize``; which grids a format's files can hold is up to the
    format.

    Args:
        pattern: regular expression that a whole name matches; grids that are there already keep
            their names. The same pattern again replaces its row.
        make: ``make(name) -> Grid``, raising GridError for a name that it does not know, or the
            name of a module that has such a function.

    Example:
        >>> register_grid("half", lambda name: get_grid("F16"))
        >>> get_grid("half").nbytes((64, 256))
        32768
    """
    GRIDS[pattern] = make


def get_grid(name: str) -> Grid:
    """The grid of that name.

    Args:
        name: ``Q4_K``, ``int4-g32``, ``int8-g128-asym``, ``lut4-g8``, ``2of4-lut4-g8``, ``F16`` …

    Raises:
        GridError: no grid has that name.

    Example:
        >>> grid = get_grid("int4-g32-asym")
        >>> grid.bits, grid.group_size, grid.symmetric
        (4, 32, False)
        >>> grid.nbytes((64, 256))  # 4 bits a weight; a scale and half a byte of zero point a group
        9472
    """
    for pattern, make in list(GRIDS.items()):
        if re.fullmatch(pattern, name):
            if isinstance(make, str):
                make = importlib.import_module(make).make
            grid: Grid = make(name)
            return grid
    raise GridError(
        f"there is no grid {name!r}",
        hint="Q4_K, Q8_0 …, int4-g32, int8-g128-asym, lut4-g8, F16",
    )
