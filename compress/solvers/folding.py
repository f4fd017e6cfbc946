"""Exact changes of weights that leave the model's function as it is: scales and permutations of the
channels between what makes an input and what multiplies it.

A channel that is divided by ``s`` where it is made, and whose column is multiplied by ``s`` where
it is used, changes no output in exact arithmetic; but the weights that are rounded are others. Such
scales are AWQ's (Lin et al., arXiv 2306.00978). Where they are possible without an operation that
the model does not have:

    made by                        used by                      scale  order
    input_layernorm                q, k, v (parallel: up too)   yes    no: it is the residual's
    post_attention_layernorm       gate, up                     yes    no
    norm                           lm_head, unless it is tied   yes    no
    v_proj                         o_proj                       yes    within a head
    up_proj (gate_proj: order)     down_proj                    yes    yes
    up_proj, without a gate        down_proj                    no     yes

A key-value head serves several query heads, whose columns in ``o_proj`` therefore share its scales
and its order. Without a gate an activation that is not homogeneous (GELU) sits between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from compress.calibration.statistics import (
    LayerStats,
    Statistics,
    input_names,
    input_of,
    input_roles,
)
from compress.checkpoint.sources import Around, Source
from compress.decoder.config import FUSED, DecoderConfig, Float32, split_name

__all__ = ["Fold", "Folded", "columns_of", "fold_statistics", "fold_stats"]

Order = NDArray[np.int64]


@dataclass(frozen=True)
class Fold:
    """What happens to the channels of one input: they are scaled, then put into another order.

    Attributes:
        scale: float32 ``[channels]``, positive: channel ``c`` is divided by ``scale[c]`` where it
            is made and multiplied by it where it is used. None: by 1.
        order: int64 ``[channels]``: channel ``j`` is what ``order[j]`` was. None: as they were.

    Channels are the rows of what makes the input: for ``o_proj`` those of ``v_proj``.
    """

    scale: Float32 | None = None
    order: Order | None = None


class Folded(Around):
    """A source whose weights are those of another, folded; computed when they are read.

    Args:
        source: the weights.
        folds: by input name (``compress.calibration.statistics.input_names``); a block that is stored once and
            runs several times has one fold.

    Raises:
        ValueError: a fold that would change the function, or is of another width than its input.
    """

    def __init__(self, source: Source, folds: Mapping[str, Fold]) -> None:
        for key, fold in folds.items():
            check(source.config, key, fold)
        super().__init__(source, source.config)  # a fold changes no shape
        self.folds = dict(folds)
        self._uses = uses(source.config)

    def read(self, name: str, rows: slice | None = None) -> Float32:
        """See ``compress.checkpoint.sources.Source``."""
        made = self._rows(name)
        if made is None:
            weight = self.source.read(name, rows)
        else:
            order, divisor = made
            wanted = order[rows or slice(None)]
            if not len(wanted):
                return self.source.read(name, slice(0, 0))
            first, last = int(wanted.min()), int(wanted.max()) + 1
            weight = self.source.read(name, slice(first, last))[wanted - first]
            divisor = divisor[wanted]
            weight /= divisor if weight.ndim == 1 else divisor[:, None]
        key = input_of(self.config, name)
        if key not in self.folds:
            return weight
        scale, columns = columns_of(self.config, key, self.folds[key])
        if scale is not None:
            weight = weight * scale
        return weight if columns is None else weight[:, columns]

    def fingerprint(self) -> str:
        """See ``compress.checkpoint.sources.Source``."""
        digest = hashlib.sha256(self.source.fingerprint().encode())
        for key, fold in sorted(self.folds.items()):
            digest.update(key.encode())
            for values in (fold.scale, fold.order):
                digest.update(b"-" if values is None else values.tobytes())
        return digest.hexdigest()

    def _rows(self, name: str) -> tuple[Order, Float32] | None:
        """The source's rows in their order, and what each row of the source is divided by.

        None where no fold touches the rows.
        """
        block, role, _ = split_name(name)
        found = [self._fold_after(block, member) for member in FUSED.get(role, (role,))]
        if found == [None] * len(found):
            return None
        orders, divisors, start = [], [], 0
        for member, fold in zip(FUSED.get(role, (role,)), found, strict=True):
            count = self.config.weight_shape(member)[0]
            # The gate goes through the activation: it follows the order, not the scale.
            scale = fold.scale if fold and member != "gate_proj" else None
            order = fold.order if fold else None
            divisors.append(np.ones(count, np.float32) if scale is None else scale)
            orders.append(start + (np.arange(count) if order is None else order))
            start += count
        return np.concatenate(orders), np.concatenate(divisors)

    def _fold_after(self, block: int | None, role: str) -> Fold | None:
        """The fold of what a weight makes."""
        if role not in self._uses:
            return None
        use = self._uses[role]
        if block is None:
            return self.folds.get(use)
        return self.folds.get(f"blocks.{block - block % self.config.block_repeat}.{use}")


def uses(config: DecoderConfig) -> dict[str, str]:
    """Role of a weight → the role by which the input that it makes goes."""
    made = {"input_layernorm": "q_proj", "v_proj": "o_proj", "up_proj": "down_proj"}
    if config.gated_mlp:
        made["gate_proj"] = "down_proj"
    if not config.parallel_residual:
        made["post_attention_layernorm"] = input_roles(config)["up_proj"]
    if not config.tie_word_embeddings:
        made["norm"] = "lm_head"
    return made


def channels_of(config: DecoderConfig, key: str) -> int:
    """Channels of an input that can be folded apart."""
    role = key.rpartition(".")[2]
    if role == "o_proj":
        return config.weight_shape("v_proj")[0]
    return config.weight_shape(role)[1]


def check(config: DecoderConfig, key: str, fold: Fold) -> None:
    """Refuse what would change the function.

    Raises:
        ValueError: see ``Folded``.
    """
    role = key.rpartition(".")[2]
    if key not in input_names(config) or role not in uses(config).values():
        raise ValueError(f"{key}: nothing can be folded there")
    count = channels_of(config, key)
    if fold.scale is not None:
        if role == "down_proj" and not config.gated_mlp:
            raise ValueError(f"{key}: an activation sits between, no scale passes")
        if fold.scale.shape != (count,) or fold.scale.dtype != np.float32:
            raise ValueError(f"{key}: a scale is float32 [{count}]")
        if not (np.isfinite(fold.scale).all() and (fold.scale > 0).all()):
            raise ValueError(f"{key}: scales are finite and above 0")
    if fold.order is not None:
        if role not in ("o_proj", "down_proj"):
            raise ValueError(f"{key}: the order of the residual's channels is everybody's")
        span = config.head_dim if role == "o_proj" else count
        if not (
            fold.order.shape == (count,)
            and (np.sort(fold.order.reshape(-1, span), axis=1).ravel() == np.arange(count)).all()
        ):
            raise ValueError(f"{key}: not a permutation of {count} channels in spans of {span}")


def columns_of(config: DecoderConfig, key: str, fold: Fold) -> tuple[Float32 | None, Order | None]:
    """A fold's scale and order over the columns of the weights that multiply the input.

    Returns:
        float32 and int64 ``[columns]``; the scale is in the source's order.
    """
    if key.rpartition(".")[2] != "o_proj":
        return fold.scale, fold.order
    heads, kv, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    scale, order = fold.scale, fold.order
    if scale is not None:
        scale = scale.reshape(kv, size).repeat(heads // kv, axis=0).reshape(-1)
    if order is not None:
        within = order.reshape(kv, size) - size * np.arange(kv)[:, None]
        order = within.repeat(heads // kv, axis=0) + size * np.arange(heads)[:, None]
        order = order.reshape(-1)
    return scale, order


# --- what the inputs then look like ------------------------------------------------------------


def fold_statistics(
    config: DecoderConfig, statistics: Statistics, folds: Mapping[str, Fold]
) -> Statistics:
    """Statistics of the folded model, from those of the model: no second walk.

    Raises (when they are read):
        ValueError: an order that crosses the diagonal blocks of a split Hessian.
    """

    def load(key: str) -> LayerStats | None:
        stats = statistics.load(key)
        if stats is None or key not in folds:
            return stats
        return fold_stats(stats, *columns_of(config, key, folds[key]))

    return Statistics(config, load)


def fold_stats(stats: LayerStats, scale: Float32 | None, order: Order | None) -> LayerStats:
    """Statistics of ``(x / scale)[order]`` from those of ``x``.

    Args:
        stats: of ``x``.
        scale: float32 ``[columns]``, or None for 1.
        order: int64 ``[columns]``, or None for the order as it is.

    Raises:
        ValueError: the order crosses the diagonal blocks of a split Hessian.
    """
    columns = len(stats.importance)
    order = np.arange(columns) if order is None else order
    divisor = (np.ones(columns, np.float32) if scale is None else scale)[order]
    blocks, start = [], 0
    for block in stats.hessian or ():
        span = slice(start, start + len(block))
        within = order[span] - start
        if within.min() < 0 or within.max() >= len(block):
            raise ValueError("the order crosses the blocks of a split Hessian")
        inverse = 1 / divisor[span]
        moved = block[np.ix_(within, within)]  # then in place: these are large
        moved *= inverse
        moved *= inverse[:, None]
        blocks.append(moved)
        start = span.stop
    return replace(
        stats,
        importance=stats.importance[order] / (divisor * divisor),
        mean=None if stats.mean is None else stats.mean[order] / divisor,
        hessian=tuple(blocks) or None,
        held_back=None if stats.held_back is None else stats.held_back[:, order] / divisor,
    )
