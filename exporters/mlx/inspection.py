"""Describes a folder for ``packlight inspect``, from config.json and the files' headers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.decoder.config_json import read_json
from compress.plan.shapes import bits_per_weight
from exporters.mlx.decoded import grid_of
from exporters.mlx.folder import without_quantization
from exporters.mlx.planning import KV_BYTES
from exporters.mlx.tensors import Piece, read_headers


def describe(path: Path) -> dict[str, Any]:
    """See ``compress.formats``.

    Raises:
        ArtifactError: no safetensors files, or damaged ones.
    """
    config = read_json(path / "config.json")
    pieces, metadata = read_headers(path)
    quantization = config.get("quantization")
    tensors = list(tensor_rows(pieces, quantization if isinstance(quantization, dict) else {}))
    files = {piece.file for piece in pieces.values()}
    nbytes = sum((path / name).stat().st_size for name in files)
    parameters = sum(math.prod(row["shape"]) for row in tensors)
    recorded = metadata.get("packlight.parameters", "")
    if recorded.isascii() and recorded.isdigit():
        parameters = int(recorded)
    context = metadata.get("packlight.context", "")
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    kind = metadata.get("packlight.type", "")
    return {
        "format": "mlx",
        "type": kind if kind.startswith("mix-") else None,
        "name": path.name,
        "architecture": str(first or config.get("model_type", "")),
        "parameters": parameters or None,
        "bytes": nbytes,
        "bits_per_weight": bits_per_weight(nbytes, parameters),
        "kv_bytes_per_value": KV_BYTES,
        "context": int(context) if context.isascii() and context.isdigit() else 0,
        "config": without_quantization(config),
        "metadata": {
            "files": str(len(files)),
            "quantization": describe_common(quantization),
            "modules of their own": str(len(own_modules(quantization))),
            **{key: value for key, value in sorted(metadata.items()) if key == "format"},
        },
        "tensors": tensors,
    }


def own_modules(quantization: Any) -> dict[str, Any]:
    """The modules with bits of their own in ``quantization``."""
    rows = quantization.items() if isinstance(quantization, dict) else ()
    return {name: value for name, value in rows if isinstance(value, dict)}


def describe_common(quantization: Any) -> str:
    """``4 bits, groups of 64, affine``."""
    if not isinstance(quantization, dict):
        return "none"
    bits, group = quantization.get("bits"), quantization.get("group_size")
    return f"{bits} bits, groups of {group}, {quantization.get('mode', 'affine')}"


def tensor_rows(
    pieces: Mapping[str, Piece], quantization: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """One row per weight: name, shape, grid, bytes with scales and biases."""
    for name, piece in pieces.items():
        stem, _, part = name.rpartition(".")
        if part in ("scales", "biases") and f"{stem}.weight" in pieces:
            continue
        row: dict[str, Any] = {"name": name, "shape": list(piece.shape)}
        row |= {"grid": piece.dtype, "bytes": piece.nbytes}
        if part == "weight" and f"{stem}.scales" in pieces:
            grid = grid_of(pieces, quantization, stem)
            row["shape"] = [piece.shape[0], piece.shape[1] * 32 // grid.bits]
            row["grid"] = grid.name
            row["bytes"] = grid.nbytes((row["shape"][0], row["shape"][1]))
        yield row
