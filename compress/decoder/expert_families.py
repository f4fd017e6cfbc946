"""Rows of families with mixtures of experts. Sources: configuration and modelling files of
transformers 4.57.6.
"""

from __future__ import annotations

from typing import Any

from compress.decoder.config_json import Config, flag, number, whole
from compress.decoder.family import (
    BLOCK,
    FULL,
    LLAMA_NAMES,
    MOST_WIDE,
    QWEN3_NAMES,
    SLIDING,
    Family,
    attention_biases,
    layer_kinds,
    window_of,
)
from compress.decoder.grammar import AttentionKind, Experts
from compress.errors import UnsupportedModelError

MOST_EXPERTS = 4096


def experts(config: Config, **settings: Any) -> dict[str, Any]:
    """``experts`` of a ``DecoderConfig``: the config's numbers, and the family's ``settings``.

    Raises:
        KeyError, ValueError: a key is missing or its value impossible.
    """
    key = "num_experts" if "num_experts" in config else "num_local_experts"
    count = whole(config, key, most=MOST_EXPERTS)
    chosen = whole(config, "num_experts_per_tok", most=MOST_EXPERTS)
    if chosen > count:
        raise ValueError(f"num_experts_per_tok ({chosen}) is more than {key} ({count})")
    settings.setdefault("width", whole(config, "intermediate_size", most=MOST_WIDE))
    return {"experts": Experts(count, chosen, **settings)}


def _mixtral(config: Config) -> dict[str, Any]:
    window = whole(config, "sliding_window", 0) or None
    return experts(config) | {"kinds": (AttentionKind(window=window),)}


def _qwen_moe(config: Config, **settings: Any) -> dict[str, Any]:
    if flag(config, "use_sliding_window"):
        raise UnsupportedModelError("experts with use_sliding_window are not supported")
    if config.get("mlp_only_layers") or whole(config, "decoder_sparse_step", 1) != 1:
        raise UnsupportedModelError(
            "a model with experts in some blocks only (mlp_only_layers, decoder_sparse_step) is "
            "not supported"
        )
    width = whole(config, "moe_intermediate_size", most=MOST_WIDE)
    return experts(config, width=width, renormalize=flag(config, "norm_topk_prob"), **settings)


def _qwen2_moe(config: Config) -> dict[str, Any]:
    shared = whole(config, "shared_expert_intermediate_size", 5632, most=MOST_WIDE)
    found = _qwen_moe(config, shared_width=shared, shared_gate=True)
    return found | {"qkv_bias": flag(config, "qkv_bias", True)}


def _qwen3_moe(config: Config) -> dict[str, Any]:
    bias = flag(config, "attention_bias")
    return _qwen_moe(config) | {"qkv_bias": bias, "o_bias": bias, "qk_norm": "head"}


def _olmoe(config: Config) -> dict[str, Any]:
    if config.get("clip_qkv") is not None:
        raise UnsupportedModelError("olmoe with clip_qkv is not supported")
    found = experts(config, renormalize=flag(config, "norm_topk_prob"))
    return attention_biases(config) | found | {"mlp_bias": False, "qk_norm": "projection"}


def _phimoe(config: Config) -> dict[str, Any]:
    if whole(config, "num_experts_per_tok", 2) != 2:
        raise UnsupportedModelError("phimoe has two experts for each token")
    window, bias = whole(config, "sliding_window", 0) or None, flag(config, "attention_bias")
    jitter = number(config, "router_jitter_noise", 0.01)
    return experts({**config, "num_experts_per_tok": 2}, renormalize=False, jitter=jitter) | {
        "norm": "layernorm",
        "norm_bias": True,
        "qkv_bias": bias,
        "o_bias": bias,
        "lm_head_bias": flag(config, "lm_head_bias"),
        "kinds": (AttentionKind(window=window),),
    }


def _granitemoe(config: Config) -> dict[str, Any]:
    bias = flag(config, "attention_bias")
    shared = config.get("shared_intermediate_size") or 0  # 0: none
    if shared:
        shared = whole(config, "shared_intermediate_size", most=MOST_WIDE)
    return experts(config, shared_width=shared) | {
        "qkv_bias": bias,
        "o_bias": bias,
        "embed_scale": number(config, "embedding_multiplier", 1.0),
        "residual_scale": number(config, "residual_multiplier", 1.0),
        "attention_scale": number(config, "attention_multiplier", 1.0),
        "logit_scale": 1.0 / number(config, "logits_scaling", 1.0),
    }


