"""Sparse grids: in every row some weights are zero, the others are on an inner grid.

    2of4-lut4-g8     of every 4 adjacent weights the 2 largest are nonzero, in a 4-bit palette
    s50-int4-g32     half of every row is zero, the rest are 4-bit integers in groups
    s75-F16          a quarter of every row is nonzero, as float16

A file stores a mask of one bit per weight and the codes of the nonzero weights. So at 4 bits a
quarter of zeros saves nothing: ``1 + 0.75 * 4 = 4`` bits a weight. Every row has the same number
of nonzero weights, so that the size is known before a weight is read (Wanda, Sun et al., arXiv
2306.11695, also compares within rows).

The grid retains the largest magnitudes; where ``compress.pruning.sparse`` chose by calibration, the
others are already zero.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from compress.errors import GridError
from compress.grids import Array, BaseGrid, Float32, Grid, Params, get_grid
from compress.grids.palette import Palette

__all__ = ["Pattern", "SparseGrid", "make", "pattern_of"]


@dataclass(frozen=True)
class Pattern:
    """The number of nonzero weights in a row.

    Attributes:
        nonzeros: largest number of nonzero weights among ``of`` adjacent ones in a row.
        of: 0 where zeros may be anywhere in the row.
        percent: then the share of zeros in the row, in percent.
    """

    name: str
    nonzeros: int = 0
    of: int = 0
    percent: int = 0

    @classmethod
    def parse(cls, name: str) -> Pattern:
        """``2of4`` or ``s50``.

        Raises:
            GridError: neither, or a pattern without zeros or without nonzero weights.
        """
        if found := re.fullmatch(r"([1-9]\d?)of([1-9]\d?)", name):
            nonzeros, of = map(int, found.groups())
            if nonzeros < of:
                return cls(name, nonzeros=nonzeros, of=of)
        elif (found := re.fullmatch(r"s([1-9]\d?)", name)) is not None:
            return cls(name, percent=int(found[1]))
        raise GridError(
            f"there is no sparsity {name!r}", hint="2of4 or 4of8; s50 for half of a row"
        )

    def check(self, columns: int) -> None:
        """Raise GridError where the row does not divide."""
        if self.of and columns % self.of:
            raise GridError(f"{self.name}: {columns} columns are not a multiple of {self.of}")

    def count(self, columns: int) -> int:
        """The number of nonzero weights in a row of ``columns``."""
        return (
            columns // self.of * self.nonzeros
            if self.of
            else columns - columns * self.percent // 100
        )

    def mask(self, scores: Array, count: int | None = None) -> Array:
        """A mask of the highest scores of each row, or of each group of neighbours.

        Args:
            scores: float ``[rows, columns]``; of equal ones the first are chosen.
            count: the number per row, instead of ``Pattern.count``; not for groups.

        Returns:
            bool ``[rows, columns]``.
        """
        rows, columns = scores.shape
        if self.of:
            scores = scores.reshape(rows * (columns // self.of), self.of)
        nonzeros = self.nonzeros if self.of else self.count(columns) if count is None else count
        order = np.argsort(-scores, axis=1, kind="stable")[:, :nonzeros]
        mask = np.zeros(scores.shape, bool)
        np.put_along_axis(mask, order, True, axis=1)
        return mask.reshape(rows, columns)


def pattern_of(sparsity: str | float) -> Pattern | None:
    """The pattern of a recipe's ``sparsity``: ``none``, ``2of4``, or the share of zeros in a row.

    Raises:
        GridError: another word, or a share that is not whole percents.
    """
    if sparsity == "none":
        return None
    if isinstance(sparsity, str):
        return Pattern.parse(sparsity)
    percent = round(100 * sparsity)
    if abs(percent - 100 * sparsity) > 1e-6:
        raise GridError(f"sparsity {sparsity} is not in whole percents")
    return Pattern.parse(f"s{percent}")


def make(name: str) -> SparseGrid:
    """``2of4-lut4-g8``, ``s50-int4-g32`` …

    Raises:
        GridError: no such pattern or inner grid.
    """
    pattern, _, inner = name.partition("-")
    return SparseGrid(Pattern.parse(pattern), get_grid(inner))


@dataclass(frozen=True)
class SparseGrid(BaseGrid):
    """See the module and ``compress.grids.Grid``.

    Attributes:
        pattern: how many weights are nonzero.
        inner: the grid of the nonzero weights.
    """

    pattern: Pattern
    inner: Grid

    @property
    def name(self) -> str:
        return f"{self.pattern.name}-{self.inner.name}"

    @property
    def bits(self) -> int:
        """Those of the inner grid."""
        return self.inner.bits

    @property
    def group_size(self) -> int:
        """That of the inner grid."""
        return self.inner.group_size

    @property
    def group_rows(self) -> int:
        """Those of the inner grid."""
        return self.inner.group_rows

    @property
    def symmetric(self) -> bool:
        """As the inner grid."""
        return self.inner.symmetric

    def check(self, shape: tuple[int, int]) -> None:
        """Raise GridError when the pattern or the inner grid does not fit."""
        self.pattern.check(shape[1])
        self.inner.check(shape)

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the mask, the nonzero weights' codes, and the inner grid's scales or tables."""
        rows, columns = shape
        dense = (rows * columns * self.bits + 7) // 8
        there = (rows * self.pattern.count(columns) * self.bits + 7) // 8
        return (rows * columns + 7) // 8 + self.inner.nbytes(shape) - dense + there

    def fit(self, weight: Float32, importance: Float32 | None = None) -> Params:
        """``mask``, bool ``[rows, columns]``, and the parameters of the inner grid.

        A palette has no entry for the zeros. Its packed nonzero weights are no longer aligned by
        column, so all columns are weighted equally.
        """
        self.pattern.check(weight.shape[1])
        mask = self.pattern.mask(np.abs(weight))
        if isinstance(self.inner, Palette):
            params = self.inner.fit(weight[mask].reshape(len(weight), -1))
        else:
            params = self.inner.fit(np.where(mask, weight, np.float32(0)), importance)
        return {**params, "mask": mask}

    def encode(self, weight: Float32, params: Params) -> Array:
        """The inner grid's codes; codes of masked weights are ignored."""
        return self.inner.encode(weight, _inner(params))

    def decode(self, codes: Array, params: Params) -> Float32:
        """float32 ``[rows, columns]``, zero where the mask is false."""
        weight = self.inner.decode(codes, _inner(params))
        weight[~params["mask"]] = 0
        return weight

    def pack(self, codes: Array, params: Params) -> dict[str, Array]:
        """``mask`` uint8 ``[rows, columns]``, ``codes`` one-dimensional, row by row, and what the
        inner grid has besides."""
        mask = params["mask"]
        return {**_inner(params), "mask": mask.astype(np.uint8), "codes": codes[mask]}


def _inner(params: Params) -> dict[str, Array]:
    return {name: values for name, values in params.items() if name != "mask"}
