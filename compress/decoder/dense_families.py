"""Rows of newer dense families: norms at other places, scalars, mixed windows and rotations.
Sources: configuration and modelling files of transformers 4.57.6.
"""

from __future__ import annotations

from typing import Any

from compress.decoder.classic_families import CLASSIC
from compress.decoder.config_json import Config, flag, number, whole
from compress.decoder.family import (
    BLOCK,
    FULL,
    LLAMA_NAMES,
    MOST_LAYERS,
    MOST_WIDE,
    PHI3_NAMES,
    QWEN3_NAMES,
    SLIDING,
    Family,
    all_biases,
    attention_biases,
    every,
    flags,
    layer_kinds,
    window_of,
)
from compress.decoder.grammar import AttentionKind
from compress.errors import UnsupportedModelError

POST_NORMS = ("attention_post_norm", "mlp_post_norm")
FOUR_NORMS = (
    "input_layernorm", "attention_post_norm", "post_attention_layernorm", "mlp_post_norm",
)  # fmt: skip


# --- gemma ----------------------------------------------------------------------------------------


def _gemma(config: Config) -> dict[str, Any]:
    if flag(config, "use_bidirectional_attention"):
        raise UnsupportedModelError("a model with bidirectional attention is no decoder")
    bias = flag(config, "attention_bias")
    return {
        "norm_offset": 1.0,
        "activation": config.get("hidden_activation") or config.get("hidden_act") or "gelu_new",
        "embed_scale": float(whole(config, "hidden_size", most=MOST_WIDE)) ** 0.5,
        "qkv_bias": bias,
        "o_bias": bias,
    }


def _gemma2(config: Config) -> dict[str, Any]:
    window = AttentionKind(window=whole(config, "sliding_window", 4096))
    kinds = {SLIDING: window, FULL: AttentionKind()}
    return {
        **_gemma(config),
        **layer_kinds(config, kinds, every(2, SLIDING, FULL)),
        "norms": FOUR_NORMS,
        "attention_scale": number(config, "query_pre_attn_scalar", 256.0) ** -0.5,
        "score_cap": cap(config, "attn_logit_softcapping", 50.0),
        "logit_cap": cap(config, "final_logit_softcapping", 30.0),
    }


def cap(config: Config, key: str, default: float = 0.0) -> float:
    """A cap; null means none, a missing key the family's default."""
    if key not in config:
        return default
    return number(config, key) if config[key] is not None else 0.0


def ropes_of_kinds(config: Config) -> tuple[dict[str, Any], ...]:
    """The rotary settings of full and of sliding attention where ``rope_parameters`` has each, as
    transformers 5 writes it; else empty."""
    nested = config.get("rope_parameters")
    if not isinstance(nested, dict) or FULL not in nested:
        return ()
    plain = {"max_position_embeddings": config["max_position_embeddings"]}
    return tuple(plain | {"rope_parameters": nested[kind]} for kind in (FULL, SLIDING))


def _gemma3(config: Config) -> dict[str, Any]:
    interval = whole(config, "sliding_window_pattern", 6)
    local = AttentionKind(rope=1, window=whole(config, "sliding_window", 4096))
    kinds = {SLIDING: local, FULL: AttentionKind()}
    ropes = ropes_of_kinds(config) or (
        {"rope_theta": 1e6, **config},
        {"rope_theta": config.get("rope_local_base_freq") or 1e4},
    )
    return {
        **_gemma(config),
        **layer_kinds(config, kinds, every(interval, SLIDING, FULL)),
        "ropes": ropes,
        "norms": FOUR_NORMS,
        "qk_norm": "head",
        "attention_scale": number(config, "query_pre_attn_scalar", 256.0) ** -0.5,
        "score_cap": cap(config, "attn_logit_softcapping"),
        "logit_cap": cap(config, "final_logit_softcapping"),
    }


GEMMA2_NAMES = LLAMA_NAMES | {
    "attention_post_norm": BLOCK + "post_attention_layernorm",
    "post_attention_layernorm": BLOCK + "pre_feedforward_layernorm",
    "mlp_post_norm": BLOCK + "post_feedforward_layernorm",
}
GEMMA3_NAMES = GEMMA2_NAMES | {role: QWEN3_NAMES[role] for role in ("q_norm", "k_norm")}


# --- granite, smollm3, olmo, exaone --------------------------------------------------------------


def _granite(config: Config) -> dict[str, Any]:
    return attention_biases(config) | {
        "embed_scale": number(config, "embedding_multiplier", 1.0),
        "residual_scale": number(config, "residual_multiplier", 1.0),
        "attention_scale": number(config, "attention_multiplier", 1.0),
        "logit_scale": 1.0 / number(config, "logits_scaling", 1.0),
    }


def _granite_hybrid(config: Config) -> dict[str, Any]:
    types = config.get("layer_types") or ["mamba"]
    if not set(types) <= {"attention", FULL} or config.get("num_local_experts"):
        raise UnsupportedModelError(
            "granite models with mamba layers or experts are not supported",
            hint="granite 4 dense: 350m, 1b, micro",
        )
    changes = _granite(config) | {
        "intermediate_size": whole(config, "shared_intermediate_size", 1024, most=MOST_WIDE)
    }
    if config.get("position_embedding_type") != "rope":
        changes["kinds"] = (AttentionKind(rope=None),)
    return changes


