"""Shared by the numba kernels of the grids: lanes, threads, compilation, float16 rounding.

Thirty-two rows are processed at once, one per SIMD lane: a tile is transposed to
``[columns, LANES]``, and every sum of a block runs over the columns, separately in each lane, never
across lanes. So the kernels are several times faster than scalar C, and the result of a row depends
neither on other rows nor on the number of threads.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit

from compress.errors import GridError
from compress.grids import Array, Float32
from compress.machine import worker_threads

f4 = np.float32

LANES = 32
SMALLEST_HALF = f4(2.0**-24)
LARGEST_HALF = f4(65504.0)
WORST = f4(3e38)

# Full fast-math would assume that there are no infinities, with which guards compare.
FAST = {"reassoc", "contract", "arcp", "nsz"}


def kernel(function: Callable[..., Any], fastmath: Collection[str] = FAST) -> Any:
    """Compile on first call and cache on disk; where no folder is writable, only compile.

    The GIL is released. A kernel has its own fast-math flags in every caller. numba detects changes
    of a kernel's own file only: after an edit here, or of another file with kernels that are called
    from elsewhere, delete the ``*.nbi`` files.
    """
    options = {"nogil": True, "error_model": "numpy", "fastmath": set(fastmath)}
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:
        return njit(function, **options)


@njit(nogil=True, error_model="numpy", fastmath={"nsz"})
def half(value):
    """The float16 nearest to a float32, as a float32; saturates, and keeps non-zero non-zero.

    Veltkamp's splitting leaves the upper 11 bits; below 2**-14 the steps are 2**-24, which
    adding and subtracting 0.5 rounds to. Its own fast-math flags keep it from inheriting those of
    its caller, which would cancel both.
    """
    size = min(abs(value), LARGEST_HALF)
    split = size * f4(8193.0)
    rounded = split - (split - size)
    if size < f4(2.0**-14):
        rounded = (size + f4(0.5)) - f4(0.5)
    if size > f4(0.0):
        rounded = min(max(rounded, SMALLEST_HALF), LARGEST_HALF)
    return -rounded if value < f4(0.0) else rounded


@kernel
def inverse_of(value):
    """1 / value, or 0 for 0."""
    return f4(1.0) / value if value != f4(0.0) else f4(0.0)


@kernel
def all_within(values, limit):
    """Whether all magnitudes are at most ``limit``, and none is NaN."""
    beyond = 0
    for i in range(len(values)):  # by index: LLVM does not vectorize loops over numba's iterators
        beyond += 0 if abs(values[i]) <= limit else 1
    return beyond == 0


def checked(weight: Float32, name: str) -> Float32:
    """The weight checked for the kernels: contiguous, finite, within float16's range.

    Raises:
        GridError: a weight that is not finite or exceeds 65504; it begins with the grid's name.
    """
    weight = np.ascontiguousarray(weight, dtype=np.float32)
    if not all_within(weight.reshape(-1), LARGEST_HALF):
        raise beyond_float16(name)
    return weight


def beyond_float16(name: str) -> GridError:
    """The error of a weight that is NaN, infinite or larger than 65504."""
    return GridError(
        f"{name}: a weight is not finite or beyond float16's range",
        hint="is the checkpoint damaged? no trained weight is that large",
    )


def normalized(importance: Float32 | None, columns: int, name: str) -> Float32:
    """Importance with mean 1 and no zeros, so that unused columns are fitted too."""
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
    shares: Float32 = np.maximum(importance / mean, 1e-6).astype(np.float32)
    return shares


def over_rows(work: Callable[[int, int], None], rows: int, unit: int = LANES) -> None:
    """Call ``work(begin, end)`` over all rows, in the process's threads.

    Each call has whole units of rows, and each thread at least four of them. The kernels release
    the GIL. The threads are Python's, since numba's abort the process when two callers use them
    at once (workqueue), or hang after a fork (OpenMP).
    """
    tiles = -(-rows // unit)
    threads = min(worker_threads(), tiles // 4)
    if threads <= 1:
        work(0, rows)
        return
    step = max(1, tiles // (4 * threads)) * unit
    with ThreadPoolExecutor(threads) as pool:
        begins = range(0, rows, step)
        list(pool.map(lambda begin: work(begin, min(begin + step, rows)), begins))


def join_pairs(codes: Array) -> Array:
    """Two 4-bit codes to a byte, the first in its low half: as ONNX and Core ML store them.

    Args:
        codes: uint8 or int8, of an even number of columns; of each the low 4 bits count.

    Returns:
        uint8, with half as many columns.
    """
    flat = np.ascontiguousarray(codes).view(np.uint8).reshape(-1)
    joined = np.empty(flat.size // 2, np.uint8)
    join(flat, joined)
    return joined.reshape(*codes.shape[:-1], -1)


@kernel
def join(codes, joined):
    """``joined[i]`` from ``codes[2 i]`` and ``codes[2 i + 1]``."""
    for i in range(len(joined)):
        joined[i] = (codes[2 * i] & 15) | (codes[2 * i + 1] << 4)


def to_half(values: Float32) -> Array:
    """float16 of float32 values that are float16 values (``half``): only bits move, which takes a
    tenth of numpy's conversion."""
    found = np.empty(values.shape, np.uint16)
    narrow(np.ascontiguousarray(values).view(np.uint32).reshape(-1), found.reshape(-1))
    return found.view(np.float16)


def from_half(values: Array) -> Float32:
    """float32 of finite float16 values."""
    bits = np.empty(values.shape, np.uint32)
    widen(np.ascontiguousarray(values).view(np.uint16).reshape(-1), bits.reshape(-1))
    found: Float32 = bits.view(np.float32)
    found *= f4(2.0**112)
    return found


@kernel
def narrow(bits, found):
    """float16 bits of float32 bits; below 2**-14 (exponent 113) a float16 has no leading one."""
    for i in range(len(bits)):
        size = bits[i] & np.uint32(0x7FFFFFFF)
        shift = np.uint32(126) - min(max(size >> np.uint32(23), np.uint32(95)), np.uint32(113))
        small = (size & np.uint32(0x7FFFFF) | np.uint32(0x800000)) >> shift
        normal = (size >> np.uint32(13)) - np.uint32(112 << 10)
        half = normal if size >= np.uint32(113 << 23) else small
        found[i] = half | (bits[i] >> np.uint32(16) & np.uint32(0x8000))


@kernel
def widen(stored, bits):
    """float32 bits of 2**-112 times float16 values."""
    for i in range(len(stored)):
        value = np.uint32(stored[i])
        bits[i] = (value & 0x8000) << 16 | (value & 0x7FFF) << 13


@kernel
def widen_bfloat16(stored, bits):
    """float32 bits of bfloat16 bits.

    Returns:
        The largest without the sign; 0x7F80 and more is NaN or infinite.
    """
    largest = np.uint16(0)
    for i in range(len(stored)):
        largest = max(largest, stored[i] & np.uint16(0x7FFF))
        bits[i] = np.uint32(stored[i]) << np.uint32(16)
    return largest
