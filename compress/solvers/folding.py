"""Folds per-channel scales into the weights around an input; the model's function stays the same.

A channel that is divided by ``s`` in the weights that produce it, and multiplied by ``s`` in the
columns that use it, changes no output in exact arithmetic, but changes the rounding of the weights
(AWQ, Lin et al., arXiv 2306.00978). Where that needs no operation that the model does not have:

    produced by                    used by
    input_layernorm                q, k, v (parallel with one norm: up too)
    post_attention_layernorm       gate, up
    norm                           lm_head, unless it is tied
    v_proj                         o_proj
    up_proj, beside a gate         down_proj

A key-value head serves several query heads, whose columns in ``o_proj`` therefore share its scales.
Without a gate there is an activation between them that is not homogeneous (GELU).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from compress.calibration.statistics import LayerStats, Statistics, input_names, input_of
from compress.checkpoint.sources import Change, Source
from compress.decoder.config import FUSED, DecoderConfig, Float32, input_roles, split_name

__all__ = ["Folded", "Folds", "columns_of", "fold_statistics", "foldable"]

Folds = Mapping[str, Float32]
"""Input name (``compress.calibration.statistics.input_names``) → float32 ``[channels]``, positive:
channel ``c`` is divided by ``scale[c]`` where it is produced and multiplied by it where it is used.
Channels are the rows of the weight that produces the input: for ``o_proj`` those of ``v_proj``.
"""


class Folded(Change):
    """A source that folds scales into another source's weights when they are read.

    Args:
        source: the weights.
        folds: a block that is stored once and runs several times has one scale.

    Raises:
        ValueError: a scale that would change the function, or is of another width than its input.
    """

    def __init__(self, source: Source, folds: Folds) -> None:
        for key, scale in folds.items():
            check(source.config, key, scale)
        digest = hashlib.sha256()
        for key, scale in sorted(folds.items()):
            digest.update(key.encode())
            digest.update(scale.tobytes())
        super().__init__(source, source.config, f"folds {digest.hexdigest()}")
        self.folds = dict(folds)
        self._uses = uses(source.config)

    def read(self, name: str, rows: slice | None = None) -> Float32:
        """See ``Source.read``."""
        weight = self.source.read(name, rows)
        divisor = self._divisor(name)
        if divisor is not None:
            divisor = divisor[rows or slice(None)]
            weight = weight / (divisor if weight.ndim == 1 else divisor[:, None])
        key = input_of(self.config, name)
        if key in self.folds:
            weight = weight * columns_of(self.config, key, self.folds[key])
        return weight

    def _divisor(self, name: str) -> Float32 | None:
        """The divisor of each row of a weight, float32 ``[rows]``; None where all are 1."""
        block, role, _ = split_name(name)
        members = FUSED.get(role, (role,))
        scales = [self._scale_after(block, member) for member in members]
        if all(scale is None for scale in scales):
            return None
        parts = [
            np.ones(self.config.weight_shape(member)[0], np.float32) if scale is None else scale
            for member, scale in zip(members, scales, strict=True)
        ]
        return np.concatenate(parts)

    def _scale_after(self, block: int | None, role: str) -> Float32 | None:
        """The scale of the channels that a weight produces."""
        if role not in self._uses:
            return None
        use = self._uses[role]
        if block is None:
            return self.folds.get(use)
        return self.folds.get(f"blocks.{block - block % self.config.block_repeat}.{use}")


def uses(config: DecoderConfig) -> dict[str, str]:
    """Role of a weight → role that names the input which it produces."""
    made = {"v_proj": "o_proj"}
    if config.gated_mlp:  # the gate goes through the activation
        made["up_proj"] = "down_proj"
    for norm, role in (("input_layernorm", "q_proj"), ("post_attention_layernorm", "up_proj")):
        if norm in config.norms:
            made[norm] = input_roles(config)[role]
    if not config.tie_word_embeddings:
        made["norm"] = "lm_head"
    return made


def foldable(config: DecoderConfig, key: str) -> bool:
    """Whether an input can be folded."""
    return key in input_names(config) and key.rpartition(".")[2] in uses(config).values()


def channels_of(config: DecoderConfig, key: str) -> int:
    """The number of channels of an input that can have scales of their own."""
    role = key.rpartition(".")[2]
    if role == "o_proj":
        return config.weight_shape("v_proj")[0]
    return config.weight_shape(role)[1]


def check(config: DecoderConfig, key: str, scale: Float32) -> None:
    """Refuse a scale that would change the model's function.

    Raises:
        ValueError: see ``Folded``.
    """
    if not foldable(config, key):
        raise ValueError(f"{key}: nothing can be folded there")
    count = channels_of(config, key)
    if scale.shape != (count,) or scale.dtype != np.float32:
        raise ValueError(f"{key}: a scale is float32 [{count}]")
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"{key}: scales are finite and above 0")


def columns_of(config: DecoderConfig, key: str, scale: Float32) -> Float32:
    """A scale expanded to the columns of the weights that multiply the input, float32
    ``[columns]``."""
    if key.rpartition(".")[2] != "o_proj":
        return scale
    heads, kv, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return scale.reshape(kv, size).repeat(heads // kv, axis=0).reshape(-1)


# --- statistics of the folded inputs -----------------------------------------------------------


def fold_statistics(config: DecoderConfig, statistics: Statistics, folds: Folds) -> Statistics:
    """Statistics of the folded model, computed from the model's without a second walk."""

    def load(key: str) -> LayerStats | None:
        stats = statistics.load(key)
        if stats is None or key not in folds:
            return stats
        return fold_stats(stats, columns_of(config, key, folds[key]))

    return Statistics(config, load)


def fold_stats(stats: LayerStats, scale: Float32) -> LayerStats:
    """Statistics of ``x / scale`` from those of ``x``.

    Args:
        stats: of ``x``.
        scale: float32 ``[columns]``.
    """
    blocks, start = [], 0
    for block in stats.hessian or ():
        inverse = np.float32(1) / scale[start : start + len(block)]
        scaled = block * inverse
        scaled *= inverse[:, None]  # in place: these are large
        blocks.append(scaled)
        start += len(block)
    return replace(
        stats,
        importance=stats.importance / (scale * scale),
        mean=None if stats.mean is None else stats.mean / scale,
        hessian=tuple(blocks) or None,
        held_back=None if stats.held_back is None else stats.held_back / scale,
    )
