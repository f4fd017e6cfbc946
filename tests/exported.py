"""Artifacts of the tiny checkpoints, rounded to nearest: the fixture ``exported`` of conftest.py.

made = exported("gguf", "llama", type="Q4_K_M")    made once, so nobody may change its files
made.artifact.path, made.plan, made.config         what was written, of what
reference(made).logits(tokens)                     the reference decoder on decoded codes
exported.write("onnx", folder, {"bits": 8})        into a new folder, each time
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import writing
from numpy.typing import NDArray

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.checkpoint.scalars import ScalarsFolded
from compress.checkpoint.sources import Source
from compress.decoder.config import FUSED, DecoderConfig
from compress.decoder.decoder import Decoder, reader
from compress.decoder.rope import Rope
from compress.demo import model_path
from compress.formats import get_format
from compress.grids import Float32, get_grid
from compress.plan.shapes import Artifact, Plan
from compress.plan.weights import Weights
from compress.solvers import rtn

CONTEXT = 64  # of Core ML packages and Core AI bundles, which have room for no more


@dataclass(frozen=True, eq=False)
class Exported:
    """An artifact and its inputs."""

    checkpoint: Checkpoint
    config: DecoderConfig
    plan: Plan
    weights: Weights
    artifact: Artifact

    @property
    def path(self) -> Path:
        """The artifact, as its runtime opens it."""
        return self.artifact.path

    def tokens(self, count: int, seed: int = 0) -> list[int]:
        """Ordinary tokens of the vocabulary."""
        random = np.random.default_rng(seed)
        return [int(i) for i in random.integers(3, self.config.vocab_size, count)]


class Exports:
    """Makes them, each once.

    Args:
        root: an empty folder for all of them.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._checkpoints: dict[str, Path] = {}
        self._made: dict[str, Exported] = {}

    def checkpoint(self, family: str, **make: Any) -> Path:
        """The folder of a tiny checkpoint (``tiny.make``), or of the bundled one (``demo``)."""
        if family == "demo":
            return model_path()
        key = f"{family} {json.dumps(make, sort_keys=True)}"
        if key not in self._checkpoints:
            self._checkpoints[key] = tiny.make(family, self.new_folder(), **make)
        return self._checkpoints[key]

    def config(self, family: str, **make: Any) -> DecoderConfig:
        """The config of such a checkpoint."""
        return config_of(Checkpoint.open(self.checkpoint(family, **make)))

    def __call__(
        self, format: str, family: str, make: Mapping[str, Any] | None = None, **settings: Any
    ) -> Exported:
        """The artifact of a tiny checkpoint.

        Args:
            make: keywords of ``tiny.make``.
            settings: of the target. Core ML's and Core AI's context is ``CONTEXT`` unless given.
        """
        make = make or {}
        key = f"{format} {family} {json.dumps([make, settings], sort_keys=True)}"
        if key not in self._made:
            path = self.checkpoint(family, **make)
            self._made[key] = self.write(format, path, settings, name=family)
        return self._made[key]

    def write(
        self,
        format: str,
        checkpoint: Path,
        settings: Mapping[str, Any],
        *,
        name: str = "model",
        change: Callable[[Plan], Plan] = lambda plan: plan,
        folder: Path | None = None,
        written: Callable[[int], None] = lambda nbytes: None,
        slab: int | None = None,
        choices: Mapping[str, str] | None = None,
        context: int = 0,
    ) -> Exported:
        """Plan (changed, if wanted) and write into an empty folder, a new one if none is given.

        Args:
            slab: weights in memory at a time.
            choices: entry name → grid.
            context: positions that are wanted (``DecoderConfig.from_hf``).
        """
        opened = Checkpoint.open(checkpoint)
        config = config_of(opened, context)
        keywords: dict[str, Any] = {"model_name": name, "choices": choices or {}}
        if format in ("coreml", "coreai"):
            settings = {"context": CONTEXT, **settings}
        if get_format(format).tokenizer_inside:
            keywords["tokenizer"] = opened.tokenizer_facts
        plan = change(writing.plan_for(format, config, settings, **keywords))
        source: Source = Stored(opened, config)
        if plan.folded:
            source = ScalarsFolded(source, plan.folded)
        weights = Weights(source, rtn, slab=slab)
        artifact = writing.write(plan, weights, folder or self.new_folder(), written)
        return Exported(opened, weights.config, plan, weights, artifact)

    def new_folder(self) -> Path:
        """An empty folder, removed at the end of the session."""
        return Path(tempfile.mkdtemp(dir=self._root))


