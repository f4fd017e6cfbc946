"""Writes the safetensors files, with some rows of one tensor in memory at a time.

The plan gives every array's offset, so a file's header is written first, and codes, scales and
biases of a slab at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from compress.checkpoint.sources import Source
from compress.decoder.config import DecoderConfig, split_name
from compress.decoder.config_json import write_json
from compress.decoder.families import FAMILIES
from compress.files import sync
from compress.grids import Array, get_grid
from compress.plan.shapes import Artifact, Plan, PlanEntry, Written
from compress.plan.weights import Weights
from exporters.mlx.folder import write_folder
from exporters.mlx.models import stored_rows
from exporters.mlx.tensors import NUMPY, Piece, arrays, layout

SLABS = 4 << 20  # weights in memory at once: 16 MiB as float32
INDEX = "model.safetensors.index.json"


class Writer:
    """See ``compress.plan.shapes.Writer``: weights, index, config and tokenizer.

    The artifact's path is the folder.
    """

    def __init__(self, plan: Plan, weights: Weights, folder: Path, written: Written) -> None:
        self.plan, self.weights, self._written = plan, weights, written
        self._folder = folder
        metadata = header_metadata(plan, weights.config.num_parameters)
        self._shards, self._pieces = layout(plan.entries, metadata)
        ends: dict[str, int] = {}  # file → end of its last finished tensor
        for entry in plan.entries:
            if entry.target_name in weights.ledger:
                piece = self._last_of(entry)
                ends[piece.file] = piece.offset + piece.nbytes
        for name, end in ends.items():
            if not weights.ledger.cut(folder / name, end):
                ends = {}
                break
        for shard in self._shards:
            if shard.name not in ends:
                (folder / shard.name).write_bytes(shard.header)
        self.file = folder / (list(ends) or [self._shards[0].name])[-1]

    def put(self, entry: PlanEntry) -> int:
        """Write the arrays of a tensor at their offsets."""
        weights, config = self.weights, self.weights.config
        last = self._last_of(entry)
        self.file = self._folder / last.file
        rows, *columns = entry.shape
        order: Array | None = None
        if split_name(entry.name)[1] in FAMILIES[config.family].by_group:
            order = np.argsort(stored_rows(config, entry.name))  # of all rows at once
        whole = order is not None or len(columns) != 1
        slabs = [slice(0, rows)] if whole else weights.slabs(entry.shape, SLABS)
        found: Iterable[dict[str, Array]]
        names = [name for name, _, _ in arrays(entry)]
        if entry.grid in NUMPY:
            found = ({"weight": self._floats(entry, slab)} for slab in slabs)
        else:
            grid = get_grid(entry.grid)
            found = weights.in_slabs(entry.name, grid, slabs, lambda part: part.pack())
        with self.file.open("r+b") as file:
            for slab, packed in zip(slabs, found, strict=True):
                for name, values in zip(names, packed.values(), strict=True):
                    piece = self._pieces[name]
                    assert values.dtype.str == NUMPY[piece.dtype], (piece, values.dtype)
                    file.seek(piece.offset + slab.start * (piece.nbytes // piece.shape[0]))
                    ordered = values if order is None else values[order]
                    file.write(np.ascontiguousarray(ordered).data)
                    self._written(values.nbytes)
            return last.offset + last.nbytes

    def _last_of(self, entry: PlanEntry) -> Piece:
        *_, (name, _, _) = arrays(entry)
        return self._pieces[name]

    def _floats(self, entry: PlanEntry, rows: slice) -> Array:
        """Some rows of a tensor that is not quantized, in its stored type."""
        values = self.weights.read(entry.name, rows)
        offset = self.weights.config.norm_offset
        if offset and len(entry.shape) == 1 and entry.name.endswith("norm.weight"):
            values = values - np.float32(offset)  # which mlx-lm adds again
        return get_grid(entry.grid).encode(values, {})

    def close(self) -> Artifact:
        """See ``compress.plan.shapes.Writer.close``."""
        plan, config = self.plan, self.weights.config
        for shard in self._shards:
            sync(self._folder / shard.name)
        write_json(self._folder / INDEX, self._index(config))
        write_folder(plan, config, self.weights.checkpoint, self._folder)
        return Artifact(
            format=plan.format,
            type_name=plan.type_name,
            path=self._folder,
            nbytes=sum(shard.nbytes for shard in self._shards),
            weights_bytes=plan.weights_bytes,
            kv_cache_bytes_per_token=config.kv_cache_bytes_per_token(plan.kv_bytes_per_value),
            plan=plan,
            notes=plan.notes,
        )

    def _index(self, config: DecoderConfig) -> dict[str, object]:
        """The file of every array, as mlx-lm and transformers read it."""
        return {
            "metadata": {
                "total_size": self.plan.weights_bytes,
                "total_parameters": config.num_parameters,
            },
            "weight_map": {name: self._pieces[name].file for name in sorted(self._pieces)},
        }


def header_metadata(plan: Plan, parameters: int) -> dict[str, str]:
    """Metadata of each file: mlx's, and what ``packlight inspect`` reads."""
    return {
        "format": "mlx",
        "packlight.type": plan.type_name,
        "packlight.context": str(plan.max_context),
        "packlight.parameters": str(parameters),
    }


def writing_memory(plan: Plan) -> int:
    """Bytes of memory: slabs of weights, their codes and words."""
    return 160 << 20


def file_bytes(plan: Plan, source: Source) -> int:
    """See ``compress.formats``: bytes of the safetensors files."""
    shards, _ = layout(plan.entries, header_metadata(plan, source.config.num_parameters))
    return sum(shard.nbytes for shard in shards)
