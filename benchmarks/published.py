"""Shapes and settings of published models, as their ``config.json`` has them; parameter counts are
checked in ``tests/test_make_checkpoint.py``.
"""

from __future__ import annotations

from typing import Any


def _llama(hidden: int, layers: int, heads: int, kv: int, ffn: int, vocab: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }


def _kind(name: str, **keys: Any) -> dict[str, Any]:
    return {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), **keys}


_PHI3 = _kind("Phi3", max_position_embeddings=4096, original_max_position_embeddings=4096)
_TIED = {"tie_word_embeddings": True}
_LLAMA32 = {
    **_TIED,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
# Phi-3.5's published factors are 48 numbers each; these rise like them, from 1 to 2.8 and to 65.
_LONG = {
    "max_position_embeddings": 131072,
    "sliding_window": 262144,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [round(1.0 + 1.84 * i / 47, 2) for i in range(48)],
        "long_factor": [round(1.08 * 60 ** (i / 47), 2) for i in range(48)],
    },
}
_SMOL = _TIED | {"rope_theta": 100000.0}
_QWEN = _TIED | {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}
_PHI = _kind("Phi", max_position_embeddings=2048, layer_norm_eps=1e-5, hidden_act="gelu_new")
# Sizes: github.com/facebookresearch/MobileLLM, configs/*/config.json at 1e67bf6, where the class is
# llama's; the Hub's config.json have their own class, and say what is shared. MobileLLM-Pro needs
# code of its own.
_MOBILE = _kind("MobileLLM", share_embedding=True, max_position_embeddings=2048)
_SHARED = _MOBILE | {"layer_sharing": True}

_GEMMA: dict[str, Any] = {"head_dim": 256, "max_position_embeddings": 8192}
_GEMMA3 = _kind("Gemma3", model_type="gemma3_text", query_pre_attn_scalar=256, rope_theta=1e6)
_GEMMA3 |= {"rope_local_base_freq": 1e4, "sliding_window": 512, "sliding_window_pattern": 6}
_GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0}
_R1 = _kind("Llama4", model_type="llama4_text", head_dim=64, num_local_experts=0, moe_layers=[])
_R1 |= {"no_rope_layer_interval": 4, "attention_chunk_size": 32768, "rope_theta": 500000.0}
_NORM = {"layer_norm_eps": 1e-5}


def _lfm2(hidden: int, heads: int, ffn: int) -> dict[str, Any]:
    """Of LFM2: six of sixteen layers attend; the MLP has two thirds of ``ffn``."""
    keys = _llama(hidden, 16, heads, 8, ffn, 65536) | _TIED | _kind("Lfm2", norm_eps=1e-5)
    attending = (2, 5, 8, 10, 12, 14)
    types = ["full_attention" if i in attending else "conv" for i in range(16)]
    own = {"block_ff_dim": ffn, "block_multiple_of": 256, "block_auto_adjust_ff_dim": True}
    return keys | own | {
        "layer_types": types, "conv_L_cache": 3, "rope_theta": 1e6,
        "max_position_embeddings": 128_000,
    }  # fmt: skip


def _r1(hidden: int, layers: int, heads: int, kv: int, mlp: int) -> dict[str, Any]:
    keys = _llama(hidden, layers, heads, kv, 8192, 128256) | _R1 | _TIED
    return keys | {"intermediate_size_mlp": mlp, "no_rope_layers": [1] * layers}


