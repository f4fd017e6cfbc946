"""Tiny checkpoints as sources, and texts to measure on."""

from __future__ import annotations

from pathlib import Path

import tiny

from compress.calibration.texts import CalibrationSet
from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.checkpoint.sources import Source
from compress.decoder.tokenizer import Tokenizer
from compress.plan.job import describe_model


def stored(folder: Path) -> Stored:
    checkpoint = Checkpoint.open(folder)
    return Stored(checkpoint, describe_model(checkpoint))


def texts(source: Source, count: int = 4, length: int = 32) -> CalibrationSet:
    """Windows of a tiny model's text."""
    ids = Tokenizer(source.checkpoint.path).encode(tiny.TEXT)
    windows = [tuple(ids[i * length : (i + 1) * length]) for i in range(count)]
    return CalibrationSet(tuple(windows), ("tiny",))
