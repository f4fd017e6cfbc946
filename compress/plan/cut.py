"""The shape of a pruned model, computed from the config alone.

All layers keep one shape, because that is what loaders read: one ``intermediate_size``, one number
of heads. So the pruned model is an ordinary model of its family.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compress.decoder.config import DecoderConfig, split_name
from compress.decoder.families import FAMILIES
from compress.errors import GridError, UnsupportedModelError, UsageError
from compress.grids import get_grid
from compress.plan.shapes import Plan

if TYPE_CHECKING:
    from compress.recipe.model import Prune

__all__ = ["Cut", "Healing", "plan_cut", "width_step"]

STEP = 32  # channels: the smallest block of every 4-bit format
WIDEST_STEP = 256  # of the K-quants, and the widest group of ONNX and Core ML

WHAT = {"depth": "blocks", "ffn": "MLP channels", "heads": "key-value heads"}


@dataclass(frozen=True)
class Healing:
    """How long pruned blocks are trained to recover (``heal.py``): one of the two limits is set.

    Attributes:
        minutes: for all blocks together.
        steps: for each stored block.
    """

    minutes: float | None = None
    steps: int | None = None

    def describe(self) -> str:
        """``2 minutes``, ``100 steps a block``."""
        return f"{self.minutes:g} minutes" if self.steps is None else f"{self.steps} steps a block"


@dataclass(frozen=True)
class Cut:
    """A model's shape after pruning.

    Attributes:
        method: ``depth``, ``ffn`` or ``heads``.
        total: stored blocks, channels of an MLP, or key-value heads before ...
        retained: ... and after.
        config: the pruned model's, ``raw`` included.
        update: whether the retained columns of ``down_proj`` and ``o_proj`` are updated.
        healing: what follows, or None.
    """

    method: str
    total: int
    retained: int
    config: DecoderConfig
    update: bool
    healing: Healing | None = None

    @property
    def dropped(self) -> int:
        """Number of blocks, channels or heads that are removed."""
        return self.total - self.retained

    def describe(self) -> str:
        """``2 of 32 blocks``."""
        where = " in every layer" if self.method != "depth" else ""
        return f"{self.dropped} of {self.total} {WHAT[self.method]}{where}"


def plan_cut(config: DecoderConfig, prune: Prune | None, plans: Iterable[Plan] = ()) -> Cut | None:
    """The model's shape after the recipe's ``prune``; None where nothing is pruned.

    Args:
        config: the float model.
        prune: the method and one amount, ``update`` and ``heal``; None for nothing.
        plans: of the float model: its grids say which multiples of channels fit.

    Raises:
        UsageError: nothing or everything would be removed, or the width fits no format.
        UnsupportedModelError: heads of a model whose shape cannot be expressed.
    """
    if prune is None or prune.method == "none":
        return None
    method, ratio, update = prune.method, prune.ratio, prune.update
    healing = Healing(prune.heal.minutes, prune.heal.steps) if prune.heal else None
    check_cuttable(config, method)
    if method == "depth":
        total = config.num_hidden_layers // config.block_repeat
        retained = total - ((prune.blocks or 0) if ratio is None else round(ratio * total))
        check(retained, total, "depth", f"1 to {total - 1} blocks can go")
        return Cut(method, total, retained, with_layers(config, retained), update, healing)
    if method == "ffn":
        total, step = config.intermediate_size, width_step(config, plans)
        retained = (prune.width or 0) if ratio is None else step * round((1 - ratio) * total / step)
        below = (total - 1) // step * step
        check(retained, total, "ffn", f"widths are multiples of {step}, at most {below} here")
        if retained % step:
            raise UsageError(
                f"prune.width {retained} is not a multiple of {step}, which rows of this model's "
                "formats are made of",
                hint=f"{max(retained // step * step, step)} or "
                f"{min(-(-retained // step) * step, below)}",
            )
        shrunk = with_sizes(config, intermediate_size=retained)
        return Cut(method, total, retained, shrunk, update, healing)
    if config.ropes[0].kind == "longrope":
        raise UnsupportedModelError(
            "heads cannot be pruned under longrope: transformers counts its factors by hidden_size "
            "/ num_attention_heads, and would not load the checkpoint",
            hint="--prune depth:10% or ffn:10%",
        )
    total = config.num_key_value_heads
    retained = (prune.kv_heads or 0) if ratio is None else round((1 - ratio) * total)
    check(retained, total, "heads", f"1 to {total - 1} of its {total} key-value heads can stay")
    group = config.num_attention_heads // total
    shrunk = with_sizes(
        config,
        num_attention_heads=retained * group,
        num_key_value_heads=retained,
        head_dim=config.head_dim,
    )
    return Cut(method, total, retained, shrunk, update, healing)


def check_cuttable(config: DecoderConfig, method: str) -> None:
    """Refuse models whose pruned form no ``config.json`` or checkpoint of theirs expresses.

    Raises:
        UnsupportedModelError: with the reason.
    """
    family = FAMILIES[config.family]
    if family.transposed or family.by_group:
        raise UnsupportedModelError(
            f"{config.family} cannot be pruned: its checkpoints store q, k and v in one tensor of "
            "a layout that packlight reads and does not write"
        )
    if method == "depth" and len(config.kinds) > 1:
        raise UnsupportedModelError(
            f"blocks of this {config.family} model cannot be pruned: its layers differ (windows or "
            "rotation), and config.json tells them by their place",
            hint="--prune ffn:10%",
        )
    if method == "heads" and config.qk_norm == "projection":
        raise UnsupportedModelError(
            f"heads of {config.family} cannot be pruned: one norm spans all of them",
            hint="--prune depth:10% or ffn:10%",
        )
    if method == "ffn" and "intermediate_size" in family.changes({**config.raw}):
        raise UnsupportedModelError(
            f"the MLP of {config.family} cannot be pruned: its config.json has the width under a "
            "key of its own",
            hint="--prune depth:10%",
        )


def check(retained: int, total: int, method: str, range_text: str) -> None:
    """Refuse a cut that keeps nothing or everything.

    Raises:
        UsageError: either.
    """
    if not 0 < retained < total:
        raise UsageError(
            f"prune: {method} would keep {max(retained, 0)} of {total} {WHAT[method]}",
            hint=range_text,
        )


def width_step(config: DecoderConfig, plans: Iterable[Plan]) -> int:
    """The step of an MLP's width, in channels, that every planned grid of ``down_proj`` fits.

    256 where K-quants are used, else 32 or the group size; never more than the float model's own
    width is a multiple of, so that a grid that fitted before fits after.
    """
    step = STEP
    for plan in plans:
        for entry in plan.entries:
            if entry.name and split_name(entry.name)[1] == "down_proj" and len(entry.shape) == 2:
                step = max(step, row_multiple(entry.grid, entry.shape[0]))
    return math.gcd(step, config.intermediate_size)


def row_multiple(grid: str, rows: int) -> int:
    """The least power of two, from 32 to 256, whose multiples a grid takes as row lengths."""
    size = STEP
    while size < WIDEST_STEP:
        try:
            get_grid(grid).check((rows, size))
            return size
        except GridError:
            size *= 2
    return size


def with_layers(config: DecoderConfig, stored: int) -> DecoderConfig:
    """The config with ``stored`` blocks."""
    raw = {**config.raw, "num_hidden_layers": stored}
    kinds = raw.get("layer_types")  # of transformers: all of one type, mixtures are not supported
    if isinstance(kinds, list):
        raw["layer_types"] = kinds[:stored]
    count = stored * config.block_repeat
    return replace(config, num_hidden_layers=count, layers=config.layers[:count], raw=raw)


def with_sizes(config: DecoderConfig, **sizes: int) -> DecoderConfig:
    """The config with other sizes, each under its key of ``config.json``."""
    changes: dict[str, Any] = dict(sizes)
    return replace(config, **changes, raw={**config.raw, **sizes})
