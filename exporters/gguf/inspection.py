"""What a GGUF file says of itself, without reading a weight."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError

SHOWN = 8  # entries of a long list that are printed


def describe_file(path: Path) -> dict[str, Any]:
    """See ``exporters.Exporter.describe``.

    Raises:
        ArtifactError: not a GGUF file, or a damaged one.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path.name} is not a readable GGUF file: {error}") from error
    metadata = {
        key: printable(field) for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    tensors = [
        {
            "name": tensor.name,
            "shape": [int(size) for size in reversed(tensor.shape)],
            "grid": tensor.tensor_type.name,
            "bytes": int(tensor.n_bytes),
        }
        for tensor in reader.tensors
    ]
    told = metadata.get("packlight.parameter_count")
    counted = sum(math.prod(t["shape"]) for t in tensors if not t["name"].startswith("rope_"))
    parameters = int(told) if told else counted
    size = path.stat().st_size
    return {
        "format": "gguf",
        "name": metadata.get("general.name", path.stem),
        "architecture": metadata.get("general.architecture", ""),
        "parameters": parameters,
        "bytes": size,
        "bits_per_weight": size * 8 / parameters if parameters else 0.0,
        "metadata": metadata,
        "tensors": tensors,
    }


def printable(field: Any) -> str:
    """A key's value as text; long lists by their first entries and their length."""
    import gguf

    if field.types[0] is not gguf.GGUFValueType.ARRAY:
        return str(field.contents())
    count = len(field.data)
    shown = ", ".join(str(field.contents(index)) for index in range(min(count, SHOWN)))
    return f"[{shown}{', …' if count > SHOWN else ''}] ({count})"
