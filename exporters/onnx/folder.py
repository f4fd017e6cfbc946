"""What lies beside the .onnx file, so that four loaders take the same folder.

config.json               Optimum, Transformers.js   the model's, plus transformers.js_config
generation_config.json    Optimum                    stop tokens
genai_config.json         ORT GenAI                  names of inputs and outputs, cache shape
tokenizer.json …          all
onnx/model_q4.onnx        Transformers.js looks for the suffix of its `dtype` …
onnx/model_q4.onnx_data   … and for exactly this name
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.arch import DecoderConfig
from compress.checkpoint import Checkpoint
from compress.model import Plan

# Transformers.js: the `dtype` of a session → the suffix of its file. Four bits are "q4".
DTYPES = {4: "q4", 8: "int8"}
# Keys that only make sense beside the checkpoint, or that name remote code.
FOREIGN = ("_name_or_path", "auto_map", "share_embedding", "layer_sharing", "transformers_version")


def graph_file(plan: Plan) -> str:
    """Path of the graph inside the folder."""
    return f"onnx/model_{DTYPES[plan.settings['bits']]}.onnx"


def data_file(plan: Plan) -> str:
    """Path of the external data inside the folder."""
    return f"{graph_file(plan)}_data"


def write_folder(plan: Plan, config: DecoderConfig, checkpoint: Checkpoint, folder: Path) -> None:
    """Everything but the graph and its data."""
    write_json(folder / "config.json", hf_config(plan, config))
    write_json(folder / "genai_config.json", genai_config(plan, config))
    write_json(folder / "generation_config.json", generation_config(config, checkpoint))
    copy_tokenizer(checkpoint, folder)


def hf_config(plan: Plan, config: DecoderConfig) -> dict[str, Any]:
    """``config.json``: the checkpoint's, as the class that the graph computes."""
    raw = {key: value for key, value in config.raw.items() if key not in FOREIGN}
    dtype = DTYPES[plan.settings["bits"]]
    return raw | {
        "architectures": [config.architecture],
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,  # MobileLLM-LS: unrolled
        "tie_word_embeddings": config.tie_word_embeddings,
        "transformers.js_config": {
            "dtype": dtype,
            "kv_cache_dtype": {dtype: "float32"},
            "use_external_data_format": {Path(graph_file(plan)).name: 1},
        },
    }


def genai_config(plan: Plan, config: DecoderConfig) -> dict[str, Any]:
    """``genai_config.json`` as onnxruntime-genai 0.18 reads it."""
    stops = list(config.eos_token_ids)
    model: dict[str, Any] = {
        "type": config.model_type,
        "vocab_size": config.vocab_size,
        "context_length": plan.max_context,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": config.pad_token_id if config.pad_token_id is not None else stops[:1],
        "decoder": {
            "filename": graph_file(plan),
            "head_size": config.head_dim,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "num_hidden_layers": config.num_hidden_layers,
            "num_key_value_heads": config.num_key_value_heads,
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "position_ids": "position_ids",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    if isinstance(model["pad_token_id"], list):
        model["pad_token_id"] = stops[0] if stops else None
    search = {
        "do_sample": False,
        "max_length": plan.max_context,
        "past_present_share_buffer": True,
    }
    return {"model": {k: v for k, v in model.items() if v is not None}, "search": search}


def generation_config(config: DecoderConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """``generation_config.json``: the checkpoint's, with every stop token."""
    found = dict(checkpoint.generation_config)
    found.pop("transformers_version", None)
    ids: dict[str, Any] = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }
    return found | {key: value for key, value in ids.items() if value is not None}


def copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """The tokenizer's files; ``tokenizer.json`` is made where only ``tokenizer.model`` exists."""
    files = checkpoint.tokenizer_files()
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if files and not (folder / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        # From the copies: the folder's config.json names no remote code.
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Sorted keys, so that equal content is equal bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")
