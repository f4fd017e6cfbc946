"""The block grids of GGUF: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, IQ4_XS, and Q2_K to Q6_K.

    Q4_0 Q5_0 Q8_0 IQ4_NL   w = d * level[code]                 one float16 d per 32 columns
    Q4_1 Q5_1               w = d * code + m                    float16 d and m per 32 columns
    IQ4_XS                  w = d * scale * level[code]         float16 d per 256 columns,
                                                                an integer scale per 32
    Q3_K Q6_K               w = d * scale * (code - zero)       float16 d per 256 columns,
                                                                an integer scale per 16
    Q2_K Q4_K Q5_K          w = d * scale * code - dmin * min   float16 d and dmin per 256,
                                                                integer scale and min per 16 or 32

All of them are, per sub-block, ``scale * levels[code] - minimum``: that is what ``effective`` and
``levels`` give, what ``decode`` computes (bit for bit as llama.cpp's gguf-py does), and what a
solver that rounds column by column needs.

Weights must be finite and within float16's range; all parameters then are, too. Weights smaller
than half of float16's smallest step decode to zero, and a scale that would round to zero is set
to that step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from compress.errors import GridError
from compress.grids import Array, BlockedGrid, Float32, Lattice, Params, Quantized
from compress.grids.kquant_affine import fit_affine
from compress.grids.kquant_kernels import encode_levels, encode_linear, fit_symmetric
from compress.grids.kquant_layout import block_bytes, pack, unpack
from compress.grids.lanes import checked, normalized, over_rows

__all__ = ["BlockGrid", "make"]

# The levels of IQ4_NL and IQ4_XS (ggml-common.h), denser near zero as weights are.
IQ4_LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)
# Every midpoint of two levels is a half-integer, so the nearest level is constant on each of the
# cells [k/2, (k+1)/2) and cell number floor(2 v) + 256 finds it without a search.
IQ4_CELLS = np.searchsorted(
    (IQ4_LEVELS[1:] + IQ4_LEVELS[:-1]) / 2, (np.arange(512) - 256) / 2 + 0.25
).astype(np.uint8)


@dataclass(frozen=True)
class Search:
    """Settings of the search of a fit.

    Attributes:
        power: the error's weights are ``importance * (x² + spread * mean(x²)) ** (power / 2)``.
        spread: see ``power``.
        run: columns over which that mean is taken; 0 for the whole row.
        tries: with a minimum, pairs (steps over the range of the block, shift of the levels in
            steps); without, the levels to which the largest magnitude is mapped.
        refits: rounds of least squares after the tries, on the parameters as stored.
        units: values of ``d`` (and ``dmin``) that are tried, in K-quants.
        starts: 2: repeat the whole fit with the first try only.
    """

    power: int
    spread: float
    run: int
    tries: tuple[Any, ...]
    refits: int
    units: int = 1
    starts: int = 1


@dataclass(frozen=True)
class BlockGrid(BlockedGrid):
    """One block type of GGUF; see the module and ``compress.grids.Grid``.

    Attributes:
        name: ggml's name.
        block: columns of a block, 32 or 256.
        group_size: columns that share a scale.
        zero: the code of zero (symmetric types).
        bits: of a code.
        limit: largest integer scale (with a minimum), or the magnitude of the lowest (without);
            0 where the scale is a float16 of its own.
        symmetric: there is no minimum; Q4_1, Q5_1, Q2_K, Q4_K and Q5_K have one.
        curved: the levels are those of a table, not evenly spaced: IQ4_NL, IQ4_XS.
        plain: the search when no importance is given.
        weighted: the search with an importance.
        block_bytes: of a packed block.
    """

    name: str
    block: int
    group_size: int
    zero: int
    bits: int
    limit: int
    symmetric: bool
    curved: bool
    plain: Search
    weighted: Search
    block_bytes: int

    @property
    def levels(self) -> Float32:
        """The value of each code before scale and minimum, float32 ``[2 ** bits]``."""
        if self.curved:
            return IQ4_LEVELS
        return np.arange(2**self.bits, dtype=np.float32) - np.float32(self.zero)

    def fit(self, weight: Float32, importance: Float32 | None = None) -> Params:
        """The block parameters of (nearly) least weighted squared error, as the file stores them.

        Without an importance the error also weights large weights more, as llama.cpp's quantizer
        does; see ``plain``.

        Args:
            weight: float32 ``[rows, columns]``.
            importance: float32 ``[columns]``, non-negative.

        Returns:
            ``d`` (and ``m`` or ``dmin``) float16 ``[rows, columns / block]``; K-quants also
            ``scales`` (int8, or uint8 where there are ``mins``) ``[rows, columns / group_size]``.

        Raises:
            GridError: a shape that does not fit, a weight that is not finite or exceeds 65504,
                or an importance that is not a vector of finite numbers >= 0.
        """
        self.check(weight.shape)
        weight = checked(weight, self.name)
        rows, columns = weight.shape
        search = self.plain if importance is None else self.weighted
        squares = np.empty(0, dtype=np.float32)
        if search.power and not search.run:
            squares = (np.einsum("ij,ij->i", weight, weight) / columns).astype(np.float32)
        common = (
            weight,
            normalized(importance, columns, self.name),
            squares,
            search.power,
            np.float32(search.spread),
            search.run,
            np.array(search.tries, dtype=np.float32),
            search.units,
            search.refits,
            search.starts,
            self.group_size,
        )
        top, zero, limit = (np.float32(n) for n in (2**self.bits - 1, self.zero, self.limit))
        d = np.zeros((rows, columns // self.block), dtype=np.float32)
        subs = columns // self.group_size if self.limit else 0
        if not self.symmetric:
            low = np.zeros_like(d)
            scales, mins = np.zeros((2, rows, subs), dtype=np.uint8)
            over_rows(
                lambda begin, end: fit_affine(
                    *common, top, limit, begin, end, d, low, scales, mins
                ),
                rows,
            )
            halves = d.astype(np.float16)  # exact: the kernels round
            if self.limit:
                return {"d": halves, "dmin": low.astype(np.float16), "scales": scales, "mins": mins}
            return {"d": halves, "m": (-low).astype(np.float16)}
        scales = np.zeros((rows, subs), dtype=np.int8)
        values = IQ4_LEVELS[IQ4_CELLS] if self.curved else np.empty(0, np.float32)
        over_rows(
            lambda begin, end: fit_symmetric(
                *common, -zero, top - zero, limit, values, begin, end, d, scales
            ),
            rows,
        )
        halves = d.astype(np.float16)
        return {"d": halves, "scales": scales} if self.limit else {"d": halves}

    def effective(self, params: Params) -> tuple[Float32, Float32]:
        """Scale and minimum of every sub-block: ``w = scale * levels[code] - minimum``.

        Column c of a row belongs to sub-block ``c // group_size``. A solver may round any column at
        any time: the nearest code is ``(w + minimum) / scale + zero``, rounded and clipped to the
        codes (IQ4_NL, IQ4_XS: the nearest of ``levels``); with a scale of 0 it is ``zero``.

        Returns:
            Two float32 ``[rows, columns / group_size]``.
        """
        scale = params["d"].astype(np.float32)
        low = params["m"] if "m" in params else params.get("dmin")
        minimum = np.zeros_like(scale) if low is None else low.astype(np.float32)
        if "m" in params:
            minimum = -minimum
        if self.limit:
            times = self.block // self.group_size
            scale = np.repeat(scale, times, axis=1) * params["scales"]
            minimum = np.repeat(minimum, times, axis=1)
            if "mins" in params:
                minimum = minimum * params["mins"]
        return scale, minimum

    def lattice(self, params: Params) -> Lattice:
        """``effective`` and ``levels``; see ``compress.grids.LatticeGrid``."""
        scale, minimum = self.effective(params)
        return Lattice(scale, minimum, self.levels[None], even=not self.curved)

    def encode(self, weight: Float32, params: Params) -> Array:
        """The nearest codes, uint8 ``[rows, columns]``.

        Raises:
            GridError: as ``fit``.
        """
        self.check(weight.shape)
        return self._encode(checked(weight, self.name), params)

    def _encode(self, weight: Float32, params: Params) -> Array:
        scale, minimum = self.effective(params)
        codes = np.empty(weight.shape, dtype=np.uint8)
        if self.curved:
            over_rows(
                lambda begin, end: encode_levels(
                    weight, scale, IQ4_CELLS, self.group_size, begin, end, codes
                ),
                len(codes),
            )
        else:
            zero, top = np.float32(self.zero), np.float32(2**self.bits - 1)
            over_rows(
                lambda begin, end: encode_linear(
                    weight, scale, minimum, self.group_size, zero, top, begin, end, codes
                ),
                len(codes),
            )
        return codes

    def decode(self, codes: Array, params: Params) -> Float32:
        """float32 ``[rows, columns]``, equal bit for bit to gguf-py's decoding of the bytes."""
        scale, minimum = self.effective(params)
        values: Float32 = np.take(self.levels, codes).reshape(*scale.shape, self.group_size)
        values *= scale[..., None]
        if not self.symmetric:
            values -= minimum[..., None]
        decoded: Float32 = values.reshape(codes.shape)
        return decoded

    def pack(self, codes: Array, params: Params) -> dict[str, Array]:
        """``blocks``: uint8 ``[rows, bytes_per_row]``, a GGUF tensor's data."""
        rows, columns = codes.shape
        blocks = np.empty((rows, columns // self.block, self.block_bytes), np.uint8)
        over_rows(partial(pack, self.name, codes, params, blocks), rows)
        return {"blocks": blocks.reshape(rows, -1)}

    def unpack(self, blocks: Array) -> tuple[Array, Params]:
        """Codes and parameters of packed blocks, the inverse of ``pack``."""
        return unpack(self.name, blocks.reshape(len(blocks), -1, self.block_bytes))

    def quantize(self, weight: Float32, importance: Float32 | None = None) -> Quantized:
        """``fit``, then ``encode``; the weight is checked once."""
        params = self.fit(weight, importance)
        weight = np.ascontiguousarray(weight, np.float32)
        return Quantized(self._encode(weight, params), params, self, weight.shape)


# Tries were chosen greedily on sub-blocks of normal, Student-t, Laplace and one-sided weights, and
# of weights with outliers; ten of them reach the error of forty evenly spaced ones. The first try
# of Q2_K and Q3_K is also used alone in a second start (``starts``): it maps the range exactly to
# the codes, which is better where one sub-block's large scale leaves the others few integer steps.
TRIES_Q2 = ((3, 0), (3.625, -0.3), (2.625, 0.6), (3.375, -0.5), (3.625, 0), (2.875, 0), (4, 0.2))
TRIES_Q4 = (
    (15.5, -0.25), (15, 0.5), (14.5, 0.25), (15.5, -0.5), (15.5, 0), (14, 1),
    (13.25, 0.75), (14.25, 0.625), (15.5, 0.25), (12.75, 0.5), (14, 0.25),
)  # fmt: skip
TRIES_Q5 = (
    (31, 0), (30.5, 0.75), (29.5, 0.625), (31.25, 0.25), (31, -0.25), (28.25, 0.875),
    (28.75, 0.25), (29.75, 1), (27.25, 0.875), (31, 0.125), (29.75, 0.25),
)  # fmt: skip
TRIES_Q4_1 = ((15.5, -0.25), (15.25, 0.25), (15.25, -0.375), (14, 1), (15, 0.125), (13.25, 0.875))
TRIES_Q5_1 = ((31.25, -0.125), (30.75, 0.625), (30.5, 0.25), (29, 1), (31.25, -0.375), (31.5, 0))
LEVELS_Q8 = (-128, -125)
LEVELS_Q6 = (-32, -31, -29, -30, -28, -27.25)
LEVELS_Q5 = (-16, -15, -17, -14, -13, -18, 12, -16.5)
LEVELS_Q4 = (-8.125, -7.25, -9.25, 8.75, -6.5, -10.625, -7.75, -8.625)
LEVELS_Q3 = (-4.25, -3.25, -5.375, 4.75, -3.875, 4, -6, -4.625)
LEVELS_IQ4 = (-128, 115, -109, -140, 129, -122, 91, -91)
LEVELS_IQ4_XS = (-133, 117, -123, -107, -143, 110, 129, 93, -150, -128)

# name: block, group_size, zero, bits, limit, symmetric, curved
SHAPES = {
    "Q8_0": (32, 32, 128, 8, 0, True, False),
    "Q4_0": (32, 32, 8, 4, 0, True, False),
    "Q5_0": (32, 32, 16, 5, 0, True, False),
    "IQ4_NL": (32, 32, 0, 4, 0, True, True),
    "Q4_1": (32, 32, 0, 4, 0, False, False),
    "Q5_1": (32, 32, 0, 5, 0, False, False),
    "Q2_K": (256, 16, 0, 2, 15, False, False),
    "Q3_K": (256, 16, 4, 3, 32, True, False),
    "Q4_K": (256, 32, 0, 4, 63, False, False),
    "Q5_K": (256, 32, 0, 5, 63, False, False),
    "Q6_K": (256, 16, 32, 6, 128, True, False),
    "IQ4_XS": (256, 32, 0, 4, 32, True, True),
}

# name: search without, and with importance. The weights of the error were chosen so that both the
# plain error and the error as weighted by llama.cpp are below llama.cpp's.
SEARCHES = {
    "Q8_0": (Search(0, 0.0, 32, LEVELS_Q8, 0), Search(0, 0.0, 32, LEVELS_Q8, 0)),
    "Q4_0": (Search(0, 0.0, 32, (-8.25, -7.125, -8.75), 1), Search(1, 1.0, 0, LEVELS_Q4, 2)),
    "Q5_0": (Search(0, 0.0, 32, (-16.25, -15, -15.75), 1), Search(1, 1.0, 0, LEVELS_Q5, 2)),
    "IQ4_NL": (Search(2, 2.0, 32, LEVELS_IQ4, 2), Search(1, 1.0, 32, LEVELS_IQ4, 2)),
    "Q4_1": (Search(0, 0.0, 32, TRIES_Q4_1[:3], 0), Search(1, 1.0, 0, TRIES_Q4_1, 1)),
    "Q5_1": (Search(0, 0.0, 32, TRIES_Q5_1[:3], 0), Search(1, 1.0, 0, TRIES_Q5_1, 1)),
    "Q2_K": (Search(1, 0.3, 16, TRIES_Q2, 2, 1, 2), Search(1, 1.0, 256, TRIES_Q2, 2, 1, 2)),
    "Q3_K": (Search(2, 1.5, 16, (-4.125, -3.125), 0, 8), Search(1, 2.0, 256, LEVELS_Q3, 1, 8, 2)),
    "Q4_K": (Search(1, 1.0, 32, TRIES_Q4, 2, 6), Search(1, 2.0, 256, TRIES_Q4, 2, 6)),
    "Q5_K": (Search(1, 1.0, 32, TRIES_Q5, 2, 8), Search(1, 2.0, 256, TRIES_Q5, 2, 8)),
    "Q6_K": (Search(2, 2.0, 16, LEVELS_Q6, 1, 8), Search(0, 0.0, 32, LEVELS_Q6, 1, 8)),
    "IQ4_XS": (Search(2, 2.0, 32, LEVELS_IQ4_XS, 2, 16), Search(1, 2.0, 256, LEVELS_IQ4_XS, 2, 16)),
}


TYPES = {
    name: BlockGrid(name, *SHAPES[name], *SEARCHES[name], block_bytes(name)) for name in SHAPES
}


def make(name: str) -> BlockGrid:
    """The grid of ggml's name.

    Raises:
        GridError: not one of the types above.
    """
    if name not in TYPES:
        raise GridError(f"there is no grid {name!r}", hint=", ".join(sorted(TYPES)))
    return TYPES[name]