def config_of(checkpoint: Checkpoint, context: int = 0) -> DecoderConfig:
    return DecoderConfig.from_hf(checkpoint.config, checkpoint.generation_config, context)


class HalfRope(Rope):
    """Rotary tables rounded to float16."""

    def cos_sin(self, positions: int, switch: int = 0) -> tuple[Float32, Float32]:
        cos, sin = super().cos_sin(positions, switch)
        return half(cos), half(sin)


def of_experts(made: Exported, name: str, grid: str) -> dict[str, Float32]:
    """The decoded matrices, or the biases, of all experts in one tensor."""
    stem, last, kind = name.rsplit(".", 2)
    assert made.config.experts is not None
    names = [
        f"{stem}.{expert}.{role}.{kind}"
        for expert in range(made.config.experts.count)
        for role in FUSED.get(last, (last,))
    ]
    values = {one: made.weights.read(one) for one in names}
    if kind == "bias":
        return values
    return {one: rtn(matrix, get_grid(grid)).decode() for one, matrix in values.items()}


def half(values: NDArray[Any]) -> Float32:
    return values.astype(np.float16).astype(np.float32)


@cache
def decoded(made: Exported, *, halves: bool = False) -> dict[str, Float32]:
    """Every weight of the plan, decoded from its codes.

    Args:
        halves: decoded values are rounded to float16, as Core ML decompresses them.
    """
    found = {}
    for entry in made.plan.entries:
        if entry.name.startswith("rope."):
            continue
        if len(entry.shape) == 3 or (".experts." in entry.name and len(entry.shape) == 2):
            found |= of_experts(made, entry.name, entry.grid)
            continue
        weight = made.weights.read(entry.name)
        if entry.grid == "F16":
            weight = half(weight)
        elif entry.grid != "F32":
            weight = rtn(weight, get_grid(entry.grid)).decode()
            weight = half(weight) if halves else weight
        found[entry.name] = weight
    return found


@cache
def reference(made: Exported, *, halves: bool = False, half_ropes: bool = False) -> Decoder:
    """The reference decoder with the artifact's own constants, in float32.

    Args:
        halves: as of ``decoded``; rotary tables are float16, too.
        half_ropes: rotary tables are float16.
    """
    config, found = made.config, dict(decoded(made, halves=halves))
    if halves or half_ropes:
        config = replace(config, ropes=tuple(HalfRope(**vars(rope)) for rope in config.ropes))
    if "lm_head.weight" in found:  # a tied head on a grid of its own
        config = replace(config, tie_word_embeddings=False)
    for name, values in list(found.items()):  # blocks that repeat the one before
        for i in range(1, config.block_repeat):
            if name.startswith("blocks."):
                block, rest = name.removeprefix("blocks.").split(".", 1)
                found[f"blocks.{int(block) + i}.{rest}"] = values
    return Decoder(config, reader(config, found), threads=1, resident=True)


def greedy(runtime: Any, prompt: list[int], count: int) -> list[int]:
    """Tokens through the cache."""
    runtime.reset()
    last = runtime.feed(prompt)
    tokens = []
    for _ in range(count):
        tokens.append(int(last.argmax()))
        last = runtime.feed(tokens[-1:])
    return tokens
