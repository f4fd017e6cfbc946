"""Where weights come from: a checkpoint as it is stored, or one seen through a change.

A change (pruning, folding) is a ``Source`` around another ``Source``: it has a config of
its own and computes each weight when it is asked for. Nothing is kept, so a source costs no memory
beyond the tensor that is being read.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

from compress.checkpoint.checkpoint import Checkpoint
from compress.decoder.config import DecoderConfig, Float32

__all__ = ["Change", "Source"]


class Source(Protocol):
    """Weights of one decoder under our names (``compress.decoder.config.WeightMap``)."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The folder that tokenizer and side files are taken from."""
        ...

    @property
    def config(self) -> DecoderConfig:
        """The decoder that these weights make; not always the checkpoint's own."""
        ...

    @property
    def threadsafe(self) -> bool:
        """Whether several threads may read at a time."""
        ...

    def read(self, name: str, rows: slice | None = None) -> Float32:
        """A weight as float32, whole or some of its rows; checked to be finite.

        Fused roles (``qkv_proj``, ``gate_up_proj``) and their parts are both readable.

        Raises:
            CheckpointError: not there, truncated, or with NaN/Inf.
        """
        ...

    def fingerprint(self) -> str:
        """Names the weights: the same for the same numbers, another after any change."""
        ...


class Change:
    """A source around a source; each kind has a ``read`` of its own.

    It is read by one thread only: what it computes may take memory, and be used again.

    Attributes:
        source: the weights before.
        config: the decoder after.

    Args:
        what: names the change; with the source's it makes the fingerprint.
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
