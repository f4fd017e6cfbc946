"""GGUF files of the tiny checkpoints, each made once per process."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import tiny

import exporters.gguf as exporter
from compress.checkpoint.checkpoint import Checkpoint
from compress.checkpoint.sources import Stored
from compress.decoder.config import DecoderConfig
from compress.plan.shapes import Artifact, Weights
from compress.solvers.rtn import rtn

DEMO = Path(__file__).parents[1] / "compress" / "demo" / "model"
_SCRATCH = tempfile.TemporaryDirectory(prefix="packlight-gguf-")


@functools.cache
def checkpoint(family: str) -> Path:
    """The folder of a tiny checkpoint, or of the bundled one (``demo``)."""
    return DEMO if family == "demo" else tiny.make(family, Path(_SCRATCH.name) / family)


@functools.cache
def artifact(family: str, kind: str) -> Artifact:
    """That checkpoint as a GGUF file."""
    folder = Path(_SCRATCH.name) / f"{family}-{kind}-gguf"
    folder.mkdir()
    return build(checkpoint(family), folder, kind, family)


def build(source: Path, folder: Path, kind: str, name: str) -> Artifact:
    """Plan and write."""
    opened = Checkpoint.open(source)
    config = DecoderConfig.from_hf(opened.config, opened.generation_config)
    plan = exporter.plan(config, {"type": kind}, model_name=name)
    return exporter.write(
        plan, Weights(Stored(opened, config), rtn), folder, lambda done, total: None
    )
