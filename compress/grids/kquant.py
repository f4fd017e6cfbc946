"""The block grids of GGUF: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL and the K-quants Q2_K to Q6_K.

    Q4_0 Q5_0 Q8_0 IQ4_NL   w = d * level[code]                 one float16 d per 32 columns
    Q4_1 Q5_1               w = d * code + m                    float16 d and m per 32 columns
    Q3_K Q6_K               w = d * scale * (code - zero)       float16 d per 256 columns,
                                                                an integer scale per 16
    Q2_K Q4_K Q5_K          w = d * scale * code - dmin * min   float16 d and dmin per 256,
                                                                integer scale and min per 16 or 32

All of them are, per sub-block, ``scale * levels[code] - minimum``: that is what ``effective`` and
``levels`` give, what ``decode`` computes (bit for bit as llama.cpp's gguf-py does), and what a
solver that rounds column by column needs.

Weights must be finite and within float16's range; so are all parameters then. What is smaller
than half of float16's smallest step decodes to zero, and a scale that would round to zero is
kept at that step.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import config

from compress.errors import GridError
from compress.grids import Array, Float32, Params, Quantized
from compress.grids import kquant_kernels as kernels
from compress.grids.kquant_layout import block_bytes, pack, unpack

__all__ = ["LARGEST_WEIGHT", "BlockGrid", "make"]

LARGEST_WEIGHT = 65504.0

# The levels of IQ4_NL (ggml-common.h), denser near zero as weights are.
IQ4_LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)
# Every midpoint of two levels is a half-integer, so the nearest level is constant on each of the
# cells [k/2, (k+1)/2) and cell number floor(2 v) + 256 finds it without a search.
IQ4_CELLS = np.searchsorted(
    (IQ4_LEVELS[1:] + IQ4_LEVELS[:-1]) / 2, (np.arange(512) - 256) / 2 + 0.25
).astype(np.uint8)


@dataclass(frozen=True)
class Weighting:
    """The error's weights: ``importance * (x² + spread * mean(x²)) ** (power / 2)``, with the
    mean over ``run`` columns."""

    power: int
    spread: float
    run: int


@dataclass(frozen=True)
class BlockGrid:
    """One block type of GGUF; see the module and ``compress.grids.Grid``.

    Attributes:
        name: ggml's name.
        block: columns of a block, 32 or 256.
        sub: columns that share a scale.
        zero: the code of zero (symmetric types).
        top: the largest code.
        limit: largest integer scale (with a minimum), or the magnitude of the lowest (without);
            0 where the scale is a float16 of its own.
        has_minimum: Q4_1, Q5_1, Q2_K, Q4_K, Q5_K.
        tries: what the search for the scale tries; see the kernels.
        plain: weights of the error when no importance is given.
        weighted: weights of the error beside a given importance.
        refits: rounds of least squares after the search.
    """

    name: str
    block: int
    sub: int
    zero: int
    top: int
    limit: int
    has_minimum: bool
    tries: tuple[Any, ...]
    plain: Weighting
    weighted: Weighting
    refits: int

    @property
    def levels(self) -> Float32:
        """What each code stands for before scale and minimum, float32 ``[top + 1]``."""
        if self.name == "IQ4_NL":
            return IQ4_LEVELS
        return np.arange(self.top + 1, dtype=np.float32) - np.float32(self.zero)

    def check(self, shape: tuple[int, int]) -> None:
        """Raise GridError when the rows are not whole blocks."""
        if len(shape) != 2 or shape[1] % self.block or shape[1] == 0:
            raise GridError(
                f"{self.name}: rows of {shape[-1]} columns are not whole blocks of {self.block}",
                hint="Q8_0, Q5_0, Q4_0, IQ4_NL need a multiple of 32; F16 takes any length",
            )

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the packed blocks."""
        self.check(shape)
        return shape[0] * (shape[1] // self.block) * block_bytes(self.name)

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """4.5 for Q4_K, 6.5625 for Q6_K …, whatever the shape."""
        return self.nbytes(shape) * 8 / (shape[0] * shape[1])

    def fit(self, weight: Float32, importance: Float32 | None = None) -> Params:
        """The block parameters of (nearly) least weighted squared error, as the file stores them.

        Without an importance the error still weighs large weights more, as llama.cpp's own
        quantizer does; ``plain`` says how much.

        Args:
            weight: float32 ``[rows, columns]``.
            importance: float32 ``[columns]``, non-negative.

        Returns:
            ``d`` (and ``m`` or ``dmin``) float16 ``[rows, columns / block]``; K-quants also
            ``scales`` (int8, or uint8 where there are ``mins``) ``[rows, columns / sub]``.

        Raises:
            GridError: a shape that does not fit, a weight that is not finite or exceeds 65504,
                or an importance that is not a vector of finite numbers >= 0.
        """
        weight = self._checked(weight)
        rows, columns = weight.shape
        weighting = self.plain if importance is None else self.weighted
        common = (
            weight,
            _normalized(importance, columns, self.name),
            weighting.power,
            np.float32(weighting.spread),
            weighting.run,
            self.sub,
        )
        tries = np.array(self.tries, dtype=np.float32)
        d = np.zeros((rows, columns // self.block), dtype=np.float32)
        top = np.float32(self.top)
        limit = np.float32(self.limit)
        if self.limit and self.has_minimum:
            dmin = np.zeros_like(d)
            scales = np.zeros((rows, columns // self.sub), dtype=np.uint8)
            mins = np.zeros_like(scales)
            _over_rows(
                lambda begin, end: kernels.fit_affine_super(
                    *common, top, limit, tries, self.refits, begin, end, d, dmin, scales, mins
                ),
                rows,
            )
            return {"d": _half(d), "dmin": _half(dmin), "scales": scales, "mins": mins}
        if self.has_minimum:
            m = np.zeros_like(d)
            _over_rows(
                lambda begin, end: kernels.fit_affine(
                    *common, top, tries, self.refits, begin, end, d, m
                ),
                rows,
            )
            return {"d": _half(d), "m": _half(m)}
        least, most = np.float32(-self.zero), np.float32(self.top - self.zero)
        if self.limit:
            scales = np.zeros((rows, columns // self.sub), dtype=np.int8)
            _over_rows(
                lambda begin, end: kernels.fit_symmetric_super(
                    *common, least, most, limit, tries, self.refits, begin, end, d, scales
                ),
                rows,
            )
            return {"d": _half(d), "scales": scales}
        table = IQ4_LEVELS[IQ4_CELLS] if self.name == "IQ4_NL" else np.empty(0, np.float32)
        _over_rows(
            lambda begin, end: kernels.fit_symmetric(
                *common, least, most, table, tries, self.refits, begin, end, d
            ),
            rows,
        )
        return {"d": _half(d)}

    def effective(self, params: Params) -> tuple[Float32, Float32]:
        """Scale and minimum of every sub-block: ``w = scale * levels[code] - minimum``.

        Column c of a row belongs to sub-block ``c // sub``. A solver may round any column at any
        time: the nearest code is ``(w + minimum) / scale + zero``, rounded and cut to 0..top
        (IQ4_NL: the nearest of ``levels``); a scale of 0 wants code ``zero``.

        Returns:
            Two float32 ``[rows, columns / sub]``.
        """
        scale = params["d"].astype(np.float32)
        low = params["m"] if "m" in params else params.get("dmin")
        minimum = np.zeros_like(scale) if low is None else low.astype(np.float32)
        if "m" in params:
            minimum = -minimum
        if self.limit:
            times = self.block // self.sub
            scale = np.repeat(scale, times, axis=1) * params["scales"]
            minimum = np.repeat(minimum, times, axis=1)
            if "mins" in params:
                minimum = minimum * params["mins"]
        return scale, minimum

    def encode(self, weight: Float32, params: Params) -> Array:
        """The nearest codes, uint8 ``[rows, columns]``, 0..top.

        Raises:
            GridError: as ``fit``.
        """
        weight = self._checked(weight)
        scale, minimum = self.effective(params)
        codes = np.empty(weight.shape, dtype=np.uint8)
        if self.name == "IQ4_NL":
            _over_rows(
                lambda begin, end: kernels.encode_levels(
                    weight, scale, IQ4_CELLS, self.sub, begin, end, codes
                ),
                len(codes),
            )
        else:
            zero, top = np.float32(self.zero), np.float32(self.top)
            _over_rows(
                lambda begin, end: kernels.encode_linear(
                    weight, scale, minimum, self.sub, zero, top, begin, end, codes
                ),
                len(codes),
            )
        return codes

    def decode(self, codes: Array, params: Params) -> Float32:
        """float32 ``[rows, columns]``, equal bit for bit to gguf-py's decoding of the bytes."""
        scale, minimum = self.effective(params)
        values: Float32 = np.take(self.levels, codes).reshape(*scale.shape, self.sub)
        values *= scale[..., None]
        if self.has_minimum:
            values -= minimum[..., None]
        return values.reshape(codes.shape)

    def pack(self, codes: Array, params: Params) -> dict[str, Array]:
        """``blocks``: uint8 ``[rows, bytes_per_row]``, a GGUF tensor's data."""
        return {"blocks": pack(self.name, self.block, codes, params)}

    def unpack(self, blocks: Array) -> tuple[Array, Params]:
        """Codes and parameters of packed blocks, the inverse of ``pack``."""
        return unpack(self.name, self.block, blocks)

    def quantize(self, weight: Float32, importance: Float32 | None = None) -> Quantized:
        """``fit``, then ``encode``."""
        params = self.fit(weight, importance)
        return Quantized(self.encode(weight, params), params, self, weight.shape)

    def _checked(self, weight: Float32) -> Float32:
        self.check(weight.shape)
        weight = np.ascontiguousarray(weight, dtype=np.float32)
        # A minimum is NaN if any weight is, and every comparison with NaN is false.
        if weight.size and not (-LARGEST_WEIGHT <= weight.min() and weight.max() <= LARGEST_WEIGHT):
            raise GridError(
                f"{self.name}: a weight is not finite or beyond float16's range",
                hint="keep this tensor in BF16 or F32",
            )
        return weight


def _normalized(importance: Float32 | None, columns: int, name: str) -> Float32:
    """Importance with mean 1 and no zeros: a column that never mattered still has to decode."""
    if importance is None:
        return np.ones(columns, dtype=np.float32)
    if importance.shape != (columns,) or not np.isfinite(importance).all() or importance.min() < 0:
        raise GridError(
            f"{name}: the importance is not {columns} finite numbers >= 0",
            hint="calibrate again",
        )
    mean = float(importance.mean(dtype=np.float64))
    if mean == 0:
        return np.ones(columns, dtype=np.float32)
    return np.maximum(importance / mean, 1e-6).astype(np.float32)


def _half(values: Float32) -> Array:
    return values.astype(np.float16)  # exact: the kernels round


def _over_rows(work: Callable[[int, int], None], rows: int) -> None:
    """``work(begin, end)`` over all rows, in as many threads as numba is configured for.

    The kernels release the GIL. Threads of ours rather than numba's own: those abort the process
    when two callers come at once (workqueue) or hang after a fork (OpenMP).
    """
    lanes = kernels.LANES
    tiles = -(-rows // lanes)
    threads = min(config.NUMBA_NUM_THREADS, tiles // 4)
    if threads <= 1:
        work(0, rows)
        return
    step = max(1, min(tiles // threads, tiles // (4 * threads))) * lanes
    with ThreadPoolExecutor(threads) as pool:
        begins = range(0, rows, step)
        list(pool.map(lambda begin: work(begin, min(begin + step, rows)), begins))


# Tries were chosen greedily, each next one the most useful on sub-blocks of normal, Student-t,
# Laplace, one-sided and outlier-ridden weights; a handful of those does what twenty evenly spaced
# ones do. With a minimum: (steps over the range of the block, shift of the levels in steps).
# Without: the level that the largest magnitude is put on.
TRIES_2 = ((3.5, -0.2), (2.75, 0.6), (3.375, -0.4), (3.375, 0), (3, 0), (3.25, 0.2), (3.625, -0.4))
TRIES_4 = (
    (15, 0), (14.75, 0.625), (15, 0.25), (15, -0.25), (14, 1), (15.5, -0.125),
    (15.5, -0.375), (14.25, 0.625), (15, 0.125), (13.5, 0.625), (15, -0.125),
)  # fmt: skip
TRIES_5 = (
    (31, 0), (30.5, 0.75), (31, 0.25), (31, -0.25), (29.25, 0.875), (29.75, 0.125),
    (28.25, 0.875), (31, 0.125), (30.25, 0.625), (31, -0.125), (30, 0.25),
)  # fmt: skip
TRIES_IQ4 = (-128, 114, -108, -123, -134, 119, 109, 91, -104, -131, -119, -91)

PLAIN_32 = Weighting(0, 0.0, 32)
ROOT_32 = Weighting(1, 1.0, 32)
ROOT_256 = Weighting(1, 2.0, 256)

TYPES = {
    grid.name: grid
    for grid in (
        #         name     block sub zero top limit minimum tries plain weighted refits
        BlockGrid("Q8_0", 32, 32, 128, 255, 0, False, (-128, -126, -124), PLAIN_32, PLAIN_32, 0),
        BlockGrid("Q4_0", 32, 32, 8, 15, 0, False, (-8.25, -7.875, -8.625), PLAIN_32, ROOT_32, 1),
        BlockGrid("Q5_0", 32, 32, 16, 31, 0, False, (-16.25, -15, -15.75), PLAIN_32, ROOT_32, 1),
        BlockGrid("IQ4_NL", 32, 32, 0, 15, 0, False, TRIES_IQ4, Weighting(2, 0.5, 32), ROOT_32, 2),
        BlockGrid("Q4_1", 32, 32, 0, 15, 0, True, TRIES_4[:4], PLAIN_32, ROOT_32, 1),
        BlockGrid("Q5_1", 32, 32, 0, 31, 0, True, TRIES_5[:4], PLAIN_32, ROOT_32, 1),
        BlockGrid("Q2_K", 256, 16, 0, 3, 15, True, TRIES_2, ROOT_32, ROOT_256, 3),
        BlockGrid("Q4_K", 256, 32, 0, 15, 63, True, TRIES_4, ROOT_32, ROOT_256, 2),
        BlockGrid("Q5_K", 256, 32, 0, 31, 63, True, TRIES_5, ROOT_32, ROOT_256, 2),
        BlockGrid("Q3_K", 256, 16, 4, 7, 32, False, (-4, -3.125, -4.25, -3.75, -2.125),
                  Weighting(2, 0.5, 16), ROOT_256, 3),
        BlockGrid("Q6_K", 256, 16, 32, 63, 128, False, (-32, -31, -30, -29, -28, -27.25, -31.75),
                  Weighting(2, 1.0, 16), Weighting(0, 0.0, 16), 2),
    )
}  # fmt: skip


def make(name: str) -> BlockGrid:
    """The grid of ggml's name.

    Raises:
        GridError: not one of the types above.
    """
    if name not in TYPES:
        raise GridError(f"there is no grid {name!r}", hint=", ".join(sorted(TYPES)))
    return TYPES[name]