def _gpt_neo(hidden: int, layers: int) -> dict[str, Any]:
    """A model of TinyStories."""
    return {
        "architectures": ["GPTNeoForCausalLM"],
        "model_type": "gpt_neo",
        "vocab_size": 50257,
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": 16,
        "max_position_embeddings": 2048,
        "window_size": 256,
        "attention_types": [[["global", "local"], layers // 2]],
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
    }


# Model → (tokenizer of tests/tiny_tokenizers.py, its pieces before added tokens, config.json).
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "mobilellm-125m": ("mobilellm", 32000, _llama(576, 30, 9, 3, 1536, 32000) | _MOBILE),
    "mobilellm-350m": ("mobilellm", 32000, _llama(960, 32, 15, 5, 2560, 32000) | _MOBILE),
    "mobilellm-600m": ("mobilellm", 32000, _llama(1152, 40, 18, 6, 3072, 32000) | _MOBILE),
    "mobilellm-1b": ("mobilellm", 32000, _llama(1280, 54, 20, 5, 3584, 32000) | _MOBILE),
    "mobilellm-1.5b": ("mobilellm", 32000, _llama(1600, 54, 25, 5, 4352, 32000) | _MOBILE),
    "mobilellm-ls-125m": ("mobilellm", 32000, _llama(576, 30, 9, 3, 1536, 32000) | _SHARED),
    "mobilellm-ls-350m": ("mobilellm", 32000, _llama(960, 32, 15, 5, 2560, 32000) | _SHARED),
    "smollm2-135m": ("qwen2", 49149, _llama(576, 30, 9, 3, 1536, 49152) | _SMOL),
    "smollm2-360m": ("qwen2", 49149, _llama(960, 32, 15, 5, 2560, 49152) | _SMOL),
    "qwen2.5-0.5b": (
        "qwen2",
        151643,
        _llama(896, 24, 14, 2, 4864, 151936) | _QWEN | _kind("Qwen2"),
    ),
    "qwen3-0.6b": (
        "qwen3",
        151643,
        _llama(1024, 28, 16, 8, 3072, 151936) | _QWEN | _kind("Qwen3", head_dim=128),
    ),
    "llama-3.2-1b": ("llama3", 128000, _llama(2048, 16, 32, 8, 8192, 128256) | _LLAMA32),
    "phi-1.5": (
        "phi",
        50256,
        _llama(2048, 24, 32, 32, 8192, 51200) | _PHI | {"partial_rotary_factor": 0.5},
    ),
    "phi-2": (
        "phi",
        50256,
        _llama(2560, 32, 32, 32, 10240, 51200) | _PHI | {"partial_rotary_factor": 0.4},
    ),
    "llama-3.2-3b": ("llama3", 128000, _llama(3072, 28, 24, 8, 8192, 128256) | _LLAMA32),
    "phi-3-mini-4k": (
        "phi3",
        32000,
        _llama(3072, 32, 32, 32, 8192, 32064) | _PHI3 | {"sliding_window": 2047},
    ),
    "phi-3.5-mini": ("phi3-longrope", 32000, _llama(3072, 32, 32, 32, 8192, 32064) | _PHI3 | _LONG),
    "phi-4-mini": (
        "phi4-mini",
        199999,
        _llama(3072, 32, 24, 8, 8192, 200064)
        | _PHI3
        | _LONG
        | _TIED
        | {"partial_rotary_factor": 0.75},
    ),
    "llama-2-7b": ("llama", 32000, _llama(4096, 32, 32, 32, 11008, 32000)),
    "mistral-7b": (
        "mistral",
        32000,
        _llama(4096, 32, 32, 8, 14336, 32000) | _kind("Mistral", sliding_window=4096),
    ),
    "llama-3-8b": (
        "llama3",
        128000,
        _llama(4096, 32, 32, 8, 14336, 128256) | {"rope_theta": 500000.0},
    ),
    "phi-3-medium-4k": (
        "phi3",
        32000,
        _llama(5120, 40, 40, 10, 17920, 32064) | _PHI3 | {"sliding_window": 2047},
    ),
    "gemma-3-270m": (
        "gemma3", 262144, _llama(640, 18, 4, 1, 2048, 262144) | _GEMMA | _GEMMA3 | _TIED,
    ),
    "gemma-3-1b": (
        "gemma3", 262144, _llama(1152, 26, 4, 1, 6912, 262144) | _GEMMA | _GEMMA3 | _TIED,
    ),
    "gemma-2-2b": (
        "gemma2",
        256000,
        _llama(2304, 26, 8, 4, 9216, 256000)
        | _GEMMA
        | _TIED
        | _kind("Gemma2", sliding_window=4096, query_pre_attn_scalar=256)
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "granite-3-2b": (
        "granite",
        49152,
        _llama(2048, 40, 32, 8, 8192, 49155)
        | _GRANITE
        | _TIED
        | _kind("Granite", attention_multiplier=0.015625),
    ),
    "smollm3-3b": (
        "llama3",
        128000,
        _llama(2048, 36, 16, 4, 11008, 128256)
        | _TIED
        | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "rope_theta": 5e6},
    ),
    "olmo-2-1b": (
        "llama3",
        100278,
        _llama(2048, 16, 16, 16, 8192, 100352) | _kind("Olmo2", rope_theta=500000.0),
    ),
    "gpt2": (
        "phi",
        50256,
        {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50257,
            "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
            "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        },
    ),
    "tinystories-1m": ("phi", 50256, _gpt_neo(64, 8)),
    "tinystories-33m": ("phi", 50256, _gpt_neo(768, 4)),
    "mobilellm-r1-140m": ("llama3", 128000, _r1(576, 15, 9, 3, 2048)),
    "mobilellm-r1-360m": ("llama3", 128000, _r1(1024, 15, 16, 4, 4096)),
    "mobilellm-r1-950m": ("llama3", 128000, _r1(1536, 22, 24, 6, 6144)),
    "starcoder2-3b": (
        "phi",
        49151,
        _llama(3072, 30, 24, 2, 12288, 49152)
        | _TIED
        | _kind("Starcoder2", norm_epsilon=1e-5, sliding_window=4096, use_bias=True)
        | {"hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 16384},
    ),
    "stablelm-2-1.6b": (
        "qwen2",
        100288,
        _llama(2048, 24, 32, 32, 5632, 100352)
        | _NORM
        | {"architectures": ["StableLmForCausalLM"], "model_type": "stablelm"}
        | {"partial_rotary_factor": 0.25, "use_qkv_bias": True, "max_position_embeddings": 4096},
    ),
    "pythia-160m": (
        "phi",
        50254,
        _llama(768, 12, 12, 12, 3072, 50304)
        | _NORM
        | {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}
        | {"hidden_act": "gelu", "rotary_pct": 0.25, "max_position_embeddings": 2048},
    ),
    "command-r7b": (
        "qwen2",
        255000,
        _llama(4096, 32, 32, 8, 14336, 256000)
        | _NORM
        | _TIED
        | _kind("Cohere2", logit_scale=0.25, sliding_window=4096, rope_theta=50000.0),
    ),
    "ernie-4.5-0.3b": (
        "llama",
        32000,
        _llama(1024, 18, 16, 2, 3072, 103424)
        | _TIED
        | _kind("Ernie4_5", head_dim=128, rope_theta=500000.0),
    ),
    "falcon-7b": (
        "phi",
        65023,
        {
            "architectures": ["FalconForCausalLM"], "model_type": "falcon", "vocab_size": 65024,
            "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
            "multi_query": True, "parallel_attn": True, "layer_norm_epsilon": 1e-5,
        },
    ),
    "mixtral-8x7b": (
        "llama",
        32000,
        _llama(4096, 32, 32, 8, 14336, 32000)
        | _kind("Mixtral", rope_theta=1e6, max_position_embeddings=32768, sliding_window=None)
        | {"num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "phi-3.5-moe": (
        "phi3-longrope",
        32000,
        _llama(4096, 32, 32, 8, 6400, 32064)
        | _kind("PhiMoE", attention_bias=True, lm_head_bias=True, max_position_embeddings=131072)
        | {"num_local_experts": 16, "num_experts_per_tok": 2, "router_jitter_noise": 0.01},
    ),
    "gpt-oss-20b": (
        "phi4-mini",
        199998,
        _llama(2880, 24, 64, 8, 2880, 201088)
        | _kind("GptOss", model_type="gpt_oss", head_dim=64, sliding_window=128)
        | {"rope_theta": 150000.0, "max_position_embeddings": 131072}
        | {"num_local_experts": 32, "num_experts_per_tok": 4}
        | {"rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 4096,
        }},
    ),
    "falcon-40b": (
        "phi",
        65023,
        {
            "architectures": ["FalconForCausalLM"], "model_type": "falcon", "vocab_size": 65024,
            "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128,
            "num_kv_heads": 8, "new_decoder_architecture": True, "layer_norm_epsilon": 1e-5,
        },
    ),
    "qwen3-30b-a3b": (
        "qwen3",
        151643,
        _llama(2048, 48, 32, 4, 6144, 151936)
        | _kind("Qwen3Moe", model_type="qwen3_moe", head_dim=128, moe_intermediate_size=768)
        | {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960}
        | {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
    ),
    "qwen1.5-moe-a2.7b": (
        "qwen2",
        151643,
        _llama(2048, 24, 16, 16, 5632, 151936)
        | _kind("Qwen2Moe", model_type="qwen2_moe", moe_intermediate_size=1408)
        | {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "shared_expert_intermediate_size": 5632}
        | {"num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False},
    ),
    "lfm2-350m": ("llama3", 64400, _lfm2(1024, 16, 6656)),
    "lfm2-700m": ("llama3", 64400, _lfm2(1536, 24, 10240)),
    "lfm2-1.2b": ("llama3", 64400, _lfm2(2048, 32, 12288)),
    "olmoe-1b-7b": (
        "phi",
        50254,
        _llama(2048, 16, 16, 16, 1024, 50304)
        | _kind("Olmoe", num_experts=64, num_experts_per_tok=8, norm_topk_prob=False),
    ),
    "granite-3.1-1b-a400m": (
        "granite",
        49152,
        _llama(1024, 24, 16, 8, 512, 49155)
        | _GRANITE
        | _TIED
        | _kind("GraniteMoe", attention_multiplier=0.015625, logits_scaling=6.0)
        | {"num_local_experts": 32, "num_experts_per_tok": 8},
    ),
}  # fmt: skip
