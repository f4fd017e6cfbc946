"""The decoder of a checkpoint that also sees pictures (Gemma 3 from 4B on)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from compress.errors import CheckpointError

__all__ = ["text_part"]

T = TypeVar("T")

# Keys that ``text_config`` leaves out where they are the defaults of Gemma3TextConfig.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "model_type": "gemma3_text",
}
# Prefixes of the decoder's tensors, as transformers has written them at different times.
PREFIXES = ("language_model.", "model.language_model.")
PICTURES = ("vision_tower.", "multi_modal_projector.")


def text_part(
    config: Mapping[str, Any], tensors: Mapping[str, T]
) -> tuple[dict[str, Any], dict[str, T]]:
    """The config and the tensors of the text decoder, under the names of a text-only checkpoint.

    Args:
        config: with a ``text_config``.
        tensors: by name on disk.

    Raises:
        CheckpointError: ``text_config`` is not an object.
    """
    text = config["text_config"]
    if not isinstance(text, Mapping):
        raise CheckpointError("config.json: text_config is not an object")
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
    own = DEFAULTS | ids | dict(text) | {"architectures": ["Gemma3ForCausalLM"]}
    found = {}
    for name, info in tensors.items():
        if name.removeprefix("model.").startswith(PICTURES):
            continue
        bare = name
        for prefix in PREFIXES:
            bare = bare.removeprefix(prefix)
        if bare != name and not bare.startswith(("model.", "lm_head.")):
            bare = f"model.{bare}"
        found[bare] = info
    return own, found
