"""The calibration walk through a mixture of experts: statistics of the tokens that each expert is
sent, one expert at a time.

In memory are the attention half of a block, one matrix of one expert, the Hessians of its two
inputs, and the hidden states; larger activations are in memory-mapped files.

An expert that sees fewer than ``floor_of`` tokens has no Hessian, so that ``gptq`` leaves its
weights to ``scale_search``; and the importance of its inputs is mixed with that of all tokens of
the block (``gate_proj``, ``up_proj``), or with equal importance (``down_proj``, whose inputs are
the expert's own), by its share of the floor. One that sees none is rounded to nearest there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch

from compress.calibration.statistics import LayerStats, Statistics
from compress.decoder.config import DecoderConfig, Float32
from compress.decoder.experts import ExpertBlock, in_parts
from compress.decoder.layers import RopeTables

if TYPE_CHECKING:
    from torch import Tensor

    from compress.calibration.walk import Listener

LEAST = 128  # tokens of an expert, or ...
COLUMNS = 8  # ... one for so many columns of its wider input, for a Hessian
IN_MEMORY = 1 << 26  # bytes of an expert's activations: 64 MiB


def floor_of(config: DecoderConfig) -> int:
    """Tokens that an expert must see to have statistics of its own only."""
    assert config.experts is not None
    return max(LEAST, max(config.experts.width, config.hidden_size) // COLUMNS)


def experts_walk(
    config: DecoderConfig,
    index: int,
    read: Callable[[str], Float32],
    states: Tensor,
    rope: RopeTables,
    listener: Listener,
    *,
    hessian: bool,
    work: Path | None,
    progress: Callable[[float], None],
) -> Iterator[dict[str, LayerStats]]:
    """Run the hidden states of all windows through block ``index``, in place.

    Args:
        config, read, hessian, work: as ``compress.calibration.walk.walk``.
        states: ``[windows, length, hidden]``.
        rope: tables for ``length`` positions.
        listener: records the inputs of the linears outside the experts, and of experts.
        progress: called with the finished share of the block.

    Yields the statistics of the inputs outside the experts, then those of each expert.
    """
    assert config.experts is not None
    empty = partial(empty_activations, work=work)
    block = ExpertBlock(config, index, read, empty=lambda *shape: empty(shape, name="inner.bin"))
    count, length, hidden = states.shape
    flat = states.view(-1, hidden)
    mixed = empty(tuple(flat.shape), name="mixed.bin")
    chosen = torch.empty(len(flat), config.experts.chosen, dtype=torch.int64)
    weights = torch.empty(len(flat), config.experts.chosen)
    squares = torch.zeros(hidden, dtype=torch.float64)
    for position in range(count):
        record = partial(listener.record, position=position)
        window = slice(position * length, (position + 1) * length)
        flat[window] = block.attended(flat[window].float(), rope, None, record)[0]
        normed = block.normed(flat[window].float())
        chosen[window], weights[window] = block.route(normed)
        mixed[window] = block.shared(normed, record)
        squares += (normed * normed).sum(0)
    yield listener.finish()
    prior = (squares / len(flat)).float().numpy()

    def take(rows: Tensor) -> Tensor:
        return block.normed(flat[rows].float())

    for expert in range(config.experts.count):
        rows, place = torch.where(chosen == expert)
        factors = torch.zeros(len(flat), 1)
        factors[rows, 0] = weights[rows, place]
        held = rows // length % listener.every == listener.every - 1
        free = rows[~held]
        parts = [*in_parts(free), *in_parts(rows[held])]
        last = len(in_parts(free))  # the first part that is held back
        enough = len(free) >= floor_of(config)
        listener.hessian = hessian and enough

        def on_input(name: str, x: Tensor, part: int, last: int = last) -> None:
            listener.record(name, x, listener.every - 1 if part >= last else 0)

        if parts:
            for part, output in block.expert(expert, take, parts, on_input):
                mixed.index_add_(0, part, output.mul_(factors[part]))
        found = listener.finish()
        listener.hessian = hessian
        yield found if enough else shared_out(config, index, expert, found, prior)
        del found  # its Hessians, before those of the next expert
        progress((expert + 1) / config.experts.count)
    for start in range(0, len(flat), length):
        window = slice(start, start + length)
        flat[window] = flat[window].float() + mixed[window] * config.residual_scale


def shared_out(
    config: DecoderConfig,
    index: int,
    expert: int,
    found: dict[str, LayerStats],
    prior: Float32,
) -> dict[str, LayerStats]:
    """The statistics of an expert that saw too few tokens; see the module.

    Args:
        found: its own, empty where it saw none.
        prior: mean squares of the block's input of the experts, over all tokens.
    """
    assert config.experts is not None
    stem, made = f"blocks.{index}.experts.{expert}.", {}
    for role in ("gate_proj", "down_proj"):
        own = found.get(f"{stem}{role}")
        count = own.count if own else 0
        seen = (
            own.importance
            if own
            else np.zeros(config.weight_shape(f"experts.{expert}.{role}")[1], np.float32)
        )
        other = prior if role == "gate_proj" else np.full_like(seen, seen.mean())
        share = np.float32(min(count / floor_of(config), 1.0))
        made[f"{stem}{role}"] = LayerStats(count, share * seen + (1 - share) * other)
    return made


def empty_activations(shape: Sequence[int], *, work: Path | None, name: str) -> Tensor:
    """An uninitialized float32 tensor, in a mapped file when large."""
    size = math.prod(shape)
    if work is None or 4 * size <= IN_MEMORY:
        return torch.empty(tuple(shape))
    return torch.from_file(str(work / name), shared=True, size=size).view(tuple(shape))


def describe_experts(config: DecoderConfig, statistics: Statistics) -> str:
    """A line of the report: how many tokens the experts saw."""
    assert config.experts is not None
    seen = []
    for block in range(config.num_hidden_layers):
        for expert in range(config.experts.count):
            key = f"blocks.{block}.experts.{expert}.gate_proj"
            seen.append(statistics.count(key))
    floor = floor_of(config)
    few = sum(count < floor for count in seen)
    middle = f"median {median(seen):,.0f}"
    line = f"Calibration tokens of an expert: {min(seen):,} to {max(seen):,}, {middle}"
    if few:
        line += (
            f"; {few} of {len(seen)} saw fewer than {floor:,}: codes of scale_search, with an "
            "importance mixed with that of all tokens, or rounded to nearest where they saw none; "
            "more calibration.tokens help"
        )
    return line
