"""Sources of weights: a stored checkpoint, or a change of another source.

A change (pruning, folding) is a ``Source`` around another ``Source``: it has its own config and
computes each weight when it is read. Nothing is cached, so a source needs no memory beyond the
tensor that is being read.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

from compress.checkpoint.checkpoint import Checkpoint
from compress.decoder.config import DecoderConfig, Float32

__all__ = ["Change", "Source"]


class Source(Protocol):
    """Weights of one decoder by packlight's names (``compress.decoder.config.WeightMap``)."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint with the tokenizer and side files."""
        ...

    @property
    def config(self) -> DecoderConfig:
        """The config of these weights; it may differ from the checkpoint's."""
        ...

    @property
    def threadsafe(self) -> bool:
        """Whether several threads may read at a time."""
        ...

    def read(self, name: str, rows: slice | None = None) -> Float32:
        """Read a weight as float32, whole or some of its rows; checked to be finite.

        Fused roles (``qkv_proj``, ``gate_up_proj``) and their parts are both readable.

        Raises:
            CheckpointError: missing, truncated, or with NaN/Inf.
        """
        ...

    def fingerprint(self) -> str:
        """A text that identifies the weights: it changes with their numbers."""
        ...


class Change:
    """Base of sources that change another source; subclasses implement ``read``.

    Read by one thread only: results may be large and reused.

    Attributes:
        source: the weights before the change.
        config: the decoder after the change.

    Args:
        what: name of the change, part of the fingerprint.
    """

    threadsafe = False

    def __init__(self, source: Source, config: DecoderConfig, what: str) -> None:
        self.source = source
        self.config = config
        self._what = what

    @property
    def checkpoint(self) -> Checkpoint:
        """See ``Source.checkpoint``."""
        return self.source.checkpoint

    def read(self, name: str, rows: slice | None = None) -> Float32:
        """See ``Source.read``."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """See ``Source.fingerprint``."""
        facts = f"{self._what} of {self.source.fingerprint()}"
        return hashlib.sha256(facts.encode()).hexdigest()
