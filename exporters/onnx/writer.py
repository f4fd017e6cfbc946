"""The .onnx file and its external data, streamed: some rows of one tensor in memory at a time.

Offsets are known from the plan, so codes, scales and zero points of a slab go to their places at
once and every weight is read and quantized exactly once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from compress.checkpoint.sources import Source
from compress.grids import Array, get_grid
from compress.plan.shapes import Artifact, Plan, PlanEntry, Progress, Weights
from exporters.onnx.folder import data_file, graph_file, write_folder
from exporters.onnx.packing import FLOATS, Piece, layout, pack

SLABS = 4 << 20  # weights held at once: 16 MiB as float32


def write(plan: Plan, weights: Weights, folder: Path, progress: Progress) -> Artifact:
    """Write the ONNX folder: graph, external data, configs, tokenizer.

    Args:
        plan: from ``make_plan``; grids of single entries may have been changed.
        weights: the checkpoint's.
        folder: exists; empty but for what ``weights.ledger`` tells of.
        progress: called with bytes of the data file.

    Returns:
        The artifact; its path is ``folder``.
    """
    # Both take a second to import.
    import onnx_ir as ir

    from exporters.onnx.graph import build

    config = weights.config
    pieces = layout(plan.entries)
    graph_path = folder / graph_file(plan)
    data_path = folder / data_file(plan)
    graph_path.parent.mkdir(exist_ok=True)
    write_data(plan, weights, pieces, data_path, progress)
    ir.save(build(config, plan, pieces, data_path.name), graph_path)
    write_folder(plan, config, weights.checkpoint, folder)
    return Artifact(
        format="onnx",
        type_name=plan.type_name,
        path=folder,
        nbytes=graph_path.stat().st_size + data_path.stat().st_size,
        weights_bytes=plan.weights_bytes,
        kv_cache_bytes_per_token=config.kv_cache_bytes_per_token(plan.kv_bytes_per_value),
        plan=plan,
        notes=plan.notes,
    )


def file_bytes(plan: Plan, source: Source) -> int:
    """See ``compress.plan.shapes.Exporter.file_bytes``: the graph as it will be, and the data's end."""
    import onnx_ir as ir

    from exporters.onnx.graph import build

    pieces = layout(plan.entries)
    model = build(source.config, plan, pieces, Path(data_file(plan)).name)
    graph = ir.serde.serialize_model(model)
    return int(graph.ByteSize()) + max(piece.offset + piece.nbytes for piece in pieces.values())


def write_data(
    plan: Plan, weights: Weights, pieces: dict[str, Piece], path: Path, progress: Progress
) -> None:
    """Every piece at its offset; the gaps of alignment are zeros."""
    total = plan.weights_bytes
    done = 0
    with path.open("r+b" if weights.ledger.cut(path) else "wb") as file:
        for entry in plan.entries:
            if entry.target_name in weights.ledger:
                done += entry.nbytes
                continue
            for name, row, values in _slabs(entry, weights):
                _put(file, pieces[name], row, values)
                done += values.nbytes
                progress(done, total)
            file.flush()
            weights.finish(entry.target_name, entry.name, path, file.tell())
        file.flush()
        os.fsync(file.fileno())


def _slabs(entry: PlanEntry, weights: Weights) -> Iterator[tuple[str, int, Array]]:
    """(initializer, first row, rows) of all that the entry stores."""
    name = entry.target_name
    if entry.name in ("rope.cos", "rope.sin"):
        cos, sin = weights.config.rope.cos_sin(entry.shape[0])
        yield name, 0, cos if entry.name == "rope.cos" else sin
        return
    rows, *columns = entry.shape
    slabs = weights.slabs(entry.shape, SLABS) if columns else [slice(0, rows)]
    if entry.grid in FLOATS:
        for slab in slabs:
            yield name, slab.start, weights.read(entry.name, slab).astype(FLOATS[entry.grid])
        return
    packed = weights.in_slabs(entry.name, get_grid(entry.grid), slabs, pack)
    for slab, arrays in zip(slabs, packed, strict=True):
        for part, values in arrays.items():
            yield f"{name}.{part}", slab.start, values


def _put(file: BinaryIO, piece: Piece, row: int, values: Array) -> None:
    # .scales [rows, groups] and flat .codes have the same bytes per row as the piece.
    assert values.dtype.str == piece.dtype, (piece, values.dtype)
    file.seek(piece.offset + row * (piece.nbytes // piece.shape[0]))
    file.write(values.data if values.flags.c_contiguous else values.tobytes())
