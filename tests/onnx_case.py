"""A tiny checkpoint, exported to ONNX, and the reference decoder with the decoded weights.

case = build("phi3", folder, bits=4, accuracy_level=0)
case.runtime()              onnxruntime on what was written
case.decoded()              our decoder, every weight replaced by what the codes mean
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny

import exporters.onnx
from compress.checkpoint.checkpoint import Checkpoint
from compress.checkpoint.sources import Stored
from compress.decoder.config import DecoderConfig
from compress.decoder.decoder import Decoder, reader
from compress.grids import get_grid
from compress.plan.shapes import Artifact, Plan, Weights
from compress.solvers.rtn import rtn
from exporters.onnx.planning import entry_bytes
from exporters.onnx.runtime import OnnxRuntime


@dataclass(frozen=True)
class Case:
    config: DecoderConfig
    plan: Plan
    weights: Weights
    artifact: Artifact

    @property
    def folder(self) -> Path:
        return self.artifact.path

    def runtime(self, context: int = 0) -> OnnxRuntime:
        return OnnxRuntime(self.folder, context=context or self.config.max_context, threads=1)

    def decoded(self) -> Decoder:
        found = {}
        for entry in self.plan.entries:
            if entry.name.startswith("rope."):
                continue
            if entry.grid in ("F32", "F16"):
                kind = np.float16 if entry.grid == "F16" else np.float32
                found[entry.name] = self.weights.read(entry.name).astype(kind).astype(np.float32)
            else:
                found[entry.name] = self.weights.quantize(entry.name, get_grid(entry.grid)).decode()
        config = self.config
        if "lm_head.weight" in found:  # a tied head on a grid of its own
            config = replace(config, tie_word_embeddings=False)
        for name, values in list(found.items()):  # blocks that repeat the one before
            for i in range(1, config.block_repeat):
                if name.startswith("blocks."):
                    block, rest = name.removeprefix("blocks.").split(".", 1)
                    found[f"blocks.{int(block) + i}.{rest}"] = values
        return Decoder(config, reader(config, found), threads=1, resident=True)

    def tokens(self, count: int, seed: int = 0) -> list[int]:
        random = np.random.default_rng(seed)
        return [int(i) for i in random.integers(3, self.config.vocab_size, count)]


def checkpoint(family: str, root: Path, **make: Any) -> Checkpoint:
    """Made once per folder."""
    label = "-".join([family, *(f"{key}{value}" for key, value in sorted(make.items()))])
    folder = root / "checkpoints" / label
    if not folder.exists():
        tiny.make(family, folder, **make)
    return Checkpoint.open(folder)


def regrid(plan: Plan, grids: dict[str, str]) -> Plan:
    """The plan with other grids for the named weights, as an allocator would make it."""
    entries = tuple(
        replace(e, grid=grids[e.name], nbytes=entry_bytes(grids[e.name], e.shape))
        if e.name in grids
        else e
        for e in plan.entries
    )
    return replace(plan, entries=entries)


def build(
    family: str,
    root: Path,
    make: dict[str, Any] | None = None,
    grids: dict[str, str] | None = None,
    **settings: Any,
) -> Case:
    """Export ``family`` below ``root``, into a fresh folder; ``grids`` by weight name."""
    source = checkpoint(family, root, **(make or {}))
    config = DecoderConfig.from_hf(source.config, source.generation_config)
    weights = Weights(Stored(source, config), rtn)
    plan = regrid(exporters.onnx.plan(config, settings), grids or {})
    number = len(list(root.glob("onnx-*")))
    folder = root / f"onnx-{number}"
    folder.mkdir()
    artifact = exporters.onnx.write(plan, weights, folder, lambda done, total: None)
    return Case(config, plan, weights, artifact)


def greedy(runtime: Any, prompt: list[int], count: int) -> list[int]:
    """Tokens through the cache."""
    runtime.reset()
    last = runtime.feed(prompt)
    tokens = []
    for _ in range(count):
        tokens.append(int(last.argmax()))
        last = runtime.feed(tokens[-1:])
    return tokens
