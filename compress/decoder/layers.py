"""Operations of the reference decoder's blocks: rotation, masks, norms, activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from compress.decoder.config import DecoderConfig

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class RopeTable:
    """cos and sin by position, ``[positions, rotary_dim / 2]``, already scaled."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor, start: int, *, pairs: bool = False) -> Tensor:
        """Rotate the leading dimensions of ``x``, ``[heads, n, head_dim]``, from ``start`` on.

        Args:
            pairs: neighbours rotate (2i, 2i+1), else halves.
        """
        positions = slice(start, start + x.shape[1])
        cos, sin = self.cos[positions], self.sin[positions]
        half = cos.shape[1]
        if pairs:
            first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
            turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
            return torch.cat((turned.flatten(-2), x[..., 2 * half :]), dim=-1)
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        rotated = (first * cos - second * sin, second * cos + first * sin, rest)
        return torch.cat(rotated, dim=-1)


@dataclass(frozen=True)
class SwitchingTable(RopeTable):
    """The tables of ``longrope``: a text beyond ``switch`` positions rotates by other factors from
    its first token on, as in transformers."""

    long: RopeTable
    switch: int

    def rotate(self, x: Tensor, start: int, *, pairs: bool = False) -> Tensor:
        """See ``RopeTable``; ``x`` are the last positions of the text."""
        if start + x.shape[1] > self.switch:
            return self.long.rotate(x, start, pairs=pairs)
        return super().rotate(x, start, pairs=pairs)


RopeTables = Sequence[RopeTable]
"""A table for each of ``DecoderConfig.ropes``."""


def switching(config: DecoderConfig, tables: RopeTables) -> RopeTables:
    """The tables, with those of ``long_factors`` beside them (``DecoderConfig.rope_switch``)."""
    found = []
    for rope, table in zip(config.ropes, tables, strict=True):
        cos, sin = map(torch.from_numpy, rope.by_long_factors().cos_sin(len(table.cos)))
        found.append(SwitchingTable(table.cos, table.sin, RopeTable(cos, sin), config.rope_switch))
    return found


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


def visible(count: int, start: int, window: int | None) -> Tensor | None:
    """The attention mask of ``count`` queries after ``start`` cached positions.

    bool ``[count, start + count]``; None where plain causal attention from position 0, or a single
    query that attends to everything, is equivalent.
    """
    end = start + count
    windowed = window is not None and end > window
    if not windowed and (start == 0 or count == 1):
        return None
    query = torch.arange(start, end)[:, None]
    key = torch.arange(end)[None, :]
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    return mask


def capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    cap: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention whose scores pass ``cap * tanh(score / cap)`` before the mask (gemma2), or with one
    more score for each head whose probability is dropped (gpt_oss).

    Args:
        query: ``[kv heads, group, n, head_dim]``.
        cap: 0 for none.
        sinks: ``[heads]``.
    """
    count, end = query.shape[-2], key.shape[-2]
    if mask is None:
        mask = torch.ones(count, end, dtype=torch.bool).tril(end - count)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = cap * torch.tanh(scores / cap) if cap else scores
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        more = sinks.view(*scores.shape[:2], 1, 1).expand(-1, -1, count, -1)
        return torch.cat((scores, more), dim=-1).softmax(dim=-1)[..., :-1] @ value
    return scores.softmax(dim=-1) @ value


def normalize(
    config: DecoderConfig, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """A norm of the model's kind over the last dimension: RMSNorm, or LayerNorm."""
    if config.norm == "layernorm":
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def as_tensor(values: Float32) -> Tensor:
    """A float32 tensor over the same memory, or a copy where the memory is read-only."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def finished(config: DecoderConfig, logits: Tensor) -> Tensor:
    """The head's product times the model's scale, and capped."""
    if config.logit_scale != 1.0:
        logits = logits * config.logit_scale
    cap = config.logit_cap
    return cap * torch.tanh(logits / cap) if cap else logits
