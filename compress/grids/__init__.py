"""Grids: the arithmetic of each number format, and nothing else.

A grid knows how to choose its parameters (``fit``), how to turn weights into codes and back
(``encode``, ``decode``), and how the bytes of its format look (``pack``). It knows neither files
nor calibration. Solvers drive grids; exporters write what ``pack`` returns.

Shapes: a weight is float32 ``[rows, columns]`` = ``[out_features, in_features]``; groups and
blocks run along the columns (the input dimension), palettes span groups of rows.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from compress.errors import GridError

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Params = Mapping[str, Array]

__all__ = [
    "Array", "Codebook", "CodebookGrid", "Float32", "Grid", "Lattice", "LatticeGrid", "Params",
    "Quantized", "get_grid",
]  # fmt: skip


@runtime_checkable
class Grid(Protocol):
    """One number format.

    Attributes:
        name: as its users spell it: ``Q4_K``, ``int4-g32``, ``lut4-g8``, ``F16``.
    """

    @property
    def name(self) -> str: ...

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
        """The arrays that are written to the file, as the format wants them."""
        ...

    def quantize(self, weight: Float32, importance: Float32 | None = None) -> Quantized:
        """``fit`` then ``encode``; a grid may fuse the two."""
        ...


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
    """A grid whose columns can be rounded one at a time, on parameters fixed before.

    Attributes:
        span: columns that one fit belongs to: ``fit`` of those columns alone gives their share of
            the parameters (joined along the columns). 0 where parameters belong to whole rows.
    """

    @property
    def span(self) -> int: ...

    def lattice(self, params: Params) -> Lattice:
        """What ``decode`` computes, up to the last bit, for a solver that needs it by column."""
        ...


@dataclass(frozen=True)
class Codebook:
    """The values that four columns beside each other may take together, parameters being fixed.

    ``w = ± scale * levels[code & 7]``, minus where ``code & 8``; the columns are cut into as many
    equal runs as ``scale`` has columns. The four levels are a word of the codebook: the last two of
    those whose first two are ``a = code_0 + 8 code_1`` are ``code_2 + 8 code_3``, one of
    ``partners[starts[a] : starts[a + 1]]``.

    Attributes:
        scale: float32 ``[rows, runs]``, not negative.
        levels: float32 ``[8]``, positive, ascending.
        starts: int64 ``[65]``.
        partners: int64, the same number more than once perhaps.
        even: of eight columns beside each other, an even number is negative.
    """

    scale: Float32
    levels: Float32
    starts: Array
    partners: Array
    even: bool


@runtime_checkable
class CodebookGrid(Grid, Protocol):
    """A grid whose columns can be rounded some at a time, on parameters fixed before.

    Attributes:
        span: see ``LatticeGrid``.
        together: columns beside each other that are rounded together: 4, or 8 where those share
            the parity of their signs.
    """

    @property
    def span(self) -> int: ...

    @property
    def together(self) -> int: ...

    def codebook(self, params: Params) -> Codebook:
        """What ``decode`` computes, up to the last bit."""
        ...


@dataclass(frozen=True)
class Quantized:
    """A tensor after quantization: what a solver returns and an exporter packs.

    Attributes:
        fallen: rows for which the solver fell back on a simpler one.
    """

    codes: Array
    params: Params
    grid: Grid
    shape: tuple[int, int]
    fallen: int = 0

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


# Which module makes the grids whose names match; the module's `make(name)` returns the Grid.
# Modules are loaded when first asked for: numba takes a second to import.
GRIDS: dict[str, str] = {
    r"(?:F32|F16|BF16)": "compress.grids.dense",
    r"(?:Q\d_[01K]|IQ4_NL|IQ4_XS)": "compress.grids.kquant",
    r"IQ3_(?:S|XXS)": "compress.grids.codebook",
    r"MXFP4": "compress.grids.mxfp4",
    r"int[48]-(?:g\d+|channel)(?:-asym)?": "compress.grids.affine",
    r"lut[123468]-(?:g\d+|tensor)": "compress.grids.palette",
    r"(?:\d+of\d+|s\d+)-(?:int[48]-.+|lut\d-.+|F16)": "compress.grids.sparse",
}


def get_grid(name: str) -> Grid:
    """The grid of that name.

    Raises:
        GridError: no grid has that name.
    """
    for pattern, module in GRIDS.items():
        if re.fullmatch(pattern, name):
            grid: Grid = importlib.import_module(module).make(name)
            return grid
    raise GridError(
        f"there is no grid {name!r}",
        hint="GGUF types (Q4_K, Q8_0 …), int4-g32, int8-g128-asym, lut4-g8, F16",
    )
