"""Rows of dense families with LayerNorm, plain MLPs or learned positions, and ministral. Sources:
configuration and modelling files of transformers 4.57.6.
"""

from __future__ import annotations

from typing import Any

from compress.decoder.config_json import Config, flag, short, whole
from compress.decoder.family import (
    BLOCK,
    FULL,
    LLAMA_NAMES,
    MOST_LAYERS,
    MOST_WIDE,
    SLIDING,
    Family,
    all_biases,
    attention_biases,
    layer_kinds,
    layer_norm,
    window_of,
)
from compress.decoder.grammar import AttentionKind
from compress.errors import UnsupportedModelError


def _ministral(config: Config) -> dict[str, Any]:
    window = window_of(config)
    kinds = {SLIDING: AttentionKind(window=window), FULL: AttentionKind()}
    return layer_kinds(config, kinds, lambda _: SLIDING if window else FULL)


def _starcoder2(config: Config) -> dict[str, Any]:
    window = whole(config, "sliding_window", 0) or None
    return {
        **layer_norm(config, "norm_epsilon"),
        **all_biases(flag(config, "use_bias", True)),
        "kinds": (AttentionKind(window=window),),
        "gated_mlp": False,
    }


STARCODER2_NAMES = {
    **{role: name for role, name in LLAMA_NAMES.items() if not role.endswith("gate_proj")},
    "up_proj": BLOCK + "mlp.c_fc",
    "down_proj": BLOCK + "mlp.c_proj",
}


def _stablelm(config: Config) -> dict[str, Any]:
    if flag(config, "qk_layernorm") or flag(config, "use_parallel_residual"):
        raise UnsupportedModelError("stablelm 12B (qk_layernorm, parallel) is not supported")
    return layer_norm(config) | {"qkv_bias": flag(config, "use_qkv_bias")}


def _nemotron(config: Config) -> dict[str, Any]:
    return {
        **layer_norm(config, "norm_eps"),
        **attention_biases(config),
        "norm_offset": 1.0,
        "gated_mlp": False,
    }


UNGATED_NAMES = {role: name for role, name in LLAMA_NAMES.items() if role != "gate_proj"}


def _arcee(config: Config) -> dict[str, Any]:
    return attention_biases(config) | {"gated_mlp": False}


def _neox(config: Config) -> dict[str, Any]:
    bias = flag(config, "attention_bias", True)
    return {
        **layer_norm(config),
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": True,
        "gated_mlp": False,
        "parallel_residual": flag(config, "use_parallel_residual", True),
    }


_NEOX = "gpt_neox.layers.{i}."
NEOX_NAMES = {
    "embed_tokens": "gpt_neox.embed_in",
    "norm": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
    "input_layernorm": _NEOX + "input_layernorm",
    "post_attention_layernorm": _NEOX + "post_attention_layernorm",
    "qkv_proj": _NEOX + "attention.query_key_value",
    "o_proj": _NEOX + "attention.dense",
    "up_proj": _NEOX + "mlp.dense_h_to_4h",
    "down_proj": _NEOX + "mlp.dense_4h_to_h",
}


def _falcon(config: Config) -> dict[str, Any]:
    if flag(config, "alibi"):
        raise UnsupportedModelError("falcon with alibi is not supported")
    new = flag(config, "new_decoder_architecture")
    parallel = flag(config, "parallel_attn", True) or new
    heads = whole(config, "num_attention_heads", most=MOST_WIDE)
    if not new and not flag(config, "multi_query", True):
        raise UnsupportedModelError("falcon without multi_query (falcon-rw) is not supported")
    two = not parallel or two_norms(config)
    kv = whole(config, "num_kv_heads", heads, most=MOST_WIDE) if new else 1
    hidden = whole(config, "hidden_size", most=MOST_WIDE)
    return {
        **layer_norm(config, "layer_norm_epsilon"),
        **all_biases(flag(config, "bias")),
        "num_key_value_heads": kv,
        "intermediate_size": whole(config, "ffn_hidden_size", 4 * hidden, most=4 * MOST_WIDE),
        "activation": config.get("activation") or "gelu",
        "gated_mlp": False,
        "parallel_residual": parallel,
        "norms": ("input_layernorm", "post_attention_layernorm")[: 1 + two],
    }


def two_norms(config: Config) -> bool:
    """Whether a falcon's attention and MLP have a norm each, before the block (40B)."""
    new = flag(config, "new_decoder_architecture")
    return new and whole(config, "num_ln_in_parallel_attn", 2) == 2


_H = "transformer.h.{i}."
FALCON_NAMES = {
    "embed_tokens": "transformer.word_embeddings",
    "norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "input_layernorm": _H + "input_layernorm",
    "post_attention_layernorm": _H + "post_attention_layernorm",
    "qkv_proj": _H + "self_attention.query_key_value",
    "o_proj": _H + "self_attention.dense",
    "up_proj": _H + "mlp.dense_h_to_4h",
    "down_proj": _H + "mlp.dense_4h_to_h",
}
FALCON_TWO_NAMES = FALCON_NAMES | {
    "input_layernorm": _H + "ln_attn",
    "post_attention_layernorm": _H + "ln_mlp",
}


