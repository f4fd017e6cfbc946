"""Config and tokenizer files beside a graph, so that Hugging Face's loaders take the folder.

GGUF holds all of this inside; ONNX and Core ML folders need ``config.json``,
``generation_config.json``, ``tokenizer.json`` and ``tokenizer_config.json`` next to the model.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.checkpoint.checkpoint import Checkpoint
from compress.decoder.config import DecoderConfig
from compress.decoder.config_json import read_json, write_json
from compress.decoder.tokenizer import REMADE, Tokenizer, saved_by_5

# Keys that only make sense beside the checkpoint, or that name remote code.
FOREIGN = ("_name_or_path", "auto_map", "share_embedding", "layer_sharing", "transformers_version")


def write_side_files(config: DecoderConfig, checkpoint: Checkpoint, folder: Path) -> None:
    """``config.json``, ``generation_config.json`` and the tokenizer's files."""
    write_json(folder / "config.json", hf_config(config), sort_keys=True)
    generation = generation_config(config, checkpoint)
    write_json(folder / "generation_config.json", generation, sort_keys=True)
    copy_tokenizer(checkpoint, folder)


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """``config.json``: the checkpoint's, as the class that the graph computes."""
    raw = {key: value for key, value in config.raw.items() if key not in FOREIGN}
    return raw | {
        "architectures": [config.architecture],
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,  # MobileLLM-LS: unrolled
        "tie_word_embeddings": config.tie_word_embeddings,
    }


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
        # From the copies: the folder's config.json names no remote code.
        text = Tokenizer(folder).to_json()
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    if settings.exists() and saved_by_5(found := read_json(settings)):
        write_json(settings, settings_for_4(found, Tokenizer(folder)), sort_keys=True)


def settings_for_4(settings: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """``tokenizer_config.json`` of transformers 5, so that 4.57 takes it, too.

    It has neither the general class's new name nor a list of special tokens without names, and
    remakes some classes' templates by keys that 5 leaves out.
    """
    own = ("backend", "is_local", "local_files_only")
    found = {key: value for key, value in settings.items() if key not in own}
    if isinstance(extra := found.get("extra_special_tokens"), list):
        del found["extra_special_tokens"]
        found["additional_special_tokens"] = extra
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    if found.get("tokenizer_class") in REMADE:
        around = tokenizer.encode("a", add_special=True)
        found["add_bos_token"] = tokenizer.adds_bos
        found["add_eos_token"] = around[-1] == tokenizer.hf.eos_token_id
    return found
