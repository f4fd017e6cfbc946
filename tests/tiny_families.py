"""Dense families beyond llama's kind: tiny configs, and what is compared to what.

``ROWS`` drives the tests of ``test_families.py`` and the page docs/families.md; every window is 8
and every epsilon so large that a graph with another one is caught.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

WINDOW = 8

_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 0.02,
    "tie_word_embeddings": False,
    "rope_theta": 1e4,
    "pad_token_id": None,
}
# Heads wider than the hidden size divided by their number, as gemma's.
_WIDE = _COMMON | {"hidden_size": 64, "head_dim": 32}
_LAYER_NORM: dict[str, Any] = {"layer_norm_eps": 0.02}
_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_NO_DROPOUT = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
_GRANITE: dict[str, Any] = {
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.1,
    "logits_scaling": 0.5,
}
_LLAMA4: dict[str, Any] = {
    "model_type": "llama4_text",
    "intermediate_size_mlp": 96,
    "intermediate_size": 64,
    "num_local_experts": 0,
    "moe_layers": [],
    "interleave_moe_layer_step": 0,
    "attention_chunk_size": 128,
    **_TIED,
}
_NEOX: dict[str, Any] = {
    key: value
    for key, value in _COMMON.items()
    if key in ("vocab_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
} | {
    **_LAYER_NORM,
    "model_type": "gpt_neox",
    "hidden_size": 256,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
    "rotary_pct": 0.25,
}


_MOE: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
_LOCAL: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Row:
    """One row of the matrix.

    Attributes:
        models: published models of the family.
        config: keys of ``config.json``.
        refused: format → a part of the reason why it refuses.
        told: format → a part of a note on what its runtime lacks.
        without: settings that are switched off, one at a time, and must be noticed: names of
            fields of ``DecoderConfig`` → another value.
    """

    models: str
    config: dict[str, Any]
    refused: dict[str, str] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)
    without: dict[str, Any] = field(default_factory=dict)


_CONV = dict.fromkeys(("coreml", "coreai"), "convolve in place of attention")
_EXPERTS = dict.fromkeys(("coreml", "coreai"), "experts are not supported")
_IGNORED = {"gguf": "llama.cpp ignores the sliding window"}

ROWS: dict[str, Row] = {
    "gemma3_text": Row(
        "Gemma 3 270M, 1B",
        _WIDE | _TIED | {
            "model_type": "gemma3_text", "sliding_window": WINDOW, "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 24, "rope_theta": 1e6, "rope_local_base_freq": 1e3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        without={
            "embed_scale": 1.0, "attention_scale": None, "qk_norm": "", "norm_offset": 0.0,
            "branch_eps": 1e-6, "norm_eps": 1e-6, "layers": (1, 1, 1, 1),
        },
    ),
    "gemma2": Row(
        "Gemma 2 2B, 9B",
        _WIDE | _TIED | {
            "model_type": "gemma2", "sliding_window": WINDOW, "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
        },
        without={
            "score_cap": 0.0, "logit_cap": 0.0, "embed_scale": 1.0, "attention_scale": None,
            "layers": (1, 1, 1, 1),
        },
    ),
    "gemma": Row(
        "Gemma 2B, 7B", _WIDE | _TIED | {"model_type": "gemma"},
        without={"embed_scale": 1.0, "norm_offset": 0.0, "activation": "silu"},
    ),
    "granite": Row(
        "Granite 3 dense", _COMMON | _GRANITE | {"model_type": "granite"},
        without={
            "embed_scale": 1.0, "residual_scale": 1.0, "attention_scale": None, "logit_scale": 1.0,
        },
    ),
    "granite4": Row(
        "Granite 4 350M, 1B, micro (dense)",
        _COMMON | _GRANITE | {
            "model_type": "granitemoehybrid", "layer_types": ["attention"] * 4,
            "num_local_experts": 0, "shared_intermediate_size": 96, "intermediate_size": 64,
            "position_embedding_type": "nope",
        },
        without={"residual_scale": 1.0},
    ),
    "smollm3": Row(
        "SmolLM3 3B", _COMMON | _TIED | {"model_type": "smollm3"}, without={"layers": (0, 0, 0, 0)}
    ),
    "smollm3-interval-2": Row(
        "", _COMMON | _TIED | {"model_type": "smollm3", "no_rope_layer_interval": 2},
        refused={"gguf": "which layers rotate"},
    ),
    "olmo2": Row(
        "OLMo 2 1B, 7B, 13B", _COMMON | {"model_type": "olmo2"}, without={"branch_eps": 1e-6}
    ),
    "olmo3": Row(
        "OLMo 3 7B",
        _COMMON | {
            "model_type": "olmo3", "sliding_window": WINDOW, "max_position_embeddings": 256,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
        without={"layers": (1, 1, 1, 1)},
    ),
    "gpt2": Row(
        "GPT-2",
        _NO_DROPOUT | {
            "model_type": "gpt2", "vocab_size": 512, "n_embd": 64, "n_layer": 4, "n_head": 4,
            "n_positions": 128, "layer_norm_epsilon": 0.02,
        },
        without={"activation": "relu2", "learned_positions": 0},
    ),
    "gpt_neo": Row(
        "TinyStories 1M to 33M, GPT-Neo 125M",
        {
            "model_type": "gpt_neo", "vocab_size": 512, "hidden_size": 64, "num_layers": 4,
            "num_heads": 4, "max_position_embeddings": 128, "window_size": WINDOW,
            "attention_types": [[["global", "local"], 2]], "layer_norm_epsilon": 0.02,
            "attention_dropout": 0.0, "resid_dropout": 0.0, "embed_dropout": 0.0,
        },
        told=_IGNORED,
        without={"attention_scale": None, "layers": (0, 0, 0, 0)},
    ),
    "llama4_text": Row(
        "MobileLLM-R1 140M, 360M, 950M", _WIDE | _LLAMA4 | {"no_rope_layers": [1, 1, 1, 1]},
        without={"qk_norm": "", "rope_pairs": False},
    ),
    "llama4_text-nope": Row(
        "", _WIDE | _LLAMA4 | {"no_rope_layers": [1, 1, 1, 0]},
        refused={"gguf": "without rotation (NoPE)"}, without={"layers": (0, 0, 0, 0)},
    ),
    "starcoder2": Row(
        "StarCoder2 3B, 7B, 15B",
        _COMMON | _TIED | {
            "model_type": "starcoder2", "norm_epsilon": 0.02, "sliding_window": WINDOW,
            "residual_dropout": 0.0, "embedding_dropout": 0.0,
        },
        told=_IGNORED,
        without={"kinds": "no window"},
    ),
    "ernie4_5": Row(
        "ERNIE 4.5 0.3B", _WIDE | _TIED | {"model_type": "ernie4_5"},
        without={"rope_pairs": False},
    ),
    "hunyuan_v1_dense": Row(
        "Hunyuan 0.5B to 7B dense",
        _WIDE | {
            "model_type": "hunyuan_v1_dense",
            "rope_scaling": {
                "type": "dynamic", "alpha": 100.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1,
                "mscale": 1.0, "mscale_all_dim": 1.0,
            },
        },
        without={"qk_norm_after_rope": False},
    ),
    "cohere": Row(
        "Command R, Aya 8B",
        _COMMON | _LAYER_NORM | _TIED | {"model_type": "cohere", "logit_scale": 0.3},
        without={"logit_scale": 1.0, "rope_pairs": False},
    ),
    "cohere2": Row(
        "Command R7B 12-2024, tiny-aya",
        _COMMON | _LAYER_NORM | _TIED | {
            "model_type": "cohere2", "logit_scale": 0.3, "sliding_window": WINDOW,
        },
        without={"layers": (0, 0, 0, 0)},
    ),
    "glm": Row(
        "GLM-Edge 1.5B, GLM-4-9B-hf",
        _COMMON | {
            "model_type": "glm", "partial_rotary_factor": 0.5, "attention_bias": True,
            "head_dim": 32,
        },
        without={"rope_pairs": False},
    ),
    "glm4": Row(
        "GLM-4-9B-0414",
        _WIDE | {"model_type": "glm4", "partial_rotary_factor": 0.5, "attention_bias": True},
        without={"branch_eps": 1e-6},
    ),
    "exaone4": Row(
        "EXAONE 4 1.2B",
        _COMMON | {
            "model_type": "exaone4", "sliding_window": None, "layer_types": ["full_attention"] * 4,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
        without={"qk_norm": ""},
    ),
    "exaone4-window": Row(
        "", _COMMON | {"model_type": "exaone4", "sliding_window": WINDOW},
        refused={"gguf": "64 layers only"}, without={"layers": (0, 0, 0, 0)},
    ),
    "gpt_neox": Row("Pythia, GPT-NeoX", _NEOX, without={"parallel_residual": False}),
    "gpt_neox-serial": Row(
        "", _NEOX | {"use_parallel_residual": False}, without={"parallel_residual": True}
    ),
    "stablelm": Row(
        "StableLM 2 1.6B, Zephyr 3B",
        _COMMON | _LAYER_NORM
        | {"model_type": "stablelm", "hidden_size": 256, "use_qkv_bias": True},
        without={"norm_eps": 1e-6},
    ),
    "helium": Row(
        "Helium 2B", _COMMON | {"model_type": "helium", "head_dim": 32},
        without={"rope_pairs": False},
    ),
    "nemotron": Row(
        "Minitron 4B", _COMMON | {
            "model_type": "nemotron", "norm_eps": 0.02, "partial_rotary_factor": 0.5,
            "head_dim": 32,
        },
        without={"norm_offset": 0.0, "activation": "gelu"},
    ),
    "arcee": Row("AFM 4.5B", _WIDE | {"model_type": "arcee"}, without={"activation": "gelu"}),
    "falcon": Row(
        "Falcon 7B",
        {
            "model_type": "falcon", "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4,
            "num_attention_heads": 4, "layer_norm_epsilon": 0.02, "max_position_embeddings": 128,
            **_TIED,
        },
        without={"parallel_residual": "sequential"},
    ),
    "falcon-40b": Row(
        "Falcon 40B, 180B",
        {
            "model_type": "falcon", "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4,
            "num_attention_heads": 4, "layer_norm_epsilon": 0.02, "max_position_embeddings": 128,
            "new_decoder_architecture": True, "num_kv_heads": 2, **_TIED,
        },
        without={"parallel_residual": "sequential"},
    ),
    "ministral": Row(
        "Ministral 8B 2410",
        _COMMON | {
            "model_type": "ministral", "sliding_window": WINDOW, "head_dim": 32,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
        told=_IGNORED,
        without={"layers": (0, 0, 0, 0)},
    ),
    "qwen2-mixed": Row(
        "Qwen2, 2.5 with use_sliding_window",
        _COMMON | {
            "model_type": "qwen2", "use_sliding_window": True, "sliding_window": WINDOW,
            "max_window_layers": 2,
        },
        told=_IGNORED,
        without={"layers": (0, 0, 0, 0)},
    ),
    "qwen3-mixed": Row(
        "Qwen3 with use_sliding_window",
        _WIDE | {
            "model_type": "qwen3", "use_sliding_window": True, "sliding_window": WINDOW,
            "max_window_layers": 2,
        },
        told=_IGNORED,
        without={"layers": (0, 0, 0, 0)},
    ),
    "mixtral": Row(
        "Mixtral 8x7B, 8x22B", _COMMON | _LOCAL | {"model_type": "mixtral"},
        refused=_EXPERTS, without={"experts": {"renormalize": False}},
    ),
    "phimoe": Row(
        "Phi-3.5-MoE, Phi-mini-MoE, Phi-tiny-MoE",
        _COMMON | _LOCAL | {
            "model_type": "phimoe", "num_experts_per_tok": 2, "router_jitter_noise": 0.3,
            "attention_bias": True, "lm_head_bias": True,
        },
        refused=_EXPERTS | {"gguf": "RMSNorm in place of LayerNorm"},
        without={"experts": {"jitter": 0.1}},
    ),
    "qwen3_moe": Row(
        "Qwen3 30B-A3B, 235B-A22B",
        _WIDE | _MOE | {"model_type": "qwen3_moe", "norm_topk_prob": True},
        refused=_EXPERTS, without={"experts": {"renormalize": False}, "qk_norm": ""},
    ),
    "qwen3_moe-plain": Row(
        "", _WIDE | _MOE | {"model_type": "qwen3_moe", "norm_topk_prob": False},
        refused=_EXPERTS | {"gguf": "norm_topk_prob is false"},
        without={"experts": {"renormalize": True}},
    ),
    "qwen2_moe": Row(
        "Qwen1.5-MoE A2.7B, Qwen2 57B-A14B",
        _COMMON | _MOE | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 64},
        refused=_EXPERTS, without={"experts": {"shared_gate": False}},
    ),
    "olmoe": Row(
        "OLMoE 1B-7B",
        _COMMON | _MOE | {"model_type": "olmoe", "num_key_value_heads": 4},
        refused=_EXPERTS, without={"experts": {"renormalize": True}, "qk_norm": ""},
    ),
    "gpt_oss": Row(
        "gpt-oss 20B, 120B",
        _WIDE | _LOCAL | {
            "model_type": "gpt_oss", "sliding_window": WINDOW,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
            },
        },
        refused=_EXPERTS,
        without={
            "sinks": False, "layers": (1, 1, 1, 1), "experts": {"clamp": 0.0, "biased": False},
        },
    ),
    "granitemoe": Row(
        "Granite 3 1B-A400M, 3B-A800M",
        _COMMON | _GRANITE | _LOCAL | {"model_type": "granitemoe"},
        refused=_EXPERTS, without={"residual_scale": 1.0, "experts": {"renormalize": False}},
    ),
    "granitemoeshared": Row(
        "Granite 3 with a shared expert",
        _COMMON | _GRANITE | _LOCAL
        | {"model_type": "granitemoeshared", "shared_intermediate_size": 64},
        refused=_EXPERTS, without={"residual_scale": 1.0},
    ),
    "lfm2": Row(
        "LFM2 and LFM2.5 350M, 700M, 1.2B, 2.6B",
        _COMMON | _TIED | {
            "model_type": "lfm2", "norm_eps": 0.02, "intermediate_size": 100,
            "block_multiple_of": 32, "conv_L_cache": 3, "rope_theta": 1e6,
            "layer_types": ["conv", "conv", "full_attention", "conv"],
        },
        refused=_CONV, without={"taps": 1, "qk_norm": "", "norm_eps": 1e-6, "branch_eps": 1e-6},
    ),
}  # fmt: skip
