"""The table of decoder families: how each differs from llama, and its tensor names. Sources: the
``config.json`` keys, defaults and tensor names of transformers 4.57.6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from compress.decoder.config_json import Config, flag, number, short, token_ids, whole
from compress.decoder.rope import Rope, llama3_factors, longrope, yarn
from compress.errors import UnsupportedModelError

# Limits far above any model, so that a damaged config cannot fill the memory with a table.
MOST_LAYERS = 10_000
MOST_WIDE = 2**20
MOST_WORDS = 2**26

_BLOCK = "model.layers.{i}."
PHI3_NAMES: dict[str, str] = {
    "embed_tokens": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "input_layernorm": _BLOCK + "input_layernorm",
    "post_attention_layernorm": _BLOCK + "post_attention_layernorm",
    "qkv_proj": _BLOCK + "self_attn.qkv_proj",
    "o_proj": _BLOCK + "self_attn.o_proj",
    "gate_up_proj": _BLOCK + "mlp.gate_up_proj",
    "down_proj": _BLOCK + "mlp.down_proj",
}
LLAMA_NAMES: dict[str, str] = {
    "embed_tokens": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "input_layernorm": _BLOCK + "input_layernorm",
    "post_attention_layernorm": _BLOCK + "post_attention_layernorm",
    "q_proj": _BLOCK + "self_attn.q_proj",
    "k_proj": _BLOCK + "self_attn.k_proj",
    "v_proj": _BLOCK + "self_attn.v_proj",
    "o_proj": _BLOCK + "self_attn.o_proj",
    "gate_proj": _BLOCK + "mlp.gate_proj",
    "up_proj": _BLOCK + "mlp.up_proj",
    "down_proj": _BLOCK + "mlp.down_proj",
}
QWEN3_NAMES: dict[str, str] = LLAMA_NAMES | {
    "q_norm": _BLOCK + "self_attn.q_norm",
    "k_norm": _BLOCK + "self_attn.k_norm",
}
PHI_NAMES: dict[str, str] = {
    "embed_tokens": "model.embed_tokens",
    "norm": "model.final_layernorm",
    "lm_head": "lm_head",
    "input_layernorm": _BLOCK + "input_layernorm",
    "q_proj": _BLOCK + "self_attn.q_proj",
    "k_proj": _BLOCK + "self_attn.k_proj",
    "v_proj": _BLOCK + "self_attn.v_proj",
    "o_proj": _BLOCK + "self_attn.dense",
    "up_proj": _BLOCK + "mlp.fc1",
    "down_proj": _BLOCK + "mlp.fc2",
}


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        names: role → tensor name on disk, without ``.weight``; ``{i}`` is the block.
        changes: the fields of ``DecoderConfig`` that differ from llama's reading of the config.
        model_type, architecture: for the ``config.json`` beside an artifact.
        norm_eps: the family's default.
        partial_rotary: the family's default share of a head that rotates.
        head_dim: the family's default, or 0 for hidden size divided by heads.
    """

    names: Mapping[str, str]
    changes: Callable[[Config], dict[str, Any]]
    model_type: str
    architecture: str
    norm_eps: float = 1e-6
    partial_rotary: float = 1.0
    head_dim: int = 0

    def describe(self, config: Config, generation: Config) -> dict[str, Any]:
        """Fields of a ``DecoderConfig``: llama's reading of the keys, then this family's changes.

        Raises:
            KeyError, ValueError: a key is missing or its value impossible.
            UnsupportedModelError: a setting that packlight does not support.
        """
        heads = whole(config, "num_attention_heads", most=MOST_WIDE)
        hidden = whole(config, "hidden_size", most=MOST_WIDE)
        positions = whole(config, "max_position_embeddings")
        head_dim = whole(config, "head_dim", self.head_dim or hidden // heads, most=MOST_WIDE)
        rope = read_rope(config, head_dim, self.partial_rotary)
        bos = token_ids(config, "bos_token_id", most=1)
        pad = token_ids(config, "pad_token_id", most=1)
        fields: dict[str, Any] = {
            "model_type": self.model_type,
            "architecture": self.architecture,
            "vocab_size": whole(config, "vocab_size", most=MOST_WORDS),
            "hidden_size": hidden,
            "intermediate_size": whole(config, "intermediate_size", most=MOST_WIDE),
            "num_hidden_layers": whole(config, "num_hidden_layers", most=MOST_LAYERS),
            "num_attention_heads": heads,
            "num_key_value_heads": whole(config, "num_key_value_heads", heads, most=MOST_WIDE),
            "head_dim": head_dim,
            "norm": "rmsnorm",
            "norm_eps": number(config, "rms_norm_eps", self.norm_eps),
            "activation": config.get("hidden_act") or "silu",
            "gated_mlp": True,
            "parallel_residual": False,
            "qkv_bias": False,
            "o_bias": False,
            "mlp_bias": False,
            "lm_head_bias": False,
            "qk_norm": False,
            "tie_word_embeddings": flag(config, "tie_word_embeddings"),
            "rope": rope,
            "sliding_window": None,
            "max_position_embeddings": positions,
            "max_context": min(positions, rope.original_context or positions),
            "bos_token_id": bos[0] if bos else None,
            # Both files, generation_config first: Phi-3's config alone never stops a chat.
            "eos_token_ids": tuple(
                dict.fromkeys(
                    token_ids(generation, "eos_token_id") + token_ids(config, "eos_token_id")
                )
            ),
            "pad_token_id": pad[0] if pad else None,
            "raw": dict(config),
        }
        fields |= self.changes(config)
        window = fields["sliding_window"]
        if window is not None and window >= fields["max_context"]:
            fields["sliding_window"] = None  # never reached: 262144 in Phi-3-128k
        return fields


def _llama(config: Config) -> dict[str, Any]:
    bias = flag(config, "attention_bias")
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": flag(config, "mlp_bias")}


def _mistral(config: Config) -> dict[str, Any]:
    # A missing key means 4096, null means none, as in transformers.
    return _phi3(config) if "sliding_window" in config else {"sliding_window": 4096}


def _phi3(config: Config) -> dict[str, Any]:
    return {"sliding_window": whole(config, "sliding_window", 0) or None}


def _phi(config: Config) -> dict[str, Any]:
    if flag(config, "qk_layernorm"):
        raise UnsupportedModelError("phi with qk_layernorm is not supported")
    activation = config.get("hidden_act") or "gelu_new"
    return {
        "norm": "layernorm",
        "norm_eps": number(config, "layer_norm_eps", 1e-5),
        # Two names of the same function.
        "activation": "gelu_new" if activation == "gelu_pytorch_tanh" else activation,
        "gated_mlp": False,
        "parallel_residual": True,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "lm_head_bias": True,
    }


def _qwen2(config: Config) -> dict[str, Any]:
    if flag(config, "use_sliding_window"):
        raise UnsupportedModelError(
            "qwen models that mix windowed and full attention (use_sliding_window) are not "
            "supported",
            hint="set use_sliding_window to false where the model was trained without it",
        )
    return {"qkv_bias": True}


def _qwen3(config: Config) -> dict[str, Any]:
    bias = flag(config, "attention_bias")
    return _qwen2(config) | {"qkv_bias": bias, "o_bias": bias, "qk_norm": True}


def _mobilellm(config: Config) -> dict[str, Any]:
    # The Hub's class ties through `share_embedding` while `tie_word_embeddings` says false;
    # read as plain llama it would get a random head. Layer sharing runs each block twice.
    repeat = 2 if flag(config, "layer_sharing") else 1
    layers = whole(config, "num_hidden_layers", most=MOST_LAYERS)
    return _llama(config) | {
        "tie_word_embeddings": any(
            flag(config, key) for key in ("share_embedding", "tie_word_embeddings")
        ),
        "block_repeat": repeat,
        "num_hidden_layers": repeat * layers,
    }


FAMILIES: dict[str, Family] = {
    "llama": Family(LLAMA_NAMES, _llama, "llama", "LlamaForCausalLM"),
    "mistral": Family(LLAMA_NAMES, _mistral, "mistral", "MistralForCausalLM"),
    "phi3": Family(PHI3_NAMES, _phi3, "phi3", "Phi3ForCausalLM", norm_eps=1e-5),
    "phi": Family(PHI_NAMES, _phi, "phi", "PhiForCausalLM", partial_rotary=0.5),
    "qwen2": Family(LLAMA_NAMES, _qwen2, "qwen2", "Qwen2ForCausalLM"),
    "qwen3": Family(QWEN3_NAMES, _qwen3, "qwen3", "Qwen3ForCausalLM", head_dim=128),
    "mobilellm": Family(LLAMA_NAMES, _mobilellm, "llama", "LlamaForCausalLM"),
}

ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Phi3ForCausalLM": "phi3",
    "PhiForCausalLM": "phi",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MobileLLMForCausalLM": "mobilellm",
}


