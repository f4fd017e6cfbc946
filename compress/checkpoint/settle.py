"""Resolves a config that ties the head to the embedding with the matrices in the files.

Of the two names of a tied matrix either may be on disk, or both. transformers 4 always uses the
embedding; transformers 5 uses a stored head that differs, and so does packlight.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from compress.checkpoint.checkpoint import Checkpoint
from compress.decoder.config import DecoderConfig, WeightMap
from compress.decoder.families import FAMILIES

SLAB = 1 << 22  # weights of each matrix in memory while they are compared: 16 MiB

__all__ = ["settle_head", "settle_names"]


def settle_head(config: DecoderConfig, checkpoint: Checkpoint) -> DecoderConfig:
    """The config that matches the stored matrices: untied where a stored head differs.

    A head that equals the embedding is removed from ``checkpoint.tensors``; a matrix stored only
    under the head's name is renamed to the embedding's; where they differ, ``checkpoint.config``
    is set to untied. ``checkpoint.warnings`` gets a line in the last two cases.

    Args:
        config: tied.
        checkpoint: opened; only the two matrices are read, slab by slab.

    Raises:
        CheckpointError: one of the two cannot be read.
    """
    tensors, names = checkpoint.tensors, FAMILIES[config.family].names
    head, embedding = (f"{names[role]}.weight" for role in ("lm_head", "embed_tokens"))
    if head not in tensors:
        return config
    if embedding not in tensors:
        tensors[embedding] = tensors.pop(head)
        checkpoint.warn(f"the embedding, which is the head too, is stored as {head}: read from it")
    elif same_values(checkpoint, head, embedding):
        del tensors[head]
    else:
        checkpoint.warn(
            f"config.json ties the head to the embedding, but {head} differs from it: built "
            "untied, with the stored head, as transformers 5 loads it (4 drops it)"
        )
        checkpoint.config = {**checkpoint.config, "tie_word_embeddings": False}
        if "share_embedding" in checkpoint.config:
            checkpoint.config["share_embedding"] = False
        return replace(config, tie_word_embeddings=False, raw=dict(checkpoint.config))
    return config


def settle_names(config: DecoderConfig, checkpoint: Checkpoint) -> None:
    """Add the family's prefix to tensor names where the checkpoint leaves it out (gpt2's own).

    Args:
        config: of a family with a prefix.
        checkpoint: opened; its ``tensors`` get the full names.
    """
    prefix, tensors = FAMILIES[config.family].prefix, checkpoint.tensors
    if any(name.startswith(prefix) for name in tensors):
        return
    expected = WeightMap(config).expected()
    for name in list(tensors):
        if name not in expected:
            tensors[prefix + name] = tensors.pop(name)


def same_values(checkpoint: Checkpoint, first: str, second: str, slab: int = SLAB) -> bool:
    """Whether two matrices hold the same numbers, of any dtypes; reads slabs of so many weights up
    to the first that differs."""
    shape = checkpoint.tensors[first].shape
    if checkpoint.tensors[second].shape != shape or not shape:
        return False
    rows, step = shape[0], max(1, slab * shape[0] // max(1, int(np.prod(shape))))
    return all(
        np.array_equal(
            checkpoint.read(first, slice(start, start + step)),
            checkpoint.read(second, slice(start, start + step)),
        )
        for start in range(0, rows, step)
    )
