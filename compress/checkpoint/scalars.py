"""Folds a model's scalars into its weights, for targets whose graphs have no place for them.

    scalar      folded into
    attention   q: its rows and bias, or its norm
    residual    o_proj and down_proj with biases, or the norms of the branches' outputs
    embedding   the stream is divided by it: the same weights as residual, and the epsilon of the
                stream's norms (which keeps gemma's stream inside float16)
    logits      the final norm
    pairs       rows of q and k: rotation of neighbours becomes that of halves
    unit        q and k norms without a weight get a weight of ones
    bias        q, k and v without a bias get one of zeros

The inputs of linears stay what they are, except the head's, which are multiplied by ``logits``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np

from compress.checkpoint.sources import Change, Source
from compress.decoder.config import FUSED, DecoderConfig, Float32, split_name

__all__ = ["ScalarsFolded", "folded_config"]


def folded_config(config: DecoderConfig, scalars: Collection[str]) -> DecoderConfig:
    """The config of the weights with these scalars folded."""
    changes: dict[str, Any] = {"scalars": config.scalars - set(scalars)}
    if "attention" in scalars:
        changes["attention_scale"] = None
    if "residual" in scalars:
        changes["residual_scale"] = 1.0
    if "embedding" in scalars:
        changes["embed_scale"] = 1.0
        changes["norm_eps"] = config.norm_eps / config.embed_scale**2
    if "logits" in scalars:
        changes["logit_scale"] = 1.0
    if "pairs" in scalars:
        changes["rope_pairs"] = False
    if "bias" in scalars:
        changes["qkv_bias"] = True
    if "unit" in scalars:
        changes["qk_norm"] = "head"
    return replace(config, **changes)


class ScalarsFolded(Change):
    """A source with some scalars folded into the weights as they are read.

    Args:
        source: of the stored weights.
        scalars: names of the table above.
    """

    def __init__(self, source: Source, scalars: Collection[str]) -> None:
        config = folded_config(source.config, scalars)
        super().__init__(source, config, f"scalars {sorted(scalars)}")
        self.threadsafe = source.threadsafe
        self._scalars = frozenset(scalars)

    def read(self, name: str, rows: slice | None = None) -> Float32:
        """See ``Source.read``."""
        block, role, kind = split_name(name)
        if role == "qkv_proj":
            return self._fused(block, role, kind, rows)
        raw = self.source.config
        if role in ("q_norm", "k_norm") and "unit" in self._scalars:
            values = np.ones(raw.head_dim, np.float32)[rows or slice(None)]
        elif kind == "bias" and "bias" in self._scalars and role in ("q_proj", "k_proj", "v_proj"):
            values = np.zeros(raw.weight_shape(role)[0], np.float32)[rows or slice(None)]
        elif role in ("q_proj", "k_proj") and "pairs" in self._scalars:
            values = self._apart(name, rows)
        else:
            values = self.source.read(name, rows)
        factor = self._factor(role)
        return values if factor == 1.0 else values * np.float32(factor)

    def _fused(self, block: int | None, role: str, kind: str, rows: slice | None) -> Float32:
        """Rows of the members of a fused weight, one after the other."""
        sizes = [self.config.weight_shape(member)[0] for member in FUSED[role]]
        start, stop, _ = (rows or slice(None)).indices(sum(sizes))
        pieces, first = [], 0
        for member, size in zip(FUSED[role], sizes, strict=True):
            window = slice(max(start - first, 0), min(stop - first, size))
            if window.start < window.stop:
                pieces.append(self.read(f"blocks.{block}.{member}.{kind}", window))
            first += size
        return np.concatenate(pieces)

    def _apart(self, name: str, rows: slice | None) -> Float32:
        """Rows of q or k (or its bias) with the even ones of each head before the odd ones."""
        config = self.source.config
        size, rotary = config.head_dim, config.ropes[0].rotary_dim
        _, role, _ = split_name(name)
        start, stop, _ = (rows or slice(None)).indices(config.weight_shape(role)[0])
        first, last = start // size * size, -(-stop // size) * size
        values = self.source.read(name, slice(first, last))
        order = np.concatenate(
            (np.arange(0, rotary, 2), np.arange(1, rotary, 2), np.arange(rotary, size))
        )
        heads = values.reshape(-1, size, *values.shape[1:])[:, order]
        found: Float32 = heads.reshape(values.shape)[start - first : stop - first]
        return found

    def _factor(self, role: str) -> float:
        """The factor of a weight and of its bias."""
        raw, scalars = self.source.config, self._scalars
        factor = 1.0
        _, _, role = role.rpartition(".")  # of each expert
        scaled = "q_norm" if self.config.qk_norm else "q_proj"
        if role == scaled and "attention" in scalars and raw.attention_scale is not None:
            factor *= raw.attention_scale * raw.head_dim**0.5
        if role == "norm" and "logits" in scalars:
            factor *= raw.logit_scale
        for last, norm in (("o_proj", "attention_post_norm"), ("down_proj", "mlp_post_norm")):
            if role == (norm if norm in raw.norms else last):
                if "residual" in scalars:
                    factor *= raw.residual_scale
                if "embedding" in scalars:
                    factor /= raw.embed_scale
        if role == "embed_positions" and "embedding" in scalars:
            factor /= raw.embed_scale
        return factor
