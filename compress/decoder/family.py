"""How a family of decoders is described: tensor names, and its differences from llama's reading of
``config.json``. The rows are in ``families``, ``dense_families`` and ``classic_families``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compress.decoder.config_json import Config, flag, number, short, whole
from compress.decoder.grammar import AttentionKind

# Limits far above any model, so that a damaged config cannot fill the memory with a table.
MOST_LAYERS = 10_000
MOST_WIDE = 2**20
MOST_WORDS = 2**26

SLIDING, FULL = "sliding_attention", "full_attention"
BLOCK = "model.layers.{i}."
PHI3_NAMES: dict[str, str] = {
    "embed_tokens": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "input_layernorm": BLOCK + "input_layernorm",
    "post_attention_layernorm": BLOCK + "post_attention_layernorm",
    "qkv_proj": BLOCK + "self_attn.qkv_proj",
    "o_proj": BLOCK + "self_attn.o_proj",
    "gate_up_proj": BLOCK + "mlp.gate_up_proj",
    "down_proj": BLOCK + "mlp.down_proj",
}
LLAMA_NAMES: dict[str, str] = {
    "embed_tokens": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "input_layernorm": BLOCK + "input_layernorm",
    "post_attention_layernorm": BLOCK + "post_attention_layernorm",
    "q_proj": BLOCK + "self_attn.q_proj",
    "k_proj": BLOCK + "self_attn.k_proj",
    "v_proj": BLOCK + "self_attn.v_proj",
    "o_proj": BLOCK + "self_attn.o_proj",
    "gate_proj": BLOCK + "mlp.gate_proj",
    "up_proj": BLOCK + "mlp.up_proj",
    "down_proj": BLOCK + "mlp.down_proj",
}
QWEN3_NAMES: dict[str, str] = LLAMA_NAMES | {
    "q_norm": BLOCK + "self_attn.q_norm",
    "k_norm": BLOCK + "self_attn.k_norm",
}
PHI_NAMES: dict[str, str] = {
    "embed_tokens": "model.embed_tokens",
    "norm": "model.final_layernorm",
    "lm_head": "lm_head",
    "input_layernorm": BLOCK + "input_layernorm",
    "q_proj": BLOCK + "self_attn.q_proj",
    "k_proj": BLOCK + "self_attn.k_proj",
    "v_proj": BLOCK + "self_attn.v_proj",
    "o_proj": BLOCK + "self_attn.dense",
    "up_proj": BLOCK + "mlp.fc1",
    "down_proj": BLOCK + "mlp.fc2",
}


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        names: role → tensor name on disk, without ``.weight``; ``{i}`` is the block.
        changes: the fields of ``DecoderConfig`` that differ from llama's reading of the config;
            ``ropes`` as mappings with the keys that ``families.read_rope`` takes.
        model_type, architecture: for the ``config.json`` beside an artifact.
        norm_eps: the family's default.
        partial_rotary: the family's default share of a head that rotates.
        head_dim: the family's default, or 0 for hidden size divided by heads.
        activation: the only one that the family's models have.
        positions: the family's default of ``max_position_embeddings``, or 0 for none.
        tied: whether a config without ``tie_word_embeddings`` means true.
        keys: llama's key of ``config.json`` → this family's, where they differ.
        prefix: of tensor names, which some checkpoints leave out (gpt2).
        transposed: roles that are stored as ``[columns, rows]`` (gpt2).
        by_group: fused roles that are stored by key-value head (``WeightMap``).
        bare: roles whose weights are stored without ``.weight``, and biases with ``_bias``
            (gpt_oss); those of all experts as ``[experts, columns, rows]``, gate and up by turns.
    """

    names: Mapping[str, str]
    changes: Callable[[Config], dict[str, Any]]
    model_type: str
    architecture: str
    norm_eps: float = 1e-6
    partial_rotary: float = 1.0
    head_dim: int = 0
    activation: str = "silu"
    positions: int = 0
    tied: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    transposed: frozenset[str] = frozenset()
    by_group: frozenset[str] = frozenset()
    bare: frozenset[str] = frozenset()


def layer_kinds(
    config: Config, kinds: Mapping[str, AttentionKind], default: Callable[[int], str]
) -> dict[str, Any]:
    """``kinds`` and ``layers`` of a ``DecoderConfig`` from ``layer_types``.

    Args:
        kinds: name in ``layer_types`` → the kind.
        default: block → name, where the config has no ``layer_types``.

    Raises:
        ValueError: too few types, or one that is not in ``kinds``.
    """
    count = whole(config, "num_hidden_layers", most=MOST_LAYERS)
    types = config.get("layer_types")
    if types is None:
        types = [default(block) for block in range(count)]
    if not isinstance(types, list) or len(types) < count:
        raise ValueError(f"layer_types is {short(types)}, not a list of {count} types")
    names = list(kinds)
    unknown = next((kind for kind in types[:count] if kind not in names), None)
    if unknown is not None:
        raise ValueError(f"layer_types has {short(unknown)}, not one of {', '.join(names)}")
    used = [name for name in names if name in types[:count]]
    layers = tuple(used.index(kind) for kind in types[:count])
    return {"kinds": tuple(kinds[name] for name in used), "layers": layers}


def flags(config: Config, key: str, count: int) -> Sequence[bool] | None:
    """A list of at least ``count`` zeros and ones, or None where it is missing or empty."""
    value = config.get(key)
    if not value:
        return None
    if not isinstance(value, list) or len(value) < count or any(v not in (0, 1) for v in value):
        raise ValueError(f"{key} is {short(value)}, not a list of {count} zeros and ones")
    return [bool(item) for item in value[:count]]


def every(interval: int, first: str, last: str) -> Any:
    """Block → ``last`` for every ``interval``-th block, else ``first``."""
    return lambda block: first if (block + 1) % interval else last


def window_of(config: Config) -> int | None:
    """The window; null means none, a missing key 4096, as in transformers."""
    if "sliding_window" in config and config["sliding_window"] is None:
        return None
    return whole(config, "sliding_window", 4096)


def attention_biases(config: Config) -> dict[str, Any]:
    bias = flag(config, "attention_bias")
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": flag(config, "mlp_bias")}


def layer_norm(config: Config, eps: str = "layer_norm_eps") -> dict[str, Any]:
    """LayerNorm with a bias."""
    return {"norm": "layernorm", "norm_bias": True, "norm_eps": number(config, eps, 1e-5)}


def all_biases(value: bool) -> dict[str, Any]:
    return dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), value)