def _gpt_oss(config: Config) -> dict[str, Any]:
    kinds = {SLIDING: AttentionKind(window=window_of({"sliding_window": 128, **config}))}
    kinds[FULL] = AttentionKind()
    stored = config.get("quantization_config") or {}
    packed = stored.get("quant_method") == "mxfp4"
    return {
        **experts(config, biased=True, clamp=number(config, "swiglu_limit", 7.0), packed=packed),
        **layer_kinds(config, kinds, lambda block: FULL if block % 2 else SLIDING),
        "qkv_bias": True,
        "o_bias": True,
        "sinks": True,
    }


def names(base: dict[str, str], mlp: str, own: dict[str, str]) -> dict[str, str]:
    """Tensor names of a family: the attention's of ``base``, and those below ``mlp``."""
    rest = {role: name for role, name in base.items() if ".mlp." not in name}
    return rest | {role: BLOCK + mlp + name for role, name in own.items()}


MIXTRAL_NAMES = names(LLAMA_NAMES, "block_sparse_moe.", {
    "router": "gate",
    "experts.gate_proj": "experts.{e}.w1",
    "experts.up_proj": "experts.{e}.w3",
    "experts.down_proj": "experts.{e}.w2",
})  # fmt: skip
_OWN = {"router": "gate"} | {
    f"experts.{last}": f"experts.{{e}}.{last}" for last in ("gate_proj", "up_proj", "down_proj")
}
OLMOE_NAMES = names(QWEN3_NAMES, "mlp.", _OWN)
QWEN2_MOE_NAMES = names(LLAMA_NAMES, "mlp.", _OWN | {
    "shared_gate": "shared_expert_gate",
    "shared.gate_proj": "shared_expert.gate_proj",
    "shared.up_proj": "shared_expert.up_proj",
    "shared.down_proj": "shared_expert.down_proj",
})  # fmt: skip
GRANITEMOE_NAMES = names(LLAMA_NAMES, "block_sparse_moe.", {
    "router": "router.layer",
    "experts.gate_up_proj": "input_linear",
    "experts.down_proj": "output_linear",
})  # fmt: skip
GRANITEMOE_SHARED_NAMES = GRANITEMOE_NAMES | {
    "shared.gate_up_proj": BLOCK + "shared_mlp.input_linear",
    "shared.down_proj": BLOCK + "shared_mlp.output_linear",
}

GPT_OSS_NAMES = names(LLAMA_NAMES, "mlp.", {
    "router": "router",
    "experts.gate_up_proj": "experts.gate_up_proj",
    "experts.down_proj": "experts.down_proj",
}) | {"sinks": BLOCK + "self_attn.sinks"}  # fmt: skip

EXPERTS: dict[str, Family] = {
    "gpt_oss": Family(
        GPT_OSS_NAMES,
        _gpt_oss,
        "gpt_oss",
        "GptOssForCausalLM",
        norm_eps=1e-5,
        head_dim=64,
        bare=frozenset(("sinks", "experts.gate_up_proj", "experts.down_proj")),
    ),
    "mixtral": Family(MIXTRAL_NAMES, _mixtral, "mixtral", "MixtralForCausalLM", norm_eps=1e-5),
    "phimoe": Family(MIXTRAL_NAMES, _phimoe, "phimoe", "PhimoeForCausalLM", norm_eps=1e-5),
    "qwen2_moe": Family(QWEN2_MOE_NAMES, _qwen2_moe, "qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3_moe": Family(OLMOE_NAMES, _qwen3_moe, "qwen3_moe", "Qwen3MoeForCausalLM"),
    "olmoe": Family(OLMOE_NAMES, _olmoe, "olmoe", "OlmoeForCausalLM", norm_eps=1e-5),
    "granitemoe": Family(GRANITEMOE_NAMES, _granitemoe, "granitemoe", "GraniteMoeForCausalLM"),
    "granitemoeshared": Family(
        GRANITEMOE_SHARED_NAMES, _granitemoe, "granitemoeshared", "GraniteMoeSharedForCausalLM"
    ),
}
"""Rows by model type."""
