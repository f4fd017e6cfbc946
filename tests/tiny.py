"""Tiny random checkpoints, one for every family, with real tokenizers.

    make(family, folder, **overrides) -> Path    a checkpoint folder as transformers saves it
    reference(folder) -> PreTrainedModel         transformers' own model of it, float32, eager
    FAMILIES                                     what `make` can make
    YARN                                         rope_scaling for one of them
    TEXT                                         the text the tokenizers were trained on

Hidden 256, head_dim 64, MLP 512, 2 blocks, vocabulary 512, windows of 32, longrope's original
context 256. The weights are scaled so that logits have a standard deviation near 2 and every block
moves them: at transformers' initial 0.02 the logits are nearly uniform and hide every mistake.
Everything is seeded: the same call writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from tiny_families import ROWS
from tiny_tokenizers import LLAMA_IDS, MAJOR, TEXT, save_tokenizer

__all__ = ["CONFIGS", "FAMILIES", "TEXT", "YARN", "make", "reference"]

_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 0.02,  # so large that a graph with another epsilon fails
    "tie_word_embeddings": False,
}
# 32 rotating pairs for phi3-longrope, 24 (three quarters of the head) for phi4-mini.
_LONGROPE: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "original_max_position_embeddings": 256,
    "sliding_window": 4096,  # as in the 128k models: beyond every position, so without effect
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [round(1.0 + 0.05 * i, 2) for i in range(32)],
        "long_factor": [round(1.1**i, 3) for i in range(32)],
    },
}
_PHI3: dict[str, Any] = _COMMON | {
    "model_type": "phi3",
    "num_key_value_heads": 4,
    "original_max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 480,  # the first id after the pieces: <|endoftext|>
    "pad_token_id": 480,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _COMMON | LLAMA_IDS | {"model_type": "llama", "num_key_value_heads": 4},
    "llama3": _COMMON
    | {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "max_position_embeddings": 2048,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    "mistral": _COMMON | LLAMA_IDS | {"model_type": "mistral", "sliding_window": 32},
    "phi3": _PHI3,
    "phi3-window": _PHI3 | {"sliding_window": 32},
    "phi3-longrope": _PHI3 | _LONGROPE,
    "phi4-mini": _PHI3
    | _LONGROPE
    | {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 24,
            "long_factor": [round(1.1**i, 3) for i in range(24)],
        },
    },
    "phi": _COMMON
    | {"model_type": "phi", "num_key_value_heads": 4, "partial_rotary_factor": 0.5}
    | {"layer_norm_eps": 0.02, "resid_pdrop": 0.0},
    "qwen2": _COMMON | {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e6},
    # Eight heads of 64 on a hidden size of 256: q is wider than the residual, as in Qwen3-0.6B.
    "qwen3": _COMMON
    | {"model_type": "qwen3", "tie_word_embeddings": True, "rope_theta": 1e6}
    | {"num_attention_heads": 8, "head_dim": 64},
    "mobilellm": _COMMON | LLAMA_IDS | {"model_type": "llama", "tie_word_embeddings": True},
}
FAMILIES = tuple(CONFIGS)

# Four times the positions of the training before, which are few, so that every factor is met.
YARN: dict[str, Any] = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


def make(
    family: str,
    folder: str | Path,
    *,
    dtype: str = "bfloat16",
    shards: int = 1,
    seed: int = 0,
    safetensors: bool = True,
    tokenizer: bool = True,
    layer_sharing: bool = False,
    **config: Any,
) -> Path:
    """Write a checkpoint of ``family``, of ``CONFIGS`` or ``tiny_families.ROWS``, into ``folder``
    and return the folder.

    Args:
        dtype: ``bfloat16``, ``float16`` or ``float32``, on disk.
        shards: roughly how many weight files (more than 1: with an index).
        safetensors: False writes ``pytorch_model*.bin`` pickles.
        tokenizer: False leaves the tokenizer out.
        layer_sharing: mobilellm only: each stored block runs twice.
        config: keys of ``config.json`` to change (``num_hidden_layers=4``, ``sliding_window=8``).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    keys = (CONFIGS[family] if family in CONFIGS else ROWS[family].config) | config
    ids: dict[str, Any] = {}
    if tokenizer:
        ids = save_tokenizer(family, folder)
    stops = ids.pop("stops", None)
    keys |= ids | config
    settings = AutoConfig.for_model(keys.pop("model_type"), **keys)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    _fill(model, seed, 1.0 if family in CONFIGS else 0.7)
    model.to(getattr(torch, dtype))
    if stops:
        model.generation_config.eos_token_id = stops
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    limit = size if shards == 1 else math.ceil(size / shards)
    old = {"safe_serialization": safetensors} if MAJOR == 4 else {}
    model.save_pretrained(folder, max_shard_size=limit, **old)
    if MAJOR > 4 and not safetensors:
        _as_pickles(folder)
    if family == "mobilellm":
        _as_mobilellm(folder, layer_sharing)
    return folder


