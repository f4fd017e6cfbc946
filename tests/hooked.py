"""The inputs of transformers' linears, by packlight's names: the oracle of calibration.

Model(family, folder)              a tiny checkpoint as a source of weights, counting readings
hooked(model, reference, windows)  inputs of the linears of transformers' model of it
parameter_rows(model, name)        where a weight is in that model, and which rows
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from compress.calibration.statistics import input_names
from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import DecoderConfig, WeightMap, split_name


class Model:
    """A tiny checkpoint as a source of weights that counts its readings."""

    threadsafe = False

    def __init__(self, family: str, folder: Path, **settings: Any) -> None:
        self.folder = tiny.make(family, folder, **settings)
        self.checkpoint = Checkpoint.open(self.folder)
        self.config = DecoderConfig.from_hf(self.checkpoint.config)
        self.map = WeightMap(self.config)
        self._stored = Stored(self.checkpoint, self.config)
        self.readings = 0

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        self.readings += 1
        return self._stored.read(name, rows)

    def fingerprint(self) -> str:
        return self.checkpoint.fingerprint()


def draw_windows(count: int = 5, length: int = 48) -> list[list[int]]:
    return np.random.default_rng(3).integers(0, 480, (count, length)).tolist()


def parameter_rows(model: Model, name: str) -> tuple[str, slice]:
    """Parameter of the (unrolled) transformers model, and the rows of it that a weight is."""
    block, _, _ = split_name(name)
    (part,) = model.map.parts(name)
    # A stored block's runs are modules of their own in the unrolled model.
    path = re.sub(r"\.\d+\.", f".{block}.", part.source, count=1)
    return path, slice(part.start, part.stop)


def hooked(model: Model, reference: Any, windows: list[list[int]]) -> dict[str, np.ndarray]:
    """Inputs of transformers' linears, float64 ``[tokens, columns]``, by our input names."""
    import torch

    modules = dict(reference.named_modules())
    seen: dict[str, list[np.ndarray]] = {}
    hooks = []
    for key in input_names(model.config):
        if key == "lm_head":
            paths = ["lm_head"]
        else:
            _, first, role = key.split(".", 2)
            runs = range(int(first), int(first) + model.config.block_repeat)
            names = [f"blocks.{run}.{role}.weight" for run in runs]
            paths = [parameter_rows(model, name)[0].removesuffix(".weight") for name in names]
        for path in paths:
            hook = modules[path].register_forward_pre_hook(
                lambda _, inputs, key=key: seen.setdefault(key, []).append(
                    inputs[0].flatten(0, -2).double().numpy()
                )
            )
            hooks.append(hook)
    with torch.inference_mode():
        for window in windows:
            reference(torch.tensor([window]))
    for hook in hooks:
        hook.remove()
    return {key: np.concatenate(parts) for key, parts in seen.items()}


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference, of the largest magnitude."""
    return float(np.abs(a - b).max() / np.abs(b).max())
