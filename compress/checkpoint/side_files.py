"""Writes config and tokenizer files beside a graph, so that transformers can load the folder.

GGUF holds all of this inside; ONNX and Core ML folders need ``config.json``,
``generation_config.json``, ``tokenizer.json`` and ``tokenizer_config.json`` next to the model.

The tokenizer's files are not copies of the checkpoint's, whose meaning depends on the class and
version of transformers: ``tokenizer.json`` is the tokenizer as it was loaded, with added tokens,
and ``tokenizer_config.json`` names a class that loads it unchanged in any version.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from compress.checkpoint.checkpoint import Checkpoint
from compress.decoder.config import DecoderConfig
from compress.decoder.config_json import json_or_empty, write_json
from compress.decoder.tokenizer_facts import SPECIAL

# Keys that are valid only in the checkpoint's folder, or that name remote code.
FOREIGN = (
    "_name_or_path", "_model_name_or_path", "auto_map", "share_embedding", "layer_sharing",
    "quantization_config", "transformers_version",
)  # fmt: skip

# Settings of tokenizer_config.json from which some classes rebuild the tokenizer of
# tokenizer.json, and those that are valid only in the checkpoint's folder.
REBUILDING = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder",
    "additional_special_tokens", "auto_map", "backend", "extra_special_tokens", "from_slow",
    "is_local", "legacy", "merges_file", "name_or_path", "processor_class", "sp_model_kwargs",
    "special_tokens_map_file", "tokenizer_file", "use_fast", "vocab_file",
)  # fmt: skip


def write_side_files(config: DecoderConfig, checkpoint: Checkpoint, folder: Path) -> None:
    """Write ``config.json``, ``generation_config.json`` and the tokenizer's files."""
    write_json(folder / "config.json", hf_config(config), sort_keys=True)
    generation = generation_config(config, checkpoint)
    write_json(folder / "generation_config.json", generation, sort_keys=True)
    if checkpoint.has_tokenizer:
        write_tokenizer(checkpoint, folder)


def write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, which any transformers loads alike.

    Raises:
        CheckpointError: no tokenizer, or one that cannot be written as ``tokenizer.json``.
    """
    tokenizer = checkpoint.tokenizer_facts
    (folder / "tokenizer.json").write_bytes(tokenizer.text)
    stated = json_or_empty(checkpoint.path / "tokenizer_config.json")
    settings = {key: value for key, value in stated.items() if key not in (*REBUILDING, *SPECIAL)}
    settings |= {**tokenizer.special, "additional_special_tokens": tokenizer.others}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "add_prefix_space" in tokenizer.pre_tokenizer:  # false by default in transformers 4
        settings["add_prefix_space"] = tokenizer.pre_tokenizer["add_prefix_space"]
    templates = tokenizer.chat_templates
    settings["chat_template"] = templates.get("default")
    if templates.keys() - {"default"}:
        settings["chat_template"] = [
            {"name": name, "template": template} for name, template in templates.items()
        ]
    settings = {key: value for key, value in settings.items() if value is not None}
    write_json(folder / "tokenizer_config.json", settings, sort_keys=True)


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """``config.json``: the checkpoint's, with the class that the graph implements."""
    raw = {key: value for key, value in config.raw.items() if key not in FOREIGN}
    if config.family == "lfm2":  # plainly what some say by number, or in need of arithmetic
        from compress.decoder.states import layer_types

        raw["layer_types"] = layer_types(config)
        width = config.intermediate_size
        raw |= {"block_ff_dim": width, "intermediate_size": width}
        raw["block_auto_adjust_ff_dim"] = False
    return raw | {
        "architectures": [config.architecture],
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,  # MobileLLM-LS: unrolled
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def generation_config(config: DecoderConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """``generation_config.json``: the checkpoint's, with all end-of-text ids."""
    found = dict(checkpoint.generation_config)
    found.pop("transformers_version", None)
    ids: dict[str, Any] = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }
    return found | {key: value for key, value in ids.items() if value is not None}


def copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the checkpoint's tokenizer files over those of ``write_tokenizer``."""
    for file in checkpoint.tokenizer_files():
        target = folder / file.relative_to(checkpoint.path)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