def find_family(config: Config) -> str:
    """The row of ``FAMILIES`` for a ``config.json``.

    Raises:
        UnsupportedModelError: not in the table, already quantized, or in need of code from the
            checkpoint.
    """
    architectures = config.get("architectures") or [None]
    name = architectures[0] if isinstance(architectures, list) else architectures
    model_type = config.get("model_type")
    supported = f"supported: {', '.join(ARCHITECTURES)}"
    family = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if name is None and isinstance(model_type, str) and model_type in FAMILIES:
        family = model_type
    if family is None:
        label = name or model_type
        if label is None:
            label = "config.json names none"
        elif not isinstance(label, str) or len(label) > 80 or not label.isprintable():
            label = short(label)
        if config.get("auto_map"):
            raise UnsupportedModelError(
                f"{label} needs the checkpoint's own code, which packlight never executes",
                hint=supported,
            )
        raise UnsupportedModelError(f"unknown architecture: {label}", hint=supported)
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UnsupportedModelError(
            f"the checkpoint is quantized already ({short(method or 'quantization_config')})",
            hint="start from the float checkpoint it was made of",
        )
    if family == "llama" and (config.get("share_embedding") or config.get("layer_sharing")):
        return "mobilellm"  # spelling of Meta's GitHub configs
    return family


