"""Describes a folder of packages for the Neural Engine, from their programs alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from compress.decoder.config_json import json_or_empty
from compress.plan.shapes import bits_per_weight
from exporters.coreml.ane.runtime import read_chunks
from exporters.coreml.inspection import list_tensors
from exporters.coreml.mil import read_package


def describe_chunks(path: Path) -> dict[str, Any]:
    """See ``compress.formats``: all packages together.

    Raises:
        ArtifactError: a package that is missing or damaged.
    """
    document = read_chunks(path)
    operators: Counter[str] = Counter()
    tensors: list[dict[str, Any]] = []
    metadata: dict[str, str] = {}
    for row in document["packages"]:
        program = read_package(path / row["file"])
        metadata |= program.metadata
        function = program.function("decode")
        operators.update(op.kind for op in function.operations if op.kind != "const")
        tensors += [
            tensor | {"shape": plain_shape(tensor["shape"])} for tensor in list_tensors(function)
        ]
    recorded = metadata.get("packlight.parameters", "")
    parameters = int(recorded) if recorded.isascii() and recorded.isdigit() else 0
    kind = metadata.get("packlight.grid", "")
    nbytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {
        "format": "coreml",
        "type": kind if kind.startswith("mix-") else None,
        "name": path.name,
        "architecture": metadata.get("co.huggingface.exporters.architecture", ""),
        "parameters": parameters or None,
        "bytes": nbytes,
        "bits_per_weight": bits_per_weight(nbytes, parameters),
        "kv_bytes_per_value": 2,  # caches are float16
        "context": int(document["context"]),
        "weights_outside": True,
        "config": json_or_empty(path.parent / "config.json"),
        "metadata": dict(sorted(metadata.items()))
        | {row["file"]: row["kind"] for row in document["packages"]}
        | {"functions": ", ".join(f"{k} of {v} ids" for k, v in document["functions"].items())}
        | {"operators": ", ".join(f"{kind} {count}" for kind, count in sorted(operators.items()))},
        "tensors": [
            {key: tensor[key] for key in ("name", "shape", "grid", "bytes")} for tensor in tensors
        ],
    }


def plain_shape(shape: list[int]) -> list[int]:
    """Without the axes of convolutions: ``[rows, columns]``, or ``[n]`` of a norm."""
    if len(shape) == 4 and shape[0] == 1:
        return shape[1:2]
    return shape[:2] if shape[2:] == [1, 1] else shape
