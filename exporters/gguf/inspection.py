"""Describes a GGUF file from its keys and tensor table; reads no weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError
from compress.plan.shapes import bits_per_weight
from exporters.gguf.architectures import ARCHITECTURES
from exporters.gguf.head import read_head
from exporters.gguf.metadata import CONTEXT_KEY, TYPE_KEY
from exporters.gguf.mixes import MIXES

# ``general.file_type`` → type or mix.
TYPES = {str(number): name for name, (_, number) in MIXES.items()}


def describe(path: Path) -> dict[str, Any]:
    """See ``compress.formats``; accepts GGUF files of any program.

    Raises:
        ArtifactError: not a GGUF file, or damaged.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    keys, rows = read_head(path)
    size = path.stat().st_size
    metadata = {key: str(value) for key, value in keys.items()}
    tensors = []
    for row in rows:
        try:
            kind = GGMLQuantizationType(row.kind)
        except ValueError as error:
            raise ArtifactError(f"{row.name} has an unknown type, {row.kind}") from error
        block, block_bytes = GGML_QUANT_SIZES[kind]
        nbytes = math.prod(row.shape) // block * block_bytes
        if row.start + nbytes > size:
            raise ArtifactError(
                f"{path.name} is truncated: {row.name} ends at byte {row.start + nbytes}, "
                f"the file has {size}"
            )
        shape = list(row.shape)
        tensors.append({"name": row.name, "shape": shape, "grid": kind.name, "bytes": nbytes})
    counted = sum(math.prod(t["shape"]) for t in tensors if not t["name"].startswith("rope_"))
    parameters = whole_number(keys.get("packlight.parameter_count")) or counted
    return {
        "format": "gguf",
        "type": metadata.get(TYPE_KEY) or TYPES.get(metadata.get("general.file_type", "")),
        "name": metadata.get("general.name", path.stem),
        "architecture": metadata.get("general.architecture", ""),
        "parameters": parameters,
        "bytes": size,
        "bits_per_weight": bits_per_weight(size, parameters),
        "kv_bytes_per_value": 2,  # llama.cpp's default cache is float16
        "context": whole_number(keys.get(CONTEXT_KEY)),
        "config": hf_config(metadata, tensors),
        "metadata": metadata,
        "tensors": tensors,
    }


def whole_number(value: Any) -> int:
    """The value of one of packlight's keys if it is a whole number, else 0."""
    return value if isinstance(value, int) else 0


# general.architecture → class and model type of a config with the same sizes.
CLASSES: dict[str, tuple[str, str]] = {
    "llama": ("LlamaForCausalLM", "llama"),
    "phi2": ("PhiForCausalLM", "phi"),
    "phi3": ("Phi3ForCausalLM", "phi3"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "lfm2": ("Lfm2ForCausalLM", "lfm2"),
}


def hf_config(metadata: Mapping[str, str], tensors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The model's sizes with the keys of ``config.json``, to compute memory; empty when unknown.

    Accepts GGUF files of any program. Rope scaling is left out: it needs no memory.
    """
    arch = metadata.get("general.architecture", "")
    shapes = {str(tensor["name"]): tensor["shape"] for tensor in tensors}
    known = arch in CLASSES or any(row.name == arch for row in ARCHITECTURES.values())
    if not known or not shapes.get("token_embd.weight"):
        return {}
    # Of other graphs only the MLP's kind matters: the keys of these two give the same memory.
    gated = "blk.0.ffn_gate.weight" in shapes or "blk.0.ffn_gate_exps.weight" in shapes
    gated = gated or arch in ("phi3", "glm4", "chatglm")
    kind = CLASSES.get(arch, CLASSES["llama" if gated else "phi2"])

    def size(key: str, default: int = 0) -> int:
        text = metadata.get(f"{arch}.{key}", "")
        return int(text) if text.isascii() and text.isdigit() else default

    heads = size("attention.head_count")
    config = {
        "architectures": [kind[0]],
        "model_type": kind[1],
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": size("embedding_length"),
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "max_position_embeddings": size("context_length"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "hidden_act": "gelu_new" if kind == CLASSES["phi2"] else "silu",
    }
    if arch == "lfm2":  # a list says how many key-value heads each layer has
        layers = range(config["num_hidden_layers"])
        conv = [f"blk.{i}.shortconv.conv.weight" in shapes for i in layers]
        keys = [shapes[name] for i in layers if (name := f"blk.{i}.attn_k.weight") in shapes]
        width = config["hidden_size"] // max(heads, 1)
        config |= {
            "layer_types": ["conv" if one else "full_attention" for one in conv],
            "conv_L_cache": size("shortconv.l_cache"),
            "num_key_value_heads": keys[0][0] // max(width, 1) if keys else heads,
            "block_auto_adjust_ff_dim": False,
        }
    if size("attention.key_length"):
        config["head_dim"] = size("attention.key_length")
    return config