def read_rope(config: Config, head_dim: int, partial: float = 1.0) -> Rope:
    """Rotary settings from ``rope_theta``/``rope_scaling`` or the newer ``rope_parameters``.

    ``longrope`` (Phi-3-128k, 3.5, Phi-4-mini; also spelled ``su``) keeps the short factors: they
    hold up to ``original_max_position_embeddings``.

    Args:
        partial: the family's share of a head that rotates, where the config names none.

    Raises:
        UnsupportedModelError: another scaling.
        KeyError, ValueError: a key is missing or its value impossible.
    """
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise ValueError("rope_scaling is not an object")
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise UnsupportedModelError("rope settings that differ between layers are not supported")
    both = {**config, **{key: value for key, value in scaling.items() if value is not None}}
    theta = number(both, "rope_theta", 10000.0)
    rotary = int(head_dim * number(both, "partial_rotary_factor", partial))
    if rotary % 2 or not 2 <= rotary <= head_dim:
        raise ValueError(f"{rotary} rotating dimensions do not fit heads of {head_dim}")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    half = rotary // 2
    if kind == "default":
        return Rope(theta, kind, rotary, (1.0,) * half)
    if kind == "linear":
        return Rope(theta, kind, rotary, (number(scaling, "factor"),) * half)
    if kind == "llama3":
        return Rope(theta, kind, rotary, llama3_factors(theta, rotary, scaling))
    # transformers reads the early Phi-3 spellings as longrope too.
    if kind in ("longrope", "su") or (kind == "yarn" and "short_factor" in scaling):
        return longrope(theta, rotary, both)
    if kind == "yarn":
        return yarn(theta, rotary, scaling, whole(config, "max_position_embeddings"))
    if kind == "dynamic":
        number(scaling, "factor")
        positions = whole(config, "max_position_embeddings")
        caveat = (
            f"rope scaling 'dynamic' changes nothing up to {positions} positions, which is what "
            "artifacts hold; beyond them transformers changes its frequencies as a text grows"
        )
        return Rope(theta, kind, rotary, (1.0,) * half, caveat=caveat)
    raise UnsupportedModelError(
        f"rope scaling {short(kind)} is not supported",
        hint="supported: default, linear, dynamic, yarn, llama3, longrope; where the model was "
        "trained without it, for contexts up to max_position_embeddings, remove rope_scaling",
    )
