"""Memory of a running model and an upper bound on decode speed, computed from the config.

Memory is the sum of three numbers: weights, KV cache at a context, and an allowance for
activations. The bound on tokens per second is memory bandwidth ÷ bytes read per token: each token
needs all weights to be read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

from compress.decoder.config import DecoderConfig
from compress.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from compress.plan.shapes import PlanEntry

# Of memory bandwidth that decoding reaches, and seconds of a step beside reading, at least and at
# most: an iPhone 17 Pro took 5.5 to 8.9 ms for 0.6 billion parameters, of which its bandwidth
# explains 4.4, and 33.8 for 3.8 billion (27), by github.com/john-rocky/apple-silicon-llm-bench.
EFFICIENCY = 0.85
STEP_SECONDS = (0.001, 0.004)

LIMITS = ("app_limit", "entitled")

Verdict = Literal["fits", "with entitlement", "too large"]

# Prompt tokens that are computed at a time: llama.cpp's n_ubatch.
PREFILL = 512

# Measured with llama.cpp (benchmarks/activations.md) as memory above that of the process before it
# loaded the model: an app has no Python, and its own memory is unknown.
RUNTIME_BYTES = 4_000_000  # graphs, tables of tensors, scratch of threads: 2 MB for six blocks
# Tokenizer, per token: 170 for its text and type, 220 to 300 more for each merge. Llama 3, with 2.2
# merges per token, sets the figure; a vocabulary without merges takes a third of it.
TOKEN_BYTES = 600


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory of a running model.

    Attributes:
        weights: packed weights, all resident.
        kv_cache: keys and values at ``context``, and the states of layers that do not grow.
        activations: allowance for a prompt chunk and the runtime itself.
        read_per_token: weights (one row of the embedding, not all) and KV cache that one
            generated token reads at ``context``.
        context: positions.
        prompt_call: see ``activation_bytes``.
        outside: weights do not count as memory of the app: the system holds them elsewhere.
        fixed: bytes of ``kv_cache`` that do not depend on the context.
    """

    weights: int
    kv_cache: int
    activations: int
    read_per_token: int
    context: int
    prompt_call: int = 0
    outside: bool = False
    fixed: int = 0

    @property
    def total(self) -> int:
        """Bytes of the app's memory."""
        return (0 if self.outside else self.weights) + self.kv_cache + self.activations


def activation_bytes(
    config: DecoderConfig, context: int, chunk: int = PREFILL, *, prompt_call: int = 0
) -> int:
    """Allowance for the runtime: tokenizer, logits of one position, and the buffer of a chunk.

    Against the peaks measured in llama.cpp for eight models from 6 million to 8 billion weights
    (benchmarks/activations.md) it is 2 to 42 % too high, and by 40 MB at most: mostly the tokenizer
    of models with fewer merges than Llama 3, and pages of the buffer that are never touched. It
    does not include the logits of a whole chunk: an app needs the last position only
    (``n_outputs_max = 1``).

    Args:
        config: the model.
        context: positions in the cache.
        chunk: prompt tokens that are computed at a time.
        prompt_call: instead, so many ids of a prompt are given in one call (``prompt_bytes``).
    """
    fixed = RUNTIME_BYTES + config.vocab_size * (TOKEN_BYTES + 4)
    if prompt_call:
        return fixed + prompt_bytes(config, min(prompt_call, context), context)
    return fixed + chunk_bytes(config, min(chunk, context), context)


def chunk_bytes(config: DecoderConfig, tokens: int, context: int) -> int:
    """llama.cpp's compute buffer for ``tokens`` positions, in bytes, to 1 %.

    The float32 values that are live at once at the widest point, the MLP. Gated: gate, up and their
    product at its width, and five of the hidden size; not gated: one, in place, and six. It is
    reused for every block. Also the attention mask in float16, one row per token; flash attention,
    llama.cpp's default, never stores the scores. Attention would be the widest point with an MLP
    under 1.4 times the hidden size, which no family has.
    """
    wide, narrow = (3, 5) if config.gated_mlp else (1, 6)
    values = wide * config.intermediate_size + narrow * config.hidden_size
    if config.experts is not None:  # a row for each chosen expert
        chosen, width = config.experts.chosen, config.experts.width
        values = chosen * (wide * width + config.hidden_size) + narrow * config.hidden_size
    return tokens * (4 * values + 2 * context)


def prompt_bytes(config: DecoderConfig, tokens: int, context: int) -> int:
    """Buffers of Core ML or Core AI for ``tokens`` ids in one call; estimated, not measured.

    In float16: the values of ``chunk_bytes``, the logits of every position, which the program
    returns, and the mask, once for each of the query heads that share a key-value head. Attention
    scores are not among them: a fused kernel does not store them.
    """
    wide, narrow = (3, 5) if config.gated_mlp else (1, 6)
    values = wide * config.intermediate_size + narrow * config.hidden_size
    group = config.num_attention_heads // config.num_key_value_heads
    return 2 * tokens * (values + group * context + config.vocab_size)


