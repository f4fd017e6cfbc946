"""Describes an ONNX folder for ``packlight inspect``, from the .onnx file alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from compress.decoder.config_json import json_or_empty
from compress.errors import ArtifactError
from compress.files import LARGEST_GRAPH, read_bounded
from compress.plan.shapes import bits_per_weight
from exporters.onnx.planning import CONTEXT_KEY, KV_BYTES, TYPE_KEY


def find_graph(path: Path) -> Path:
    """The .onnx file of a folder (that in ``onnx/``, else the only one), or the given file.

    Raises:
        ArtifactError: there is none, or several.
    """
    if path.is_file():
        return path
    found = sorted(path.glob("onnx/*.onnx")) or sorted(path.glob("*.onnx"))
    if len(found) != 1:
        count = "no" if not found else f"{len(found)}"
        raise ArtifactError(
            f"{count} .onnx file in {path.name}",
            hint="give the folder with config.json that packlight wrote, or one .onnx file",
        )
    return found[0]


def describe(path: Path) -> dict[str, Any]:
    """Metadata and tensors; see ``compress.formats``.

    Raises:
        ArtifactError: no graph, or one that does not parse.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    graph = find_graph(path)
    try:
        model = onnx.load_model_from_string(read_bounded(graph, LARGEST_GRAPH))
    except DecodeError as error:
        raise ArtifactError(f"{graph.name} is not an ONNX file, or is truncated") from error
    if not model.graph.node:
        raise ArtifactError(f"{graph.name} holds no graph")
    nbytes = graph.stat().st_size + data_bytes(graph, model.graph)
    tensors = tensor_rows(model.graph)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    config = json_or_empty(graph.parent.parent / "config.json")
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not isinstance(next(iter(architectures), ""), str):
        architectures = None
    parameters = sum(math.prod(row["shape"]) for row in tensors if row["grid"] != "table")
    operators: dict[str, int] = {}
    for node in model.graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    return {
        "format": "onnx",
        "type": metadata.get(TYPE_KEY),
        "name": graph.stem,
        "architecture": architectures[0] if architectures else model.graph.name,
        "parameters": parameters,
        "bytes": nbytes,
        "bits_per_weight": bits_per_weight(nbytes, parameters),
        "kv_bytes_per_value": KV_BYTES,
        "context": int(metadata.get(CONTEXT_KEY, 0)),
        "config": config,
        "metadata": {
            "ir_version": str(model.ir_version),
            "opsets": ", ".join(f"{o.domain or 'ai.onnx'} {o.version}" for o in model.opset_import),
            "producer": model.producer_name,
            "inputs": ", ".join(value.name for value in model.graph.input[:3]),
            "operators": ", ".join(f"{name} {n}" for name, n in sorted(operators.items())),
        },
        "tensors": tensors,
    }


def data_bytes(file: Path, graph: Any) -> int:
    """Bytes of a graph's external data; 0 without.

    Raises:
        ArtifactError: a data file is missing, or ends before a tensor does.
    """
    ends: dict[str, int] = {}
    for tensor in graph.initializer:
        if place := {entry.key: entry.value for entry in tensor.external_data}:
            end = int(place.get("offset", 0)) + int(place.get("length", 0))
            where = place.get("location", "")
            ends[where] = max(end, ends.get(where, 0))
    total = 0
    for name, end in sorted(ends.items()):
        data = file.parent / name
        if not data.is_file():
            raise ArtifactError(f"{name} is missing beside {file.name}: it holds the weights")
        size = data.stat().st_size
        if size < end:
            raise ArtifactError(f"{name} is truncated: {end} bytes are needed, it has {size}")
        total += size
    return total


def tensor_rows(graph: Any) -> list[dict[str, Any]]:
    """One row per weight: name, shape, grid, bytes with scales and zero points.

    A tied head reads the embedding's bytes and has no row of its own. Tables of cos and sin are
    rows with the grid ``table``: computed, not parameters.
    """
    import onnx

    stored: dict[str, tuple[list[int], int, int, int]] = {}  # shape, type, offset, bytes
    for tensor in graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            where = (int(place.get("offset", 0)), int(place["length"]))
            stored[tensor.name] = (list(tensor.dims), tensor.data_type, *where)
    rows: dict[int, dict[str, Any]] = {}  # by offset
    # The embedding's codes are gathered: standard nodes split bytes into codes of 4 bits.
    split = {node.input[0] for node in graph.node if node.op_type == "BitShift"}
    uses = [(node, name) for node in graph.node for name in node.input]
    for node, codes in uses:
        if not codes.endswith(".codes") or codes not in stored:
            continue
        base = codes.removesuffix(".codes")
        shape, _, offset, _ = stored[codes]
        attributes = {a.name: a.i for a in node.attribute}
        experts = attributes.get("expert_weight_bits", 0)
        bits = experts or attributes.get("bits", 4 if split else 8)
        # In older folders the embedding is [rows, bytes], read by GatherBlockQuantized.
        group = attributes.get("block_size") or shape[2] * 8 // bits
        lead = 2 if experts else 1  # experts and rows
        asymmetric = f"{base}.zero_points" in stored
        rows.setdefault(
            offset,
            {
                "name": base,
                "shape": [*shape[:lead], math.prod(shape[lead:]) * 8 // bits],
                "grid": f"int{bits}-g{group}" + ("-asym" if asymmetric else ""),
                "bytes": sum(stored[name][3] for name in stored if name.rpartition(".")[0] == base),
            },
        )
    parts = (".codes", ".scales", ".zero_points")
    types = {int(onnx.TensorProto.FLOAT): "F32", int(onnx.TensorProto.FLOAT16): "F16"}
    for name, (shape, kind, offset, nbytes) in stored.items():
        if not name.endswith(parts):
            grid = "table" if name.startswith("rope.") else types[kind]
            rows[offset] = {"name": name, "shape": shape, "grid": grid, "bytes": nbytes}
    return [rows[offset] for offset in sorted(rows)]
