"""The facts for ``packlight inspect``, from the header."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from compress.decoder.config_json import read_json
from compress.errors import ArtifactError
from compress.plan.shapes import bits_per_weight
from exporters.toy.planning import entry_bytes


def describe(path: Path) -> dict[str, Any]:
    """See ``compress.formats``."""
    header = read_json(path.with_suffix(".toy.json"))
    tensors = [
        {"name": name, "shape": shape, "grid": grid, "bytes": entry_bytes(grid, tuple(shape))}
        for name, grid, shape in header["tensors"]
    ]
    nbytes = path.stat().st_size
    if nbytes != sum(row["bytes"] for row in tensors):
        raise ArtifactError(f"{path.name} is truncated")
    parameters = sum(math.prod(row["shape"]) for row in tensors)
    return {
        "format": "toy",
        "type": header["type"],
        "name": path.stem,
        "architecture": header["config"]["architectures"][0],
        "parameters": parameters,
        "bytes": nbytes,
        "bits_per_weight": bits_per_weight(nbytes, parameters),
        "kv_bytes_per_value": 4,
        "context": 0,
        "config": header["config"],
        "metadata": {"made for": "tests"},
        "tensors": tensors,
    }