def footprint(
    config: DecoderConfig,
    weights_bytes: int,
    embedding_bytes: int,
    context: int,
    bytes_per_kv_value: int = 2,
    *,
    prompt_call: int = 0,
    outside: bool = False,
) -> Footprint:
    """The memory of a running model, and the bytes that one token reads.

    Args:
        config: the model.
        weights_bytes: of the artifact.
        embedding_bytes: of ``embed_tokens`` among them when it is not also the head, else 0.
        context: positions in the cache.
        bytes_per_kv_value: 2 for float16 caches.
        prompt_call: see ``activation_bytes``.
        outside: see ``Footprint``.
    """
    fixed = 0
    if any(kind.taps for kind in config.kinds):
        from compress.decoder.states import fixed_bytes

        fixed = fixed_bytes(config)
    cache = fixed + context * config.kv_cache_bytes_per_token(bytes_per_kv_value)
    return Footprint(
        weights=weights_bytes,
        kv_cache=cache,
        activations=activation_bytes(config, context, prompt_call=prompt_call),
        read_per_token=weights_bytes - embedding_bytes + cache,
        context=context,
        prompt_call=prompt_call,
        outside=outside,
        fixed=fixed,
    )


def embedding_bytes(config: DecoderConfig, entries: Sequence[PlanEntry]) -> int:
    """Bytes that decoding a token does not read: the embedding table's, of which it reads one row,
    unless it is also the head; and those of the experts that are not chosen."""
    unread = 0
    if config.experts is not None:
        experts = sum(entry.nbytes for entry in entries if ".experts." in entry.name)
        unread = experts * (config.experts.count - config.experts.chosen) // config.experts.count
    if config.tie_word_embeddings:
        return unread
    return unread + sum(entry.nbytes for entry in entries if entry.name == "embed_tokens.weight")


@dataclass(frozen=True)
class Device:
    """One row of ``devices.yaml``; bytes and bytes per second.

    Attributes:
        limits_measured: whether the limits were measured on this very device.
        estimated: names of values that nobody has measured on this device.
        source: of the limits.
    """

    name: str
    label: str
    chip: str
    memory: int
    app_limit: int
    entitled: int
    bandwidth: int
    limits_measured: bool
    estimated: tuple[str, ...]
    source: str


def devices() -> dict[str, Device]:
    """The table of devices, from package data."""
    import yaml

    tables: Mapping[str, Mapping[str, Any]] = yaml.safe_load(
        (files("compress.decoder") / "devices.yaml").read_text(encoding="utf-8")
    )
    found = {}
    for name, row in tables["devices"].items():
        limits = tables["limits"][row["limits"]]
        measured = "app_limit" in row or name in limits["measured"]
        found[name] = Device(
            name=name,
            label=row["label"],
            chip=row["chip"],
            memory=row["memory"] << 30,
            app_limit=round(1e9 * row.get("app_limit", limits["app_limit"])),
            entitled=round(1e9 * row.get("entitled", limits["entitled"])),
            bandwidth=round(1e9 * row["bandwidth"]),
            limits_measured=measured,
            estimated=(*(() if measured else LIMITS), *row.get("estimated", ())),
            source=limits["source"],
        )
    return found


def get_device(name: str) -> Device:
    """A device by name.

    Raises:
        UsageError: not in the table.
    """
    table = devices()
    if name not in table:
        raise UsageError(f"unknown device {name!r}", hint=did_you_mean(name, table))
    return table[name]


def judge(need: Footprint, device: Device) -> Verdict:
    """``fits``, ``with entitlement`` (increased-memory-limit) or ``too large``, on a device."""
    if need.total <= device.app_limit:
        return "fits"
    return "with entitlement" if need.total <= device.entitled else "too large"


def tokens_per_second(need: Footprint, device: Device) -> float:
    """Upper bound on decode speed at the context: bandwidth ÷ bytes read per token."""
    return device.bandwidth / need.read_per_token


def realistic_tokens_per_second(need: Footprint, device: Device) -> tuple[float, float]:
    """Decode speed to expect, from and to: reading at ``EFFICIENCY`` and ``STEP_SECONDS``."""
    reading = need.read_per_token / (EFFICIENCY * device.bandwidth)
    fastest, slowest = STEP_SECONDS
    return 1 / (reading + slowest), 1 / (reading + fastest)


def largest_context(config: DecoderConfig, need: Footprint, memory: int) -> int:
    """The largest context whose weights, KV cache and activations fit in ``memory`` bytes."""
    per_token = (need.kv_cache - need.fixed) // max(need.context, 1)
    held = need.fixed + (0 if need.outside else need.weights)

    contexts = range(config.max_context + 1)
    # It grows with the context: the last one that does not exceed the memory.
    beyond = bisect_right(
        contexts,
        memory - held,
        key=lambda n: n * per_token + activation_bytes(config, n, prompt_call=need.prompt_call),
    )
    return max(0, beyond - 1)