# --- learned positions ----------------------------------------------------------------------------


def _gpt2(config: Config) -> dict[str, Any]:
    for key, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if flag(config, key, usual) != usual:
            raise UnsupportedModelError(f"gpt2 with {key} {short(config[key])} is not supported")
    if flag(config, "add_cross_attention"):
        raise UnsupportedModelError("gpt2 with add_cross_attention is not supported")
    return learned(config) | all_biases(True)


def _gpt_neo(config: Config) -> dict[str, Any]:
    window = AttentionKind(rope=None, window=whole(config, "window_size", 256))
    kinds = {"global": AttentionKind(rope=None), "local": window}
    types = []
    for row in config.get("attention_types") or [[["global", "local"], 12]]:
        if not isinstance(row, list) or len(row) != 2 or not isinstance(row[0], list):
            raise ValueError(f"attention_types has {short(row)}, not a list and its repeats")
        types += row[0] * whole({"repeats": row[1]}, "repeats", most=MOST_LAYERS)
    return {
        **learned(config),
        **layer_kinds({**config, "layer_types": types}, kinds, lambda _: "global"),
        "qkv_bias": False,
        "o_bias": True,
        "mlp_bias": True,
        "attention_scale": 1.0,
    }


def learned(config: Config) -> dict[str, Any]:
    """What gpt2 and gpt_neo share."""
    hidden = whole(config, "hidden_size", most=MOST_WIDE)
    return {
        **layer_norm(config, "layer_norm_epsilon"),
        "learned_positions": whole(config, "max_position_embeddings"),
        "intermediate_size": whole(config, "intermediate_size", 4 * hidden, most=4 * MOST_WIDE),
        "kinds": (AttentionKind(rope=None),),
        "gated_mlp": False,
    }


_ENDS = {
    "embed_tokens": "transformer.wte",
    "embed_positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "input_layernorm": _H + "ln_1",
    "post_attention_layernorm": _H + "ln_2",
    "up_proj": _H + "mlp.c_fc",
    "down_proj": _H + "mlp.c_proj",
}
GPT2_NAMES = _ENDS | {"qkv_proj": _H + "attn.c_attn", "o_proj": _H + "attn.c_proj"}
GPT_NEO_NAMES = _ENDS | {
    role: f"{_H}attn.attention.{name}"
    for role, name in (
        ("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("o_proj", "out_proj"),
    )
}  # fmt: skip
GPT2_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
}
GPT_NEO_KEYS = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "hidden_act": "activation_function",
}


CLASSIC: dict[str, Family] = {
    "gpt2": Family(
        GPT2_NAMES, _gpt2, "gpt2", "GPT2LMHeadModel", activation="gelu_new", tied=True,
        keys=GPT2_KEYS, prefix="transformer.",
        transposed=frozenset(("qkv_proj", "o_proj", "up_proj", "down_proj")),
    ),
    "gpt_neo": Family(
        GPT_NEO_NAMES, _gpt_neo, "gpt_neo", "GPTNeoForCausalLM", activation="gelu_new", tied=True,
        keys=GPT_NEO_KEYS,
    ),
    "gpt_neox": Family(
        NEOX_NAMES, _neox, "gpt_neox", "GPTNeoXForCausalLM", activation="gelu",
        partial_rotary=0.25,
        keys={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
        by_group=frozenset(("qkv_proj",)),
    ),
    "stablelm": Family(
        LLAMA_NAMES, _stablelm, "stablelm", "StableLmForCausalLM", partial_rotary=0.25
    ),
    "starcoder2": Family(
        STARCODER2_NAMES, _starcoder2, "starcoder2", "Starcoder2ForCausalLM",
        activation="gelu_new", tied=True,
    ),
    "nemotron": Family(
        UNGATED_NAMES, _nemotron, "nemotron", "NemotronForCausalLM",
        activation="relu2", partial_rotary=0.5,
    ),
    "arcee": Family(
        UNGATED_NAMES, _arcee, "arcee", "ArceeForCausalLM", norm_eps=1e-5, activation="relu2"
    ),
    "falcon-40b": Family(
        FALCON_TWO_NAMES, _falcon, "falcon", "FalconForCausalLM",
        activation="gelu", tied=True, positions=2048, by_group=frozenset(("qkv_proj",)),
    ),
    "falcon": Family(
        FALCON_NAMES, _falcon, "falcon", "FalconForCausalLM",
        activation="gelu", tied=True, positions=2048, by_group=frozenset(("qkv_proj",)),
    ),
    "ministral": Family(LLAMA_NAMES, _ministral, "ministral", "MinistralForCausalLM"),
}  # fmt: skip
"""Rows by model type; of two with one class the last is the class's own."""