GRANITE_HYBRID_NAMES = {
    **{
        role: name
        for role, name in LLAMA_NAMES.items()
        if not role.endswith(("gate_proj", "up_proj"))
    },
    "gate_up_proj": BLOCK + "shared_mlp.input_linear",
    "down_proj": BLOCK + "shared_mlp.output_linear",
}


def rope_layers(config: Config, interval: int = 4) -> list[str]:
    """``rope`` or ``nope`` for each block, from ``no_rope_layers`` (1 means rope)."""
    count = whole(config, "num_hidden_layers", most=MOST_LAYERS)
    step = whole(config, "no_rope_layer_interval", interval)
    given = flags(config, "no_rope_layers", count)
    rotates = given or [bool((block + 1) % step) for block in range(count)]
    return ["rope" if rotated else "nope" for rotated in rotates]


def _smollm3(config: Config) -> dict[str, Any]:
    if flag(config, "use_sliding_window"):
        raise UnsupportedModelError("smollm3 with use_sliding_window is not supported")
    kinds = {"rope": AttentionKind(), "nope": AttentionKind(rope=None)}
    types = {**config, "layer_types": rope_layers(config)}
    return attention_biases(config) | layer_kinds(types, kinds, lambda _: "rope")


def _olmo2(config: Config) -> dict[str, Any]:
    return attention_biases(config) | {"norms": POST_NORMS, "qk_norm": "projection"}


def _olmo3(config: Config) -> dict[str, Any]:
    plain = {"rope_theta": config.get("rope_theta")}
    window = whole(config, "sliding_window", 4096)
    kinds = {SLIDING: AttentionKind(rope=1, window=window), FULL: AttentionKind()}
    return {
        **_olmo2(config),
        **layer_kinds(config, kinds, every(4, SLIDING, FULL)),
        "ropes": ropes_of_kinds(config) or (config, plain),
    }


OLMO2_NAMES = {role: name for role, name in QWEN3_NAMES.items() if role not in FOUR_NORMS} | {
    "attention_post_norm": BLOCK + "post_attention_layernorm",
    "mlp_post_norm": BLOCK + "post_feedforward_layernorm",
}


def _exaone4(config: Config) -> dict[str, Any]:
    changes: dict[str, Any] = {"norms": POST_NORMS, "qk_norm": "head"}
    window = window_of(config)
    if window is None:
        return changes
    pattern = config.get("sliding_window_pattern") or 4
    interval = len(pattern) if isinstance(pattern, str) else int(pattern)
    kinds = {SLIDING: AttentionKind(window=window), FULL: AttentionKind(rope=None)}
    return changes | layer_kinds(config, kinds, every(interval, SLIDING, FULL))


# --- glm, cohere, ernie, hunyuan, helium, llama4 -------------------------------------------------


def _glm(config: Config) -> dict[str, Any]:
    return {"rope_pairs": True, "qkv_bias": flag(config, "attention_bias", True)}


def _glm4(config: Config) -> dict[str, Any]:
    return _glm(config) | {"norms": FOUR_NORMS}


GLM_NAMES = {role: name for role, name in PHI3_NAMES.items() if role != "qkv_proj"} | {
    role: LLAMA_NAMES[role] for role in ("q_proj", "k_proj", "v_proj")
}
GLM4_NAMES = GLM_NAMES | {
    "attention_post_norm": BLOCK + "post_self_attn_layernorm",
    "mlp_post_norm": BLOCK + "post_mlp_layernorm",
}


def _cohere(config: Config) -> dict[str, Any]:
    if flag(config, "use_qk_norm"):
        raise UnsupportedModelError("cohere with use_qk_norm (Command R+) is not supported")
    return {
        **attention_biases(config),
        "norm": "layernorm",
        "norm_eps": number(config, "layer_norm_eps", 1e-5),
        "norms": ("input_layernorm",),
        "parallel_residual": True,
        "logit_scale": number(config, "logit_scale", 0.0625),
        "rope_pairs": True,
    }


def _cohere2(config: Config) -> dict[str, Any]:
    interval = whole(config, "sliding_window_pattern", 4)
    window = AttentionKind(window=whole(config, "sliding_window", 4096))
    kinds = {SLIDING: window, FULL: AttentionKind(rope=None)}
    return _cohere(config) | layer_kinds(config, kinds, every(interval, SLIDING, FULL))


def _ernie(config: Config) -> dict[str, Any]:
    return all_biases(flag(config, "use_bias")) | {"rope_pairs": True}


