"""Core ML packages of tiny checkpoints for the tests, and what their logits should be."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from numpy.typing import NDArray

from compress.checkpoint.checkpoint import Checkpoint
from compress.checkpoint.sources import Stored
from compress.decoder.config import DecoderConfig, split_name
from compress.decoder.decoder import Decoder
from compress.decoder.rope import Rope
from compress.grids import Float32, get_grid
from compress.plan.shapes import Artifact, Plan, Weights
from compress.solvers.rtn import rtn
from exporters import coreml

CONTEXT = 64
ROOM = tempfile.TemporaryDirectory(prefix="packlight-coreml-")  # gone when the process is
Reshape = Callable[[Plan], Plan]


@dataclass(frozen=True, eq=False)
class Built:
    """A package and what it was made of."""

    checkpoint: Checkpoint
    config: DecoderConfig
    plan: Plan
    artifact: Artifact


@cache
def checkpoint(family: str, **overrides: Any) -> Path:
    """A tiny checkpoint, made once."""
    return tiny.make(family, new_folder(), **overrides)


def new_folder() -> Path:
    """An empty folder that lives as long as the process."""
    return Path(tempfile.mkdtemp(dir=ROOM.name))


@cache
def build(family: str, grid: str, **overrides: Any) -> Built:
    """The package of a tiny checkpoint on a grid, made once."""
    return write(checkpoint(family, **overrides), {"grid": grid, "context": CONTEXT})


def write(
    path: Path,
    settings: Mapping[str, Any],
    change: Reshape = lambda plan: plan,
    progress: Callable[[int, int], None] = lambda done, total: None,
    folder: Path | None = None,
) -> Built:
    """Plan (changed, if wanted) and write into an empty folder, a new one if none is given."""
    opened = Checkpoint.open(path)
    config = DecoderConfig.from_hf(opened.config, opened.generation_config)
    plan = change(coreml.plan(config, settings, model_name="Tiny"))
    weights = Weights(Stored(opened, config), rtn)
    artifact = coreml.write(plan, weights, folder or new_folder(), progress)
    return Built(opened, config, plan, artifact)


class HalfRope(Rope):
    """Rotary tables rounded to float16, as the package holds them."""

    def cos_sin(self, positions: int) -> tuple[Float32, Float32]:
        cos, sin = super().cos_sin(positions)
        return half(cos), half(sin)


def half(values: NDArray[Any]) -> Float32:
    return values.astype(np.float16).astype(np.float32)


@cache
def decoded(built: Built, name: str) -> Float32:
    """A weight as its grid decodes it; Core ML decompresses to float16."""
    block, role, kind = split_name(name)
    if name == "lm_head.weight" and built.config.tie_word_embeddings:
        name = "embed_tokens.weight"
    if block is not None:
        repeat = built.config.block_repeat
        name = f"blocks.{block - block % repeat}.{role}.{kind}"
    grid = next(entry.grid for entry in built.plan.entries if entry.name == name)
    weights = Weights(Stored(built.checkpoint, built.config), rtn)
    if grid == "F32":
        return weights.read(name)
    weight = weights.read(name)
    return half(weight if grid == "F16" else rtn(weight, get_grid(grid)).decode())


def expected_logits(built: Built, tokens: Sequence[int]) -> Float32:
    """The reference decoder with the package's own constants, in float32."""
    rope = HalfRope(**vars(built.config.rope))
    config = replace(built.config, rope=rope)
    return Decoder(config, lambda name: decoded(built, name)).logits(tokens)
