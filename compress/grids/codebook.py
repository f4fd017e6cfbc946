"""The codebook grids of GGUF, IQ3_S and IQ3_XXS: four columns at a time, from a list of words.

    w = d * (2 scale + 1) * ± level      float16 d per 256 columns, scale 0..15 per 32 columns

Levels are 1, 3, 5 … 15 (IQ3_XXS: 15.5 for the last), but four adjacent columns cannot take any
four levels: only those of a list, the codebook, of 512 words (IQ3_S) or 256 (IQ3_XXS). So the
levels of four weights take 9 bits (8). A sign is stored for every weight, or (IQ3_XXS) for seven of
eight, where the number of minus signs in eight columns is even. There is no zero.

A code is the index of the weight's level, plus 8 where it is negative; four codes are a word.
The codebooks are tables of the format and come from gguf-py.

The squared error of a word is a sum over its four columns, each with one of eight levels, so it is
one entry of a table of 64 (the first two columns) plus one of another 64. A search over the words
is then, for each entry of the first table, a minimum over the entries of the second that form words
with it: one load and one minimum per word. The index of the minimum is stored in the lowest bits of
its mantissa, so the choice is exact to 2**-16 of the error.

Where the number of minus signs of eight columns must be even and is not, exactly one sign is
flipped, in either of two words. All flips are searched jointly with the words: a flipped column
costs ``w (|x| + scale * level)²``, and a flip of one of the first two columns does not change the
minima over the second table.

Each sub-block is rounded at several scales; the words found at each give the error as a parabola of
the scale. From these parabolas the unit of the block is chosen, and an odd multiple of it for each
sub-block. With the unit as stored, each multiple and its neighbours are rounded again, and the unit
is corrected by least squares.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gguf.quants
import numpy as np
from numpy.typing import NDArray

from compress.errors import GridError
from compress.grids import Array, BlockedGrid, Codebook, Float32, Params, Quantized
from compress.grids.codebook_kernels import SUB, encode_words, fit_words
from compress.grids.lanes import checked, normalized, over_rows

__all__ = ["WordGrid", "make"]

BLOCK, WORD = 256, 4
NOT_A_WORD = 0xFFFF


@dataclass(frozen=True)
class Search:
    """Settings of the search of a fit.

    Attributes:
        power: the error's weights are ``importance * (x² + spread * mean(x²)) ** (power / 2)``.
        spread: see ``power``.
        run: columns over which that mean is taken.
        tries: levels to which the largest magnitude of a sub-block is mapped.
        units: what the largest scale of a block is divided by for ``d``.
        refits: rounds of least squares after that, on the parameters as stored.
    """

    power: int
    spread: float
    run: int
    tries: tuple[float, ...]
    units: tuple[float, ...]
    refits: int


@dataclass(frozen=True)
class WordGrid(BlockedGrid):
    """One codebook type of GGUF; see the module and ``compress.grids.Grid``.

    Attributes:
        name: ggml's name.
        block_bytes: of 256 columns.
        even: whether the number of minus signs in eight columns is even.
        plain: the search when no importance is given.
        weighted: the search with an importance.
    """

    name: str
    block_bytes: int
    even: bool
    plain: Search
    weighted: Search
    block: int = BLOCK
    bits: int = 3
    group_size: int = SUB
    symmetric: bool = True

    @property
    def together(self) -> int:
        """A word, or two that share the parity of their signs."""
        return 2 * WORD if self.even else WORD

    @cached_property
    def levels(self) -> Float32:
        """Magnitudes before scaling, float32 ``[8]``, ascending."""
        values = np.array(_table(self.name).grid_map, np.float32)
        levels: Float32 = values / values[0]
        return levels

    @cached_property
    def words(self) -> NDArray[np.uint8]:
        """The codebook in the order of the format: numbers of levels, uint8 ``[words, 4]``."""
        values = _codebook(self.name)
        words: NDArray[np.uint8] = np.searchsorted(self.levels, values / values.min()).astype("u1")
        return words

    @cached_property
    def _numbers(self) -> NDArray[np.uint16]:
        """The word of each cell (three bits for every level), or ``NOT_A_WORD``."""
        numbers = np.full(8**WORD, NOT_A_WORD, np.uint16)
        numbers[_cells(self.words)] = np.arange(len(self.words))
        return numbers

    @cached_property
    def _book(self) -> tuple[Array, Array, Array]:
        """Levels, and for each first half of a word its second halves, padded to multiples of four;
        see ``codebook_kernels.search_words``."""
        starts, partners = [0], []
        cells = np.sort(_cells(self.words))
        for first in range(64):
            seconds = [int(cell) >> 6 for cell in cells if cell & 63 == first]
            seconds += seconds[-1:] * (-len(seconds) % 4)
            partners += seconds
            starts.append(len(partners))
        return self.levels, np.array(starts), np.array(partners)

    def fit(self, weight: Float32, importance: Float32 | None = None) -> Params:
        """The block parameters of (nearly) least weighted squared error, as the file stores them.

        Args:
            weight: float32 ``[rows, columns]``.
            importance: float32 ``[columns]``, non-negative.

        Returns:
            ``d`` float16 ``[rows, columns / 256]``, ``scales`` uint8 ``[rows, columns / 32]``,
            0..15.

        Raises:
            GridError: a shape that does not fit, a weight that is not finite or exceeds 65504,
                or an importance that is not a vector of finite numbers >= 0.
        """
        return self.quantize(weight, importance).params

    def quantize(self, weight: Float32, importance: Float32 | None = None) -> Quantized:
        """Parameters and the words of least weighted error; see ``fit``.

        Which word is nearest depends on how its columns are weighed, so these codes are better
        than those of ``encode``.
        """
        self.check(weight.shape)
        weight = checked(weight, self.name)
        rows, columns = weight.shape
        search = self.plain if importance is None else self.weighted
        shares = normalized(importance, columns, self.name)
        d = np.zeros((rows, columns // BLOCK), np.float32)
        scales = np.zeros((rows, columns // SUB), np.uint8)
        codes = np.empty(weight.shape, np.uint8)
        tries, units = (np.array(v, np.float32) for v in (search.tries, search.units))

        def work(begin: int, end: int) -> None:
            fit_words(
                weight, shares, search.power, np.float32(search.spread), search.run, tries, units,
                search.refits, self.even, self._book, begin, end, d, scales, codes,
            )  # fmt: skip

        over_rows(work, rows)
        return Quantized(codes, {"d": d.astype(np.float16), "scales": scales}, self, weight.shape)

    def effective(self, params: Params) -> Float32:
        """The scale of every sub-block, ``d * (2 scale + 1)``: float32 ``[rows, columns / 32]``."""
        d = np.repeat(params["d"].astype(np.float32), BLOCK // SUB, axis=1)
        scale: Float32 = d * (2 * params["scales"] + 1).astype(np.float32)
        return scale

    def codebook(self, params: Params) -> Codebook:
        """``effective`` and the words; see ``compress.grids.CodebookGrid``."""
        return Codebook(self.effective(params), *self._book, self.even)

    def encode(self, weight: Float32, params: Params) -> Array:
        """Codes of the nearest words, all columns alike: uint8 ``[rows, columns]``, 0..15.

        Raises:
            GridError: as ``fit``.
        """
        self.check(weight.shape)
        weight = checked(weight, self.name)
        codes = np.empty(weight.shape, np.uint8)
        scale, ones = self.effective(params), np.ones(weight.shape[1], np.float32)

        def work(begin: int, end: int) -> None:
            encode_words(weight, ones, scale, self.even, self._book, begin, end, codes)

        over_rows(work, len(weight))
        return codes

    def decode(self, codes: Array, params: Params) -> Float32:
        """float32 ``[rows, columns]``, equal bit for bit to gguf-py's decoding of the bytes."""
        scale = self.effective(params)
        signed = np.concatenate([self.levels, -self.levels])
        values: Float32 = np.take(signed, codes).reshape(*scale.shape, SUB)
        values *= scale[..., None]
        decoded: Float32 = values.reshape(codes.shape)
        return decoded

    def pack(self, codes: Array, params: Params) -> dict[str, Array]:
        """``blocks``: uint8 ``[rows, bytes_per_row]``, a GGUF tensor's data.

            IQ3_S    d | low bytes of the 64 words | their ninth bits | signs, a byte for eight
                     columns | scales, two in a byte
            IQ3_XXS  d | the 64 words | per 32 columns a uint32: 7 signs of each eight columns (the
                     eighth follows), and the scale in the upper 4 bits

        Raises:
            GridError: codes that are not words of the codebook, or signs that do not come in pairs.
        """
        rows, columns = codes.shape
        shape = (rows, columns // BLOCK)
        numbers = self._numbers[_cells(codes.reshape(rows, -1, WORD) & 7)].reshape(*shape, -1)
        minus = np.packbits(codes >> 3, axis=1, bitorder="little").reshape(*shape, -1)
        if (numbers == NOT_A_WORD).any() or (self.even and (np.bitwise_count(minus) & 1).any()):
            raise GridError(f"{self.name}: the codes are not of its codebook")
        scales = params["scales"].reshape(*shape, -1)
        fields = [params["d"].astype("<f2")[..., None].view(np.uint8), numbers.astype(np.uint8)]
        if self.even:
            sevens = (minus & 127).reshape(*shape, -1, 4).astype(np.uint32)
            joined = scales.astype(np.uint32) << 28
            for k in range(4):
                joined |= sevens[..., k] << np.uint32(7 * k)
            fields.append(joined.astype("<u4").view(np.uint8))
        else:
            high = (numbers >> 8).astype(np.uint8)
            fields += [np.packbits(high, axis=-1, bitorder="little"), minus]
            fields.append(scales[..., 0::2] | scales[..., 1::2] << 4)
        return {"blocks": np.concatenate(fields, axis=-1).reshape(rows, -1)}

    def unpack(self, blocks: Array) -> tuple[Array, Params]:
        """Codes and parameters of packed blocks, the inverse of ``pack``."""
        rows = len(blocks)
        parts = blocks.reshape(rows, -1, self.block_bytes)
        d = np.ascontiguousarray(parts[..., :2]).view("<f2")[..., 0].astype(np.float16)
        numbers = parts[..., 2:66].astype(np.uint16)
        if self.even:
            joined = np.ascontiguousarray(parts[..., 66:]).view("<u4")
            scales = (joined >> 28).astype(np.uint8)
            sevens = (joined[..., None] >> np.arange(0, 28, 7, dtype=np.uint32)) & np.uint32(127)
            minus = sevens.astype(np.uint8)
            minus |= (np.bitwise_count(minus) & 1) << 7
        else:
            high = np.unpackbits(parts[..., 66:74], axis=-1, bitorder="little")
            numbers |= high.astype(np.uint16) << 8
            minus = parts[..., 74:106]
            scales = np.stack([parts[..., 106:] & 15, parts[..., 106:] >> 4], axis=-1)
        signs = np.unpackbits(minus.reshape(rows, -1), axis=-1, bitorder="little")
        codes = self.words[numbers].reshape(rows, -1) | signs << 3
        return codes, {"d": d, "scales": scales.reshape(rows, -1)}


def _table(name: str) -> Any:
    return gguf.quants.IQ3_S if name == "IQ3_S" else gguf.quants.IQ3_XXS


def _codebook(name: str) -> Float32:
    """Magnitudes of every word as gguf-py has them, float32 ``[words, 4]``."""
    table = _table(name)
    table.init_grid()
    assert table.grid is not None
    return np.asarray(table.grid[0, 0])


def _cells(words: Array) -> Array:
    """Three bits for each of four levels, the first column's lowest: int64 ``[...]``."""
    cells: Array = words.astype(np.int64) @ (8 ** np.arange(WORD))
    return cells


# With an importance, a spread of 8 where llama.cpp has 2: on the demo model's inputs that is 1 %
# less output error by scale_search, 0.5 % less by gptq.
TRIES = (15.0, 13.0, 17.0, 11.0, 19.0)
UNITS = (31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 32, 33, 34)

TYPES = {
    "IQ3_S": WordGrid(
        "IQ3_S", 110, False,
        Search(2, 1.5, 32, TRIES, UNITS, 1), Search(1, 8.0, 256, TRIES, UNITS, 1),
    ),
    "IQ3_XXS": WordGrid(
        "IQ3_XXS", 98, True,
        Search(2, 1.5, 32, TRIES, UNITS, 1), Search(1, 8.0, 256, TRIES, UNITS, 1),
    ),
}  # fmt: skip


def make(name: str) -> WordGrid:
    """The grid of ggml's name.

    Raises:
        GridError: not one of the types above.
    """
    if name not in TYPES:
        raise GridError(f"there is no grid {name!r}", hint=", ".join(sorted(TYPES)))
    return TYPES[name]
