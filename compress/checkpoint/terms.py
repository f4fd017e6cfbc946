"""The terms of an adapter: values that are added to rows of a weight, or replace them.

Products are computed in fixed tiles of rows, so that a weight has the same bits however many rows
are read at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from compress.checkpoint.safetensors import Float32, TensorInfo, read_range
from compress.machine import in_threads

__all__ = ["BiasTerm", "LowRank", "Term", "TokenRows", "same_values"]

TILE = 64  # rows of one product
PIECE = 1 << 20  # least weights for a thread, and weights read at a time


@dataclass(frozen=True)
class LowRank:
    """The term ``scaling · B·A`` of a weight.

    Attributes:
        a: float ``[rank, columns]``; of an embedding ``[rank, rows]``.
        b: float ``[rows, rank]``; of an embedding ``[columns, rank]``, its term is ``(B·A)ᵀ``.
    """

    a: TensorInfo
    b: TensorInfo
    scaling: float
    is_embedding: bool

    def add(self, values: Float32, start: int) -> None:
        """Add to rows of the weight, in place; ``start`` is the first of them."""
        rank, rows = self.a.shape[0], (self.a.shape[1] if self.is_embedding else self.b.shape[0])
        first, stop = start // TILE * TILE, start + len(values)
        last = min(-(-stop // TILE) * TILE, rows)
        if self.is_embedding:
            flat = replace(self.a, shape=(math.prod(self.a.shape),))
            parts = [read_range(flat, row * rows + first, last - first) for row in range(rank)]
            left = np.ascontiguousarray(np.stack(parts).T)
            right = np.ascontiguousarray(read_all(self.b).T)
        else:
            left = read_range(self.b, first, (last - first) * rank).reshape(-1, rank)
            right = read_all(self.a)

        def work(begin: int, end: int) -> None:
            for tile in range(first + begin * TILE, min(first + end * TILE, last), TILE):
                product = left[tile - first : tile - first + TILE] @ right
                product *= np.float32(self.scaling)
                top, bottom = max(tile, start), min(tile + len(product), stop)
                values[top - start : bottom - start] += product[top - tile : bottom - tile]

        least = max(PIECE // (TILE * right.shape[1]), 1)
        in_threads(work, -(-(last - first) // TILE), least)


@dataclass(frozen=True)
class BiasTerm:
    """The term ``scaling`` times the bias of B, of a bias."""

    b: TensorInfo
    scaling: float

    def add(self, values: Float32, start: int) -> None:
        """See ``LowRank.add``."""
        values += read_range(self.b, start, len(values)) * np.float32(self.scaling)


@dataclass(frozen=True)
class TokenRows:
    """Replaced rows of an embedding: those of trained tokens.

    Attributes:
        trained: float ``[tokens, columns]``.
        rows: index of each in the weight.
    """

    trained: TensorInfo
    rows: Sequence[int]

    def add(self, values: Float32, start: int) -> None:
        """See ``LowRank.add``."""
        for index, row in enumerate(self.rows):
            if start <= row < start + len(values):
                values[row - start] = read_range(self.trained, index, values.shape[1])


Term = LowRank | BiasTerm | TokenRows


def same_values(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors of one shape hold the same numbers."""
    width, rows = math.prod(one.shape[1:]), one.shape[0]
    step = max(PIECE // width, 1)
    return all(
        np.array_equal(
            read_range(one, start, min(step, rows - start) * width),
            read_range(other, start, min(step, rows - start) * width),
        )
        for start in range(0, rows, step)
    )


def read_all(info: TensorInfo) -> Float32:
    """A whole tensor as float32."""
    return read_range(info, 0, math.prod(info.shape)).reshape(info.shape)