def _as_pickles(folder: Path) -> None:
    """What ``safe_serialization=False`` wrote until transformers 4."""
    import torch
    from safetensors.torch import load_file

    def renamed(name: str) -> str:
        return name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")

    for file in folder.glob("model*.safetensors"):
        torch.save(load_file(file), folder / renamed(file.name))
        file.unlink()
    for index in folder.glob("*.index.json"):
        keys = json.loads(index.read_text())
        keys["weight_map"] = {name: renamed(file) for name, file in keys["weight_map"].items()}
        index.rename(folder / "pytorch_model.bin.index.json").write_text(json.dumps(keys))


def reference(folder: str | Path) -> Any:
    """Transformers' own model of a checkpoint, float32, eager attention, for comparison.

    MobileLLM is read as what it means: a Llama with tied embeddings (and unrolled blocks).
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    kind: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    keys = json.loads((Path(folder) / "config.json").read_text())
    if keys["model_type"] != "mobilellm":
        return AutoModelForCausalLM.from_pretrained(folder, **kind).eval()
    config = LlamaConfig(**(keys | {"model_type": "llama", "tie_word_embeddings": True}))
    model = LlamaForCausalLM.from_pretrained(folder, config=config, **kind).eval()
    if keys["layer_sharing"]:
        # Twice the same block in a row, each with a key-value slot of its own.
        layers = torch.nn.ModuleList()
        for layer in model.model.layers:
            for _ in range(2):
                twin = type(layer)(model.config, len(layers))
                twin.load_state_dict(layer.state_dict())
                layers.append(twin.eval())
        model.model.layers = layers
        model.config.num_hidden_layers = len(layers)
    return model


def _fill(model: Any, seed: int, loud: float = 1.0) -> None:
    """Gaussian weights with uneven columns, each tensor from its own seeded stream.

    Args:
        loud: factor of the linears inside blocks.
    """
    import torch

    tied = model.config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        random = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        values = random.standard_normal(tuple(parameter.shape), dtype=np.float32)
        if name.endswith("bias"):
            values *= 0.1
        elif parameter.ndim == 1:  # norms
            values = (0.0 if model.config.model_type in OFFSET else 1.0) + 0.1 * values
        elif "embed" in name and "out" not in name:
            values *= 2.0 / math.sqrt(parameter.shape[1]) if tied else 0.5
        else:
            columns = random.lognormal(0.0, 0.25, parameter.shape[-1])
            gain = 2.0 if any(part in name for part in WIDE) else 1.4
            gain *= 1.0 if "head" in name or "embed_out" in name else loud
            if name.endswith(ROUTERS):  # so that few tokens are near a tie, where rounding decides
                gain *= ROUTER
            if name.endswith(OF_EXPERTS):
                gain *= DOWN
            if name.endswith("conv.out_proj.weight"):  # a product of three: few are very large
                gain *= CONVOLVED
            values *= columns * gain / math.sqrt(parameter.shape[-1])
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))


ROUTERS = (
    "block_sparse_moe.gate.weight", "mlp.gate.weight", "router.layer.weight", "mlp.router.weight",
)  # fmt: skip
ROUTER = 4
OF_EXPERTS = (
    "w2.weight", "moe.output_linear.weight", "experts.down_proj",
    *(f"{e}.down_proj.weight" for e in range(8)),
)  # fmt: skip
DOWN = 0.4
CONVOLVED = 0.15
# Families whose norms multiply by their weight plus one.
OFFSET = ("gemma", "gemma2", "gemma3_text", "nemotron")
# The linears that write into the residual, and the head.
WIDE = (
    "o_proj", "dense", "down_proj", "fc2", "lm_head", "w2", "block_sparse_moe.output_linear",
)  # fmt: skip


def _as_mobilellm(folder: Path, layer_sharing: bool) -> None:
    """The config as Meta publishes it: tied by ``share_embedding`` while HF's own key denies it."""
    path = folder / "config.json"
    keys = json.loads(path.read_text())
    keys |= {
        "architectures": ["MobileLLMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_mobilellm.MobileLLMConfig",
            "AutoModelForCausalLM": "modeling_mobilellm.MobileLLMForCausalLM",
        },
        "model_type": "mobilellm",
        "share_embedding": True,
        "layer_sharing": layer_sharing,
        "tie_word_embeddings": False,
    }
    path.write_text(json.dumps(keys, indent=2, sort_keys=True) + "\n")
