"""Large constants of a running program: decoded when used, whole or by rows, and cached within a
memory limit.

Decoding dominates the time of a large model, so ``linear`` uses its weight a slab of rows at a time
(a decoded slab stays in the processor's cache), and ``gather`` decodes only the rows it needs.
``share_cache`` selects the weights that stay decoded between runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporters.coreml.constexpr import Compressed, Constant, can_take_rows, decode, take_rows

__all__ = ["Weight", "gather_rows", "linear_by_slabs", "place_of", "share_cache", "widen"]

SLAB = 1 << 19  # weights decoded at a time: 2 MB as float32


class Weight:
    """A large constant.

    Attributes:
        constant: as stored in the file.
        shape: after decoding.
        keep_as: torch type in which it stays decoded after the first use; None: decode every time.
        slab: weights that ``slabs`` decodes at a time.
        has_blocks: whether it is decoded in one pass, as fast as what was decoded before is widened
            (``blockwise``).
    """

    def __init__(self, constant: Constant, slab: int = SLAB) -> None:
        self.constant, self.slab = constant, slab
        self.shape = constant.shape
        self.keep_as: torch.dtype | None = None
        self.has_blocks = False
        self._by_rows = can_take_rows(constant)
        self._decoded: Tensor | None = None

    def whole(self) -> Tensor:
        """The decoded weight, float16 or float32."""
        if self.keep_as is not None:
            return self._keep(self.keep_as)
        return self._decode(self.constant)

    def _decode(self, constant: Constant) -> Tensor:
        """The weight, or some rows of it, in whichever type is faster."""
        if not self.has_blocks:
            return decode(constant)
        from exporters.coreml.blockwise import decode_blocks  # compiles

        return decode_blocks(constant)

    def rows(self, rows: NDArray[np.int64]) -> Tensor:
        """Some rows of the decoded weight."""
        if self._decoded is not None or not self._by_rows:
            return self.whole()[torch.from_numpy(rows)]
        return decode(take_rows(self.constant, rows))

    def slabs(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the decoded weight by slabs: first row, row after the last, their weights."""
        if self.keep_as == torch.float32:
            yield 0, self.shape[0], self.whole()
            return
        decoded = self.whole() if self.keep_as is not None or not self._by_rows else None
        for first, last in self._ranges():
            if decoded is None:
                yield first, last, self._decode(take_rows(self.constant, slice(first, last)))
            else:
                yield first, last, decoded[first:last]

    def _keep(self, dtype: torch.dtype) -> Tensor:
        if self._decoded is None and self._by_rows:
            decoded = torch.empty(self.shape, dtype=dtype)
            for first, last in self._ranges():
                rows = take_rows(self.constant, slice(first, last))
                decoded[first:last] = self._decode(rows)
            self._decoded = decoded
        elif self._decoded is None:
            self._decoded = self._decode(self.constant).to(dtype)
        return self._decoded

    def _ranges(self) -> Iterator[tuple[int, int]]:
        total = self.shape[0]
        # A multiple of 64 rows: most group sizes of palettes divide it.
        step = max(64, self.slab * total // max(1, math.prod(self.shape)) // 64 * 64)
        for first in range(0, total, step):
            yield first, min(first + step, total)


def share_cache(weights: Iterable[Weight], cache_bytes: int) -> None:
    """Select the weights that stay decoded: all as float32 if they fit, else as many as float16 of
    those that are slow to decode."""
    distinct = list({id(weight): weight for weight in weights}.values())
    if 4 * sum(math.prod(weight.shape) for weight in distinct) <= cache_bytes:
        for weight in distinct:
            weight.keep_as = torch.float32
        return
    from exporters.coreml.blockwise import has_blocks  # takes a second to import

    for weight in distinct:
        weight.has_blocks = has_blocks(weight.constant)
        nbytes = 2 * math.prod(weight.shape)
        # A plain float16 constant is in the mapped file already; a float32 one would lose bits.
        worth = isinstance(weight.constant, Compressed) and weight.constant.dtype == "fp16"
        if worth and not weight.has_blocks and nbytes <= cache_bytes:
            weight.keep_as = torch.float16
            cache_bytes -= nbytes


def place_of(constant: Constant) -> tuple[int, tuple[int, ...]]:
    """What identifies a constant of a mapped file: its first array's address, and its shape."""
    shape = constant.shape
    while isinstance(constant, Compressed):
        constant = next(part for part in constant.inputs.values() if not isinstance(part, str))
    return int(constant.raw.ctypes.data), shape


def linear_by_slabs(
    function: Callable[..., Tensor],
    x: Tensor,
    weight: Weight,
    bias: Any = None,
    axis: int = -1,
    **others: Any,
) -> Tensor:
    """``linear`` or a convolution (``function``), with the weight decoded by slabs of outputs,
    which are along ``axis`` of the result."""
    x = widen(x)
    bias = bias.whole() if isinstance(bias, Weight) else bias
    found: Tensor | None = None
    for first, last, rows in weight.slabs():
        part_bias = None if bias is None else widen(bias[first:last])
        part = function(x, widen(rows), part_bias, **others)
        if last - first == weight.shape[0]:
            return part
        if found is None:
            sizes = list(part.shape)
            sizes[axis] = weight.shape[0]
            found = part.new_empty(sizes)
        found.narrow(axis, first, last - first).copy_(part)
    assert found is not None
    return found


def gather_rows(
    function: Callable[..., Tensor], x: Weight, indices: Tensor, **others: Any
) -> Tensor:
    """``gather`` (``function``) along the first axis, decoding only the needed rows."""
    total = x.shape[0]
    wanted = torch.where(indices < 0, indices + total, indices).to(torch.int64)
    if wanted.numel() and not 0 <= int(wanted.min()) <= int(wanted.max()) < total:
        raise IndexError(f"an index is outside of 0..{total - 1}")
    rows, places = torch.unique(wanted, return_inverse=True)
    return function(x.rows(rows.numpy()), places, **others)


def widen(value: Any) -> Any:
    """Convert float16 tensors to float32, also in lists."""
    if isinstance(value, list):
        return [widen(v) for v in value]
    if isinstance(value, Tensor) and value.dtype == torch.float16:
        return value.to(torch.float32)
    return value