def _hunyuan(config: Config) -> dict[str, Any]:
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    changes = attention_biases(config) | {"qk_norm": "head", "qk_norm_after_rope": True}
    changes["mlp_bias"] = False
    if isinstance(scaling, dict) and scaling.get("alpha"):
        heads = whole(config, "num_attention_heads", most=MOST_WIDE)
        hidden = whole(config, "hidden_size", most=MOST_WIDE)
        size = whole(config, "head_dim", hidden // heads, most=MOST_WIDE)
        base = number({"rope_theta": scaling.get("rope_theta"), **config}, "rope_theta", 1e4)
        theta = base * number(scaling, "alpha") ** (size / (size - 2))
        changes["ropes"] = ({"rope_theta": theta},)
    return changes


HUNYUAN_NAMES = LLAMA_NAMES | {
    "q_norm": BLOCK + "self_attn.query_layernorm",
    "k_norm": BLOCK + "self_attn.key_layernorm",
}


def _helium(config: Config) -> dict[str, Any]:
    return attention_biases(config) | {"rope_pairs": True, "o_bias": False}


def _llama4(config: Config) -> dict[str, Any]:
    # Empty `moe_layers` or no experts at all: MobileLLM-R1.
    if config.get("num_local_experts", 16) and config.get("moe_layers", True):
        raise UnsupportedModelError("llama4 with experts is not supported")
    normed = flag(config, "use_qk_norm", True)
    kinds = {"rope": AttentionKind(), "nope": AttentionKind(rope=None, normed=False)}
    layers = rope_layers(config)
    types = {**config, "layer_types": layers}
    bias = flag(config, "attention_bias")
    most = [whole(config, "max_position_embeddings")]
    if config.get("attention_chunk_size", 8192) is not None:  # attention is chunked beyond it
        most.append(whole(config, "attention_chunk_size", 8192))
    if "nope" in layers and flag(config, "attn_temperature_tuning", True):
        most.append(whole(config, "floor_scale", 8192) - 1)  # the temperature is 1 up to there
    return layer_kinds(types, kinds, lambda _: "rope") | {
        "intermediate_size": whole(config, "intermediate_size_mlp", 16384, most=MOST_WIDE),
        "qkv_bias": bias,
        "o_bias": bias,
        "rope_pairs": True,
        "qk_norm": "unit" if normed else "",
        "max_context": min(most),
    }


LLAMA4_NAMES = {role: name.replace(".mlp.", ".feed_forward.") for role, name in LLAMA_NAMES.items()}


DENSE: dict[str, Family] = {
    "gemma": Family(
        LLAMA_NAMES, _gemma, "gemma", "GemmaForCausalLM",
        head_dim=256, activation="gelu_new", tied=True,
    ),
    "gemma2": Family(
        GEMMA2_NAMES, _gemma2, "gemma2", "Gemma2ForCausalLM",
        head_dim=256, activation="gelu_new", tied=True,
    ),
    "gemma3_text": Family(
        GEMMA3_NAMES, _gemma3, "gemma3_text", "Gemma3ForCausalLM",
        head_dim=256, activation="gelu_new", tied=True,
    ),
    "granite": Family(LLAMA_NAMES, _granite, "granite", "GraniteForCausalLM"),
    "granitemoehybrid": Family(
        GRANITE_HYBRID_NAMES, _granite_hybrid, "granitemoehybrid", "GraniteMoeHybridForCausalLM",
    ),
    "smollm3": Family(LLAMA_NAMES, _smollm3, "smollm3", "SmolLM3ForCausalLM", tied=True),
    "olmo2": Family(OLMO2_NAMES, _olmo2, "olmo2", "Olmo2ForCausalLM", norm_eps=1e-5),
    "olmo3": Family(OLMO2_NAMES, _olmo3, "olmo3", "Olmo3ForCausalLM", norm_eps=1e-5),
    "cohere": Family(LLAMA_NAMES, _cohere, "cohere", "CohereForCausalLM", tied=True),
    "cohere2": Family(LLAMA_NAMES, _cohere2, "cohere2", "Cohere2ForCausalLM", tied=True),
    "llama4_text": Family(
        LLAMA4_NAMES, _llama4, "llama4_text", "Llama4ForCausalLM", norm_eps=1e-5, head_dim=128
    ),
    "exaone4": Family(
        OLMO2_NAMES, _exaone4, "exaone4", "Exaone4ForCausalLM", norm_eps=1e-5
    ),
    "glm": Family(
        GLM_NAMES, _glm, "glm", "GlmForCausalLM",
        norm_eps=1.5625e-7, partial_rotary=0.5, head_dim=128,
    ),
    "glm4": Family(
        GLM4_NAMES, _glm4, "glm4", "Glm4ForCausalLM",
        norm_eps=1.5625e-7, partial_rotary=0.5, head_dim=128,
    ),
    "ernie4_5": Family(
        LLAMA_NAMES, _ernie, "ernie4_5", "Ernie4_5ForCausalLM",
        norm_eps=1e-5, head_dim=128, tied=True,
    ),
    "hunyuan_v1_dense": Family(
        HUNYUAN_NAMES, _hunyuan, "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", norm_eps=1e-5
    ),
    "helium": Family(
        LLAMA_NAMES, _helium, "helium", "HeliumForCausalLM", norm_eps=1e-8, head_dim=128
    ),
    **CLASSIC,
}  # fmt: skip
"""Rows by model type."""
