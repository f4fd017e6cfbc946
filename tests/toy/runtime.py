"""The reference decoder on the decoded weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compress.decoder.config import DecoderConfig
from compress.decoder.decoder import Decoder, Float32, reader
from compress.grids import get_grid
from exporters.toy.inspection import describe


class ToyRuntime(Decoder):
    """See ``compress.plan.shapes.Runtime``."""

    name = "the toy's runtime"


def open_runtime(path: Path, *, context: int, threads: int = 0) -> ToyRuntime:
    """See ``compress.formats``."""
    facts = describe(path)
    config = DecoderConfig.from_hf(facts["config"])
    weights: dict[str, Float32] = {}
    with path.open("rb") as file:
        for row in facts["tensors"]:
            weights[row["name"]] = decoded(file.read(row["bytes"]), row["grid"], row["shape"])
    return ToyRuntime(config, reader(config, weights), threads=threads, resident=True)


def decoded(data: bytes, grid: str, shape: list[int]) -> Float32:
    """A tensor as float32."""
    if grid == "F32":
        return np.frombuffer(data, np.float32)
    rows, columns = shape
    codes = np.frombuffer(data, np.uint8, rows * columns).reshape(rows, columns)
    scale = np.frombuffer(data, np.float16, offset=rows * columns).reshape(rows, -1)
    params = {"scale": scale, "zero_point": np.full(scale.shape, 128, np.uint8)}
    return get_grid(grid).decode(codes, params)
