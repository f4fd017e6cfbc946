"""What lies beside a graph so that Hugging Face's loaders take the folder: config and tokenizer.

GGUF holds all of this inside; ONNX and Core ML folders need ``config.json``,
``generation_config.json``, ``tokenizer.json`` and ``tokenizer_config.json`` next to the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.arch import DecoderConfig
from compress.checkpoint import Checkpoint

# Keys that only make sense beside the checkpoint, or that name remote code.
FOREIGN = ("_name_or_path", "auto_map", "share_embedding", "layer_sharing", "transformers_version")


def write_side_files(config: DecoderConfig, checkpoint: Checkpoint, folder: Path) -> None:
    """``config.json``, ``generation_config.json`` and the tokenizer's files."""
    write_json(folder / "config.json", hf_config(config))
    write_json(folder / "generation_config.json", generation_config(config, checkpoint))
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
        from transformers import AutoTokenizer

        # From the copies: the folder's config.json names no remote code.
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Sorted keys, so that equal content is equal bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")
