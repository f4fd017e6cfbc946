"""Will it fit, and how fast can it be: arithmetic only, nothing is loaded.

Memory of a running model is three numbers that are added up here and never mixed: weights, KV
cache at a context, and an allowance for activations. The bound on tokens per second is memory
bandwidth ÷ bytes read per token: a decoder cannot answer faster than it can read its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from compress.arch import DecoderConfig
from compress.console import parse_bytes
from compress.errors import UsageError
from compress.model import PlanEntry

# Tokens that go through the model at once while the prompt is read.
PREFILL = 512
# What llama.cpp's graph allocator takes for a prompt chunk, fitted to its own figures for six
# decoder shapes (benchmarks/activations.py): bytes per token and value of each kind.
FIXED_BYTES = 64_000_000  # runtime, tokenizer, graph: measured with the smallest model


@dataclass(frozen=True)
class Footprint:
    """Bytes while running.

    Attributes:
        weights: packed weights, all resident.
        kv_cache: keys and values at ``context``.
        activations: allowance for a prompt chunk and the runtime itself.
        read_per_token: weights (one row of the embedding, not all) and KV cache that one
            generated token reads at ``context``.
        context: positions.
    """

    weights: int
    kv_cache: int
    activations: int
    read_per_token: int
    context: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations


def activation_bytes(config: DecoderConfig, tokens: int = PREFILL) -> int:
    """Allowance for activations while ``tokens`` positions are computed at once.

    float32 values alive together in one block (residual, normed input, q/k/v or gate and up) and
    the logits of one position; held against llama.cpp's measured compute buffers.
    """
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    widest = max(2 * config.intermediate_size, heads + config.hidden_size)
    per_token = 4 * (2 * config.hidden_size + widest)
    return FIXED_BYTES + tokens * per_token + 4 * config.vocab_size


def footprint(
    config: DecoderConfig,
    weights_bytes: int,
    embedding_bytes: int,
    context: int,
    bytes_per_kv_value: int = 2,
) -> Footprint:
    """The three numbers, and what one token reads.

    Args:
        config: the model.
        weights_bytes: of the artifact.
        embedding_bytes: of ``embed_tokens`` among them when it is not the head too, else 0.
        context: positions in the cache.
        bytes_per_kv_value: 2 for float16 caches.
    """
    cache = context * config.kv_cache_bytes_per_token(bytes_per_kv_value)
    return Footprint(
        weights=weights_bytes,
        kv_cache=cache,
        activations=activation_bytes(config, min(PREFILL, context)),
        read_per_token=weights_bytes - embedding_bytes + cache,
        context=context,
    )


def embedding_bytes(config: DecoderConfig, entries: Sequence[PlanEntry]) -> int:
    """Bytes of the embedding table that decoding does not read whole: 0 when it is the head."""
    if config.tie_word_embeddings:
        return 0
    return sum(entry.nbytes for entry in entries if entry.name == "embed_tokens.weight")


@dataclass(frozen=True)
class Device:
    """One row of ``devices.yaml``; bytes and bytes per second."""

    name: str
    label: str
    chip: str
    memory: int
    app_limit: int
    entitled: int
    bandwidth: int
    estimated: tuple[str, ...]


def devices() -> dict[str, Device]:
    """The table of devices, from package data."""
    import yaml

    rows: Mapping[str, Mapping[str, Any]] = yaml.safe_load(
        (files("compress") / "devices.yaml").read_text(encoding="utf-8")
    )
    return {
        name: Device(
            name=name,
            label=row["label"],
            chip=row["chip"],
            memory=parse_bytes(row["memory"]),
            app_limit=parse_bytes(row["app_limit"]),
            entitled=parse_bytes(row["entitled"]),
            bandwidth=parse_bytes(row["bandwidth"]),
            estimated=tuple(row.get("estimated", ())),
        )
        for name, row in rows.items()
    }


def get_device(name: str) -> Device:
    """A device by name.

    Raises:
        UsageError: not in the table.
    """
    import difflib

    table = devices()
    if name not in table:
        near = difflib.get_close_matches(name, table, 1)
        hint = f"did you mean {near[0]}?" if near else f"one of: {', '.join(table)}"
        raise UsageError(f"unknown device {name!r}", hint=hint)
    return table[name]


def judge(need: Footprint, device: Device) -> str:
    """``fits``, ``with entitlement`` (increased-memory-limit) or ``too large``."""
    if need.total <= device.app_limit:
        return "fits"
    return "with entitlement" if need.total <= device.entitled else "too large"


def tokens_per_second(need: Footprint, device: Device) -> float:
    """Upper bound on decode speed at the context: bandwidth ÷ bytes read per token."""
    return device.bandwidth / need.read_per_token


def largest_context(config: DecoderConfig, need: Footprint, memory: int) -> int:
    """Positions whose KV cache still fits in ``memory`` bytes beside weights and activations."""
    room = memory - need.weights - need.activations
    per_token = max(need.kv_cache // max(need.context, 1), 1)
    return max(0, min(room // per_token, config.max_context))
