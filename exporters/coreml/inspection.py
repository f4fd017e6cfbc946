"""Describes a package's metadata and constants, from ``model.mlmodel`` alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.decoder.config_json import json_or_empty
from compress.plan.shapes import bits_per_weight
from exporters.coreml.blobs import Packed
from exporters.coreml.card import CHUNKS
from exporters.coreml.mil import Function, Operation, read_package

SCALED = "constexpr_blockwise_shift_scale"
PALETTE = "constexpr_lut_to_dense"
SPARSE = "constexpr_sparse_to_dense"
# Operations that compute the values of a sparse constant: dense operation, codes, mask.
JOINT = {
    "constexpr_lut_to_sparse": (PALETTE, "indices_nonzero_data", "indices_mask"),
    "constexpr_sparse_blockwise_shift_scale": (SCALED, "nonzero_data", "data_mask"),
}


def describe(path: Path) -> dict[str, Any]:
    """See ``compress.formats``.

    Raises:
        ArtifactError: not a package, or a damaged one.
    """
    if (path / CHUNKS).is_file():
        from exporters.coreml.ane.inspection import describe_chunks

        return describe_chunks(path)
    program = read_package(path)
    function = program.function(program.default_function)
    recorded = program.metadata.get("packlight.parameters", "")
    kind = program.metadata.get("packlight.grid", "")
    tensors = list_tensors(function)
    counted = sum(tensor["weights"] for tensor in tensors)
    parameters = int(recorded) if recorded.isascii() and recorded.isdigit() else counted
    nbytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    operators = Counter(op.kind for op in function.operations if op.kind != "const")
    shapes = {**function.inputs, **function.states, **function.outputs}
    return {
        "format": "coreml",
        "type": kind if kind.startswith("mix-") else None,
        "name": path.stem,
        "architecture": program.metadata.get("co.huggingface.exporters.architecture", ""),
        "parameters": parameters or None,
        "bytes": nbytes,
        "bits_per_weight": bits_per_weight(nbytes, parameters),
        "kv_bytes_per_value": 2,  # states are float16
        "context": cache_slots(function),
        "config": json_or_empty(path.parent / "config.json"),
        "metadata": dict(sorted(program.metadata.items()))
        | {"specification version": str(program.specification_version)}
        | {
            name: f"{spec.dtype} [{', '.join('?' if n is None else str(n) for n in spec.shape)}]"
            for name, spec in shapes.items()
        }
        | {"operators": ", ".join(f"{kind} {count}" for kind, count in sorted(operators.items()))},
        "tensors": [
            {key: tensor[key] for key in ("name", "shape", "grid", "bytes")} for tensor in tensors
        ],
    }


def cache_slots(function: Function) -> int:
    """Positions of the KV cache; 0 for a program that has none."""
    cache = function.states.get("keyCache")
    return 0 if cache is None or len(cache.shape) < 4 else cache.shape[3] or 0


def list_tensors(function: Function) -> list[dict[str, Any]]:
    """Name, shape, grid, bytes and number of weights of every stored array of the program."""
    tensors = []
    joint = {op.outputs[0][0]: op for op in function.operations if op.kind in JOINT}
    for operation in function.operations:
        if operation.kind in JOINT:  # listed with the constant that uses it
            continue
        if operation.kind == SPARSE:
            tensors.append(describe_sparse(operation, joint))
            continue
        stored = [part for part in operation.literals.values() if isinstance(part, Packed)]
        if isinstance(operation.value, Packed) and operation.value.dtype.startswith("fp"):
            stored = [operation.value]
        if not stored or not (operation.value or operation.kind.startswith("constexpr_")):
            continue
        name, declared = operation.outputs[0]
        shape = [size or 0 for size in declared.shape]
        if not shape:  # an epsilon, a factor
            continue
        tensors.append(
            {
                "name": name,
                "shape": shape,
                "grid": grid_name(operation),
                "bytes": sum(part.raw.size for part in stored),
                "weights": 0 if is_table(name) else int(stored[0].size),
            }
        )
    return tensors


def describe_sparse(operation: Operation, joint: Mapping[str, Operation]) -> dict[str, Any]:
    """The row of ``list_tensors`` for a sparse constant.

    Its grid has the share of zeros: a pattern such as 2of4 is unknown without reading the mask.
    """
    name, declared = operation.outputs[0]
    maker = operation
    if "mask" in operation.inputs:
        maker = joint[operation.inputs["mask"][0]]
    parts = {key: part for key, part in maker.literals.items() if isinstance(part, Packed)}
    inner, values, mask = JOINT.get(maker.kind, ("", "nonzero_data", "mask"))
    share = round(100 * (1 - parts[values].size / parts[mask].size))
    grid = {"fp16": "F16"}.get(parts[values].dtype, parts[values].dtype)
    if inner:
        grid = compressed_grid(inner, parts, parts[mask].shape, parts[values].dtype)
    return {
        "name": name,
        "shape": [size or 0 for size in declared.shape],
        "grid": f"s{share}-{grid}",
        "bytes": sum(part.raw.size for part in parts.values()),
        "weights": int(parts[mask].size),
    }


def is_table(name: str) -> bool:
    """Whether a constant is not of the checkpoint: rotary tables, biases of zeros."""
    return name.startswith(("rope_", "zeros_"))


def grid_name(operation: Operation) -> str:
    """The grid of a constant, as in recipes; the operation's name for other compressions."""
    parts = {key: part for key, part in operation.literals.items() if isinstance(part, Packed)}
    if operation.kind == "const" and isinstance(operation.value, Packed):
        return {"fp16": "F16", "fp32": "F32"}.get(operation.value.dtype, operation.value.dtype)
    codes = parts.get("indices") or parts.get("data")
    ones = codes.shape[2:] if codes else ()  # of a 1×1 convolution
    plain = codes is not None and ones in ((), (1, 1))
    if operation.kind == PALETTE and "lut" in parts:
        plain = plain and len(parts["lut"].shape) == 4 + len(ones)
    if codes is None or not plain or operation.kind not in (PALETTE, SCALED):
        return operation.kind
    return compressed_grid(operation.kind, parts, codes.shape, codes.dtype)


def compressed_grid(
    kind: str, parts: Mapping[str, Packed], shape: tuple[int, ...], dtype: str
) -> str:
    """The grid of a compressed matrix of ``shape``."""
    if kind == PALETTE:
        groups = parts["lut"].shape[0]
        group = "tensor" if groups == 1 else f"g{shape[0] // groups}"
        return f"lut{dtype.removeprefix('uint')}-{group}"
    groups = parts["scale"].shape[1]
    group = "channel" if groups == 1 else f"g{shape[1] // groups}"
    return f"{dtype.removeprefix('u')}-{group}" + ("-asym" if "offset" in parts else "")
