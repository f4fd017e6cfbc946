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
_MOBILE = _kind("MobileLLM", share_embedding=True, max_position_embeddings=2048)

# Model → (tokenizer of tests/tiny_tokenizers.py, its pieces before added tokens, config.json).
MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "mobilellm-125m": ("mobilellm", 32000, _llama(576, 30, 9, 3, 1536, 32000) | _MOBILE),
    "mobilellm-350m": ("mobilellm", 32000, _llama(960, 32, 15, 5, 2560, 32000) | _MOBILE),
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
}
