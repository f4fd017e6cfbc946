"""The KV cache of a block of the reference decoder."""

from __future__ import annotations

import torch
from torch import Tensor


class Past:
    """Keys and values of one block, ``[kv heads, positions, head_dim]`` each; grows by doubling."""

    def __init__(self) -> None:
        self.length = 0
        self._keys = self._values = torch.empty(0, 0, 0)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add positions, ``[heads, n, size]``, of sizes that may differ; returns views of all."""
        heads, count, _ = keys.shape
        end = self.length + count
        if end > self._keys.shape[1]:
            room = max(64, 2 * end)
            grown = [torch.empty(heads, room, one.shape[2]) for one in (keys, values)]
            if self.length:
                grown[0][:, : self.length] = self._keys[:, : self.length]
                grown[1][:, : self.length] = self._values[:, : self.length]
            self._keys, self._values = grown
        self._keys[:, self.length : end] = keys
        self._values[:, self.length : end] = values
        self.length = end
        return self._keys[:, :end], self._values[:, :end]

    def cut(self, length: int) -> None:
        """Keep the first ``length`` positions."""
        self.length = min(self.length, length)
