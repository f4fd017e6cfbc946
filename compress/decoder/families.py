"""The table of decoder families: how each differs from llama, and its tensor names. Sources: the
``config.json`` keys, defaults and tensor names of transformers 4.57.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compress.decoder.classic_families import two_norms
from compress.decoder.config_json import Config, flag, number, short, token_ids, whole
from compress.decoder.dense_families import DENSE
from compress.decoder.expert_families import EXPERTS
from compress.decoder.family import (
    LLAMA_NAMES,
    MOST_LAYERS,
    MOST_WIDE,
    MOST_WORDS,
    PHI3_NAMES,
    PHI_NAMES,
    QWEN3_NAMES,
    Family,
    layer_kinds,
)
from compress.decoder.grammar import AttentionKind
from compress.decoder.rope import Rope, llama3_factors, longrope, yarn
from compress.decoder.state_families import STATES
from compress.errors import UnsupportedModelError

# Other names of the same activation.
SAME = {
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_python": "gelu",
}


def describe(
    family: Family, config: Config, generation: Config, context: int = 0
) -> dict[str, Any]:
    """Fields of a ``DecoderConfig``: llama's reading of the keys, then the family's changes.

    Args:
        context: see ``DecoderConfig.from_hf``.

    Raises:
        KeyError, ValueError: a key is missing or its value impossible.
        UnsupportedModelError: a setting that packlight does not support.
    """
    raw = dict(config)
    if family.keys:
        config = {**config, **{key: config.get(own) for key, own in family.keys.items()}}
    heads = whole(config, "num_attention_heads", most=MOST_WIDE)
    hidden = whole(config, "hidden_size", most=MOST_WIDE)
    positions = whole(config, "max_position_embeddings", family.positions or None)
    head_dim = whole(config, "head_dim", family.head_dim or hidden // heads, most=MOST_WIDE)
    changes = family.changes(config)
    settings = changes.pop("ropes", (config,))
    ropes = [read_rope(keys, head_dim, family.partial_rotary) for keys in settings]
    original = ropes[0].original_context or positions
    most = min(positions, max(original, context))
    layers = whole(config, "num_hidden_layers", most=MOST_LAYERS)
    bos = token_ids(config, "bos_token_id", most=1)
    pad = token_ids(config, "pad_token_id", most=1)
    fields: dict[str, Any] = {
        "model_type": family.model_type,
        "architecture": family.architecture,
        "vocab_size": whole(config, "vocab_size", most=MOST_WORDS),
        "hidden_size": hidden,
        "intermediate_size": changes.get("intermediate_size")
        or whole(config, "intermediate_size", most=MOST_WIDE),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": whole(config, "num_key_value_heads", heads, most=MOST_WIDE),
        "head_dim": head_dim,
        "norm_eps": number(config, "rms_norm_eps", family.norm_eps),
        "activation": config.get("hidden_act") or family.activation,
        "gated_mlp": True,
        "parallel_residual": False,
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
        "lm_head_bias": False,
        "tie_word_embeddings": flag(config, "tie_word_embeddings", family.tied),
        "ropes": tuple(ropes),
        "kinds": (AttentionKind(),),
        "max_position_embeddings": positions,
        "max_context": most,
        "rope_switch": original if most > original else 0,
        "bos_token_id": bos[0] if bos else None,
        # Both files, generation_config first: Phi-3's config alone never stops a chat.
        "eos_token_ids": tuple(
            dict.fromkeys(token_ids(generation, "eos_token_id") + token_ids(config, "eos_token_id"))
        ),
        "pad_token_id": pad[0] if pad else None,
        "raw": raw,
    }
    fields |= changes
    fields.setdefault("branch_eps", fields["norm_eps"])
    fields["activation"] = SAME.get(str(fields["activation"]), fields["activation"])
    fields.setdefault("layers", (0,) * fields["num_hidden_layers"])
    most, windows = fields["max_context"], []
    kinds = list(fields["kinds"])
    for i, kind in enumerate(kinds):
        if kind.window and kind.window >= most:  # never reached: 262144 in Phi-3-128k
            kinds[i] = replace(kind, window=None)
        elif kind.window:
            windows.append(kind.window)
    fields |= {"kinds": tuple(kinds), "sliding_window": min(windows, default=None)}
    scalars = {
        "attention": fields.get("attention_scale") not in (None, fields["head_dim"] ** -0.5),
        "residual": fields.get("residual_scale", 1.0) != 1.0,
        "embedding": fields.get("embed_scale", 1.0) != 1.0,
        "logits": fields.get("logit_scale", 1.0) != 1.0,
        "pairs": fields.get("rope_pairs", False),
        "unit": fields.get("qk_norm") == "unit",
    }
    fields["scalars"] = frozenset([name for name, there in scalars.items() if there])
    return fields


def _llama(config: Config) -> dict[str, Any]:
    bias = flag(config, "attention_bias")
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": flag(config, "mlp_bias")}


def _mistral(config: Config) -> dict[str, Any]:
    # A missing key means 4096, null means none, as in transformers.
    return _phi3(config) if "sliding_window" in config else {"kinds": (AttentionKind(window=4096),)}


def _phi3(config: Config) -> dict[str, Any]:
    window = whole(config, "sliding_window", 0) or None
    return {"kinds": (AttentionKind(window=window),)}


def _phi(config: Config) -> dict[str, Any]:
    if flag(config, "qk_layernorm"):
        raise UnsupportedModelError("phi with qk_layernorm is not supported")
    return {
        "norm": "layernorm",
        "norm_bias": True,
        "norm_eps": number(config, "layer_norm_eps", 1e-5),
        "norms": ("input_layernorm",),
        "gated_mlp": False,
        "parallel_residual": True,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "lm_head_bias": True,
    }


def _qwen2(config: Config) -> dict[str, Any]:
    if not flag(config, "use_sliding_window"):
        return {"qkv_bias": True}
    window = whole(config, "sliding_window", 4096)
    most = config.get("max_window_layers")
    first = 28 if most is None else whole({"most": most + 1}, "most") - 1  # 0 is allowed
    kinds = {"full_attention": AttentionKind(), "sliding_attention": AttentionKind(window=window)}
    types = ("full_attention", "sliding_attention")
    return {"qkv_bias": True} | layer_kinds(config, kinds, lambda block: types[block >= first])


def _qwen3(config: Config) -> dict[str, Any]:
    bias = flag(config, "attention_bias")
    return _qwen2(config) | {"qkv_bias": bias, "o_bias": bias, "qk_norm": "head"}


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
    "phi": Family(
        PHI_NAMES, _phi, "phi", "PhiForCausalLM", partial_rotary=0.5, activation="gelu_new"
    ),
    "qwen2": Family(LLAMA_NAMES, _qwen2, "qwen2", "Qwen2ForCausalLM"),
    "qwen3": Family(QWEN3_NAMES, _qwen3, "qwen3", "Qwen3ForCausalLM", head_dim=128),
    "mobilellm": Family(LLAMA_NAMES, _mobilellm, "llama", "LlamaForCausalLM"),
    **DENSE,
    **EXPERTS,
    **STATES,
}

ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Phi3ForCausalLM": "phi3",
    "PhiForCausalLM": "phi",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MobileLLMForCausalLM": "mobilellm",
    "PhiMoEForCausalLM": "phimoe",  # the Hub's spelling
    **{row.architecture: name for name, row in (DENSE | EXPERTS | STATES).items()},
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
    if model_type == "gemma3" and "text_config" in config:
        family = "gemma3_text"  # the rest of the checkpoint sees pictures
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
    quantization = config.get("quantization_config") or config.get("quantization")  # MLX
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if quantization and not (family == "gpt_oss" and method == "mxfp4"):
        raise UnsupportedModelError(
            f"the checkpoint is quantized already ({short(method or 'quantization_config')})",
            hint="start from the float checkpoint it was made of",
        )
    if family == "llama" and (config.get("share_embedding") or config.get("layer_sharing")):
        return "mobilellm"  # spelling of Meta's GitHub configs
    if family == "falcon" and two_norms(config):
        return "falcon-40b"
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
