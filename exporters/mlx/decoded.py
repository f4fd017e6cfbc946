"""The weights of a written folder, decoded to float32, by packlight's names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress.decoder.config import DecoderConfig, WeightMap
from compress.errors import ArtifactError
from compress.grids import Array, Float32
from compress.grids.biased import Biased
from compress.grids.mxfp4 import MicroscalingWords
from exporters.mlx.models import place
from exporters.mlx.planning import BITS, GROUP_SIZES, MXFP4
from exporters.mlx.tensors import PARTS, Piece

__all__ = ["Decoded", "grid_of"]


class Decoded:
    """Reads tensors of a folder and decodes them; nothing is cached.

    Args:
        folder: with the safetensors files.
        config: of the model.
        pieces: its arrays (``tensors.read_headers``).
        quantization: of its ``config.json``.
    """

    def __init__(
        self,
        folder: Path,
        config: DecoderConfig,
        pieces: Mapping[str, Piece],
        quantization: Mapping[str, Any],
    ) -> None:
        self._folder, self._config = folder, config
        self._pieces, self._quantization = pieces, quantization

    def read(self, name: str) -> Float32:
        """A weight as the reference decoder computes with it: see ``Source.read``.

        Raises:
            ArtifactError: it is missing, or its shape is not that of the config.
        """
        target, rows = place(self._config, name)
        shape = WeightMap(self._config).shape(name)
        values = self.tensor(target)
        if rows is not None and values.shape[0] > int(rows.max(initial=0)):
            values = values[rows]
        if values.shape == (*shape, 1):  # a convolution's taps
            values = values[..., 0]
        if values.shape != shape:
            raise ArtifactError(f"{target} is {list(values.shape)}, config.json says {list(shape)}")
        if self._config.norm_offset and len(shape) == 1 and name.endswith("norm.weight"):
            values = values + np.float32(self._config.norm_offset)
        return values

    def tensor(self, target: str) -> Float32:
        """A tensor by its name in the folder, with its rows in the folder's order."""
        if target not in self._pieces:
            raise ArtifactError(f"{target} is missing")
        stem = target.removesuffix(".weight")
        if f"{stem}.scales" in self._pieces and target.endswith(".weight"):
            grid = grid_of(self._pieces, self._quantization, stem)
            names = [f"{stem}.{part}" for part in PARTS]
            parts = [self._pieces[name] for name in names if name in self._pieces]
            return grid.decode(*grid.unpack(*(part.read(self._folder) for part in parts)))
        piece = self._pieces[target]
        return as_float(piece.read(self._folder), piece.dtype)


def as_float(values: Array, dtype: str) -> Float32:
    """A stored float array as float32."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)


def grid_of(
    pieces: Mapping[str, Piece], quantization: Mapping[str, Any], stem: str
) -> Biased | MicroscalingWords:
    """The grid of a matrix: the bits that ``quantization`` says, the groups of its scales.

    Raises:
        ArtifactError: the arrays do not fit each other, or are of another mode.
    """
    own = quantization.get(stem)
    stated = {**quantization, **(own if isinstance(own, dict) else {})}
    bits = stated.get("bits")
    parts = [pieces.get(f"{stem}.{part}") for part in PARTS]
    if stated.get("mode") == MXFP4:
        words, scales, biases = parts
        if words and scales and not biases and (words.dtype, scales.dtype) == ("U32", "U8"):
            rows, columns = words.shape[0], words.shape[1] * 8
            if scales.shape == (rows, columns // 32) and columns % 32 == 0:
                return MicroscalingWords()
    elif bits in BITS and all(part and len(part.shape) == 2 for part in parts):
        words, scales, biases = (part for part in parts if part)
        group = words.shape[1] * 32 / bits / scales.shape[1]
        same = scales.dtype == biases.dtype and scales.dtype in ("F16", "BF16")
        fits = scales.shape == biases.shape and scales.shape[0] == words.shape[0]
        if words.dtype == "U32" and same and fits and group in GROUP_SIZES:
            return Biased(bits, int(group), scales.dtype == "BF16")
    raise ArtifactError(f"{stem}: not a grid of MLX's affine mode in float16 or bfloat16, or mxfp4")
