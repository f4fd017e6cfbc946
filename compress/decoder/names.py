"""Explains tensor names that are not weights of the model, or are renamed."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import numpy as np

from compress.decoder.config_json import short
from compress.errors import CheckpointError

if TYPE_CHECKING:
    from compress.checkpoint.checkpoint import Checkpoint
    from compress.decoder.rope import Rope

__all__ = ["BUFFERS", "compare_tables", "explain_names"]

# Buffers that modules compute by themselves: tables of rotary angles, causal masks, positions.
# Checkpoints of old libraries hold them; transformers ignores them, too.
BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached|scale)"
    r"|(self_attn|attn|attention)\.(bias|masked_bias|causal_mask)|position_ids"
    r"|rotary_pos_emb\.inv_freq)$"
)

# Wrappers of modules that add a prefix to the names of their weights.
WRAPPERS = {
    "_orig_mod.": "torch.compile puts",
    "module.": "DistributedDataParallel puts",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel puts",
    "_checkpoint_wrapped_module.": "activation checkpointing puts",
    "base_model.model.": "a PEFT adapter puts",
}


def compare_tables(rope: Rope, checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Warn where a stored table of rotary frequencies differs from that of ``config.json``:
    transformers ignores it, but the model may have been trained with it.

    Args:
        rope: of the config.
        checkpoint: with the tables.
        names: of buffers on disk; all but tables of frequencies are skipped.
    """
    expected = rope.inverse_frequencies()
    for name in sorted(names):
        # One percent: above twice bfloat16's resolution, 2**-8.
        if name.endswith(".inv_freq") and not (
            checkpoint.tensors[name].shape == expected.shape
            and np.allclose(checkpoint.read(name), expected, rtol=1e-2)
        ):
            checkpoint.warn(
                f"{short(name)} differs from the frequencies that config.json makes, and is "
                "ignored, as by transformers: are rope_theta and rope_scaling as in training?"
            )
            return


def explain_names(
    expected: Collection[str], found: Collection[str], family: str
) -> CheckpointError | None:
    """Explain why names on disk are not those of the model; None where no cause is recognized.

    Args:
        expected: names that the model has.
        found: names on disk.
        family: of the model.
    """
    lora = next((name for name in found if ".lora_" in name or name.startswith("lora_")), None)
    if lora:
        return CheckpointError(
            f"LoRA weights stand among the model's: {short(lora)}",
            hint="merge them first (PEFT's merge_and_unload), or give the adapter with --adapter",
        )
    for wrapper, who in WRAPPERS.items():
        inside = next((name for name in found if in_path(wrapper, name)), None)
        if inside and inside not in expected:
            return CheckpointError(
                f"tensor names hold the prefix {wrapper!r}, which {who} there: {short(inside)}",
                hint="save the model itself: model._orig_mod.save_pretrained(FOLDER)"
                if wrapper == "_orig_mod."
                else "rename the tensors, or save the model that is inside the wrapper",
            )
    prefix = common_prefix(expected, found)
    if prefix is None:
        return None
    if prefix:
        what = f"tensor names begin with the prefix {short(prefix)}, where 'model.' is expected"
    else:
        what = "tensor names lack the prefix 'model.': the decoder was saved without its head"
    return CheckpointError(
        what, hint=f"save the whole {family} model: AutoModelForCausalLM, then save_pretrained"
    )


def in_path(wrapper: str, name: str) -> bool:
    """Whether a wrapper's name is part of a tensor's path."""
    return name.startswith(wrapper) or f".{wrapper}" in name


def common_prefix(expected: Iterable[str], found: Collection[str]) -> str | None:
    """The prefix of block names on disk in place of ``model.``; None where none is found."""
    inside = next((n for n in expected if n.startswith("model.layers.0.")), None)
    if inside is None or inside in found:
        return None
    bare = inside.removeprefix("model.")
    return next((n.removesuffix(bare) for n in found if n == bare or n.endswith(f".{bare}")), None)
