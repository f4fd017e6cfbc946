"""A config that ties the head to the embedding, and what the files hold beside it.

Of the two names of one matrix either may be on disk, or both. transformers 4 takes the embedding
whatever the file says; transformers 5 takes a stored head that differs, and so does this.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from compress.checkpoint.checkpoint import Checkpoint
from compress.decoder.config import DecoderConfig
from compress.decoder.families import FAMILIES

SLAB = 1 << 22  # weights of each matrix in memory while they are compared: 16 MiB

__all__ = ["settle_head"]


def settle_head(config: DecoderConfig, checkpoint: Checkpoint) -> DecoderConfig:
    """The config by what is stored: untied where the head is a matrix of its own.

    A head that equals the embedding is left out of ``checkpoint.tensors``; a matrix that is stored
    under the head's name only is entered under the embedding's instead; where they differ,
    ``checkpoint.config`` says so. ``checkpoint.warnings`` gets a line for what is not plain.

    Args:
        config: tied.
        checkpoint: opened; at most its two matrices are read, slab by slab.

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


def same_values(checkpoint: Checkpoint, first: str, second: str, slab: int = SLAB) -> bool:
    """Whether two matrices hold the same numbers, whatever their types; reads up to the first slab
    (of so many weights) that differs."""
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
