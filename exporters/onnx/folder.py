"""Writes the files beside the .onnx file, so that four loaders accept the same folder.

config.json               Optimum, Transformers.js   the model's, plus transformers.js_config
generation_config.json    Optimum                    stop tokens
genai_config.json         ORT GenAI                  names of inputs and outputs, cache shape
tokenizer.json …          all
onnx/model_q4.onnx        Transformers.js needs the suffix of its `dtype` …
onnx/model_q4.onnx_data   … and exactly this name
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.checkpoint.checkpoint import Checkpoint
from compress.checkpoint.side_files import hf_config, write_side_files
from compress.decoder.config import DecoderConfig
from compress.decoder.config_json import write_json
from compress.plan.shapes import Plan

# Model types of onnxruntime-genai 0.18 with the inputs of our graphs; "decoder" is any other one.
GENAI_TYPES = frozenset(
    (
        "ernie4_5", "gemma", "gemma2", "gemma3_text", "granite", "granitemoehybrid", "lfm2",
        "llama", "mistral", "nemotron", "phi", "phi3", "phimoe", "qwen2", "qwen3", "smollm3",
    )
)  # fmt: skip

# Transformers.js: the `dtype` of a session → the suffix of its file. Four bits are "q4".
DTYPES = {4: "q4", 8: "int8"}


def graph_file(plan: Plan) -> str:
    """Path of the graph inside the folder."""
    return f"onnx/model_{DTYPES[plan.settings['bits']]}.onnx"


def data_file(plan: Plan) -> str:
    """Path of the external data inside the folder."""
    return f"{graph_file(plan)}_data"


def write_folder(plan: Plan, config: DecoderConfig, checkpoint: Checkpoint, folder: Path) -> None:
    """Write all files except the graph and its data."""
    write_side_files(config, checkpoint, folder)
    browser = {"transformers.js_config": transformers_js(plan)}
    write_json(folder / "config.json", hf_config(config) | browser, sort_keys=True)
    write_json(folder / "genai_config.json", genai_config(plan, config), sort_keys=True)


def transformers_js(plan: Plan) -> dict[str, Any]:
    """``transformers.js_config``: the file's dtype, and the number of its data files."""
    dtype = DTYPES[plan.settings["bits"]]
    return {
        "dtype": dtype,
        "kv_cache_dtype": {dtype: "float32"},
        "use_external_data_format": {Path(graph_file(plan)).name: 1},
    }


def genai_config(plan: Plan, config: DecoderConfig) -> dict[str, Any]:
    """``genai_config.json`` as onnxruntime-genai 0.18 reads it."""
    stops = list(config.eos_token_ids)
    padding = config.pad_token_id
    if padding is None and stops:
        padding = stops[0]
    model: dict[str, Any] = {
        "type": config.model_type if config.model_type in GENAI_TYPES else "decoder",
        "vocab_size": config.vocab_size,
        "context_length": plan.max_context,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": padding,
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
    if any(kind.taps for kind in config.kinds):
        from compress.decoder.states import layer_types

        decoder = model["decoder"]
        decoder["layer_types"] = layer_types(config)
        decoder["conv_cache_size"] = max(kind.taps for kind in config.kinds)
        decoder["inputs"]["past_conv_names"] = "past_conv.%d"
        decoder["outputs"]["present_conv_names"] = "present_conv.%d"
    search = {
        "do_sample": False,
        "max_length": plan.max_context,
        "past_present_share_buffer": True,
    }
    return {"model": {k: v for k, v in model.items() if v is not None}, "search": search}
