"""mlx-lm's model class for each family: its tensor names, and where it differs from the model.

Names are those after ``sanitize()``: what ``mlx_lm.convert`` writes. Source: mlx-lm 0.32.2,
``mlx_lm/models``; tests/exporters/mlx load every family in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from compress.decoder.config import FUSED, DecoderConfig, WeightMap, split_name
from compress.decoder.families import FAMILIES
from compress.decoder.family import BLOCK
from compress.errors import UnsupportedModelError
from compress.grids import Array

__all__ = ["ModelClass", "model_class", "place", "target_name", "written_names"]


@dataclass(frozen=True)
class ModelClass:
    """What mlx-lm's class of a family has, or lacks.

    Attributes:
        renamed: part of the checkpoint's tensor names → what ``sanitize()`` makes of it.
        own: role → tensor name, for tensors that the checkpoint stores otherwise.
        windows: it has the windows of the family's layers; else files are capped at the window.
        tied: the only value of ``tie_word_embeddings`` that it has; None: both.
        plain_embedding: it reads a tied head from the embedding's floats, so that is not quantized.
        wide: activations exceed float16: bfloat16 by default.
        mlp: the only width of its MLP in hidden sizes; 0: any.
        whole_heads: it rotates whole heads only.
    """

    renamed: tuple[tuple[str, str], ...] = ()
    own: Mapping[str, str] = field(default_factory=dict)
    windows: bool = False
    tied: bool | None = None
    plain_embedding: bool = False
    wide: bool = False
    mlp: int = 0
    whole_heads: bool = False


_PLAIN = ModelClass()
_WINDOWS = ModelClass(windows=True)
MODELS: dict[str, ModelClass] = {
    "llama": _PLAIN,
    "mistral": _PLAIN,
    "mobilellm": _PLAIN,
    "phi3": _PLAIN,
    "phi": ModelClass(tied=False),
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
    "gemma": ModelClass(tied=True, wide=True),
    "gemma2": ModelClass(tied=True, wide=True),
    "gemma3_text": ModelClass(windows=True, wide=True),
    "granite": _PLAIN,
    "granitemoehybrid": ModelClass(
        own={
            "gate_proj": BLOCK + "mlp.gate_proj",
            "up_proj": BLOCK + "mlp.up_proj",
            "down_proj": BLOCK + "mlp.down_proj",
        }
    ),
    "smollm3": _PLAIN,
    "olmo2": _PLAIN,
    "olmo3": _WINDOWS,
    "cohere": ModelClass(tied=True),
    "cohere2": ModelClass(windows=True, tied=True),
    "llama4_text": ModelClass(own={"lm_head": "output"}, plain_embedding=True),
    "exaone4": _WINDOWS,
    "glm": ModelClass(whole_heads=True),
    "glm4": ModelClass(tied=False),
    "ernie4_5": _PLAIN,
    "hunyuan_v1_dense": _PLAIN,
    "helium": _PLAIN,
    "gpt2": ModelClass(renamed=(("transformer.", "model."),), tied=True, mlp=4),
    "gpt_neox": ModelClass(
        renamed=(
            ("gpt_neox.layers.", "model.h."),
            ("gpt_neox.", "model."),
            ("embed_out", "model.embed_out"),
        ),
        tied=False,
        mlp=4,
    ),
    "stablelm": ModelClass(tied=False),
    "starcoder2": _PLAIN,
    "nemotron": _PLAIN,
    "lfm2": ModelClass(tied=True),
}


def model_class(config: DecoderConfig) -> ModelClass:
    """mlx-lm's class of a model.

    Raises:
        UnsupportedModelError: it has none, or one without something that the model has.
    """
    if config.family not in MODELS:
        raise UnsupportedModelError(
            f"mlx: mlx-lm has no model class for {config.family}",
            hint=f"it has {', '.join(MODELS)}",
        )
    if why := lacking(config):
        raise UnsupportedModelError(f"mlx: mlx-lm's class for {config.family} {why}")
    return MODELS[config.family]


def lacking(config: DecoderConfig) -> str:
    """What mlx-lm's class of the family lacks for this model, for an error; empty for nothing."""
    found, rotary = MODELS[config.family], config.ropes[0].rotary_dim
    if found.tied not in (None, config.tie_word_embeddings):
        return f"{'always' if found.tied else 'never'} has the embedding as its head"
    if found.mlp and config.intermediate_size != found.mlp * config.hidden_size:
        return f"has an MLP of {found.mlp} hidden sizes, not of {config.intermediate_size}"
    if found.whole_heads and rotary != config.head_dim:
        return f"rotates whole heads, not {rotary} of {config.head_dim} dimensions"
    if config.family == "lfm2" and config.ropes[0].kind != "default":
        return f"has no {config.ropes[0].kind} rope scaling"
    if config.qk_norm == "unit" and not all(kind.normed for kind in config.kinds):
        return "has norms of q and k in every layer, this model in those that rotate"
    return ""


def names_of(config: DecoderConfig) -> Mapping[str, str]:
    """Role → tensor name in the folder, without ``.weight``; ``{i}`` is the block."""
    found = model_class(config)
    names = dict(FAMILIES[config.family].names)
    for fused, members in FUSED.items():
        if set(members) & set(found.own):
            names.pop(fused, None)
    for role, name in names.items():
        for old, new in found.renamed:
            if name.startswith(old):
                names[role] = new + name.removeprefix(old)
                break
    return {**names, **found.own}


def written_names(config: DecoderConfig) -> Iterator[str]:
    """packlight's names of the tensors in the folder, in order of execution; repeated blocks are
    written again."""
    names = names_of(config)
    fused = [role for role in FUSED if role in names]
    yield from WeightMap(config).names(tied_head=False, fused=fused)


def target_name(config: DecoderConfig, name: str) -> str:
    """The tensor's name in the folder."""
    block, role, kind = split_name(name)
    return f"{names_of(config)[role].format(i=block)}.{kind}"


def place(config: DecoderConfig, name: str) -> tuple[str, Array | None]:
    """Where a weight is: the tensor that holds it, and its rows there where it is a part of a fused
    one, int64 ``[rows]``."""
    block, role, kind = split_name(name)
    if role == "lm_head" and kind == "weight" and config.tie_word_embeddings:
        role = "embed_tokens"
    names = names_of(config)
    if role in names:
        return f"{names[role].format(i=block)}.{kind}", None
    fused = next(whole for whole, members in FUSED.items() if role in members and whole in names)
    return f"{names[fused].format(i=block)}.{kind}", stored_rows(config, name)


def stored_rows(config: DecoderConfig, name: str) -> Array:
    """The rows of a weight in the checkpoint's tensor, which has the folder's order of rows."""
    parts = WeightMap(config).parts(name)
    return np.concatenate([np.arange(part.start, part.stop) for part in parts])
