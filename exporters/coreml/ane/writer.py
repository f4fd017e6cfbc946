"""Writes the packages of ``iphone-ane``, one tensor at a time, and ``chunks.json``.

<Name>-ane/
  chunks.json               the packages in order, their caches and masks, ids of each function
  embedding.mlpackage, blocks_1.mlpackage … head.mlpackage
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compress import __version__
from compress.checkpoint.scalars import folded_config
from compress.checkpoint.side_files import write_side_files
from compress.checkpoint.sources import Source
from compress.decoder.config import DecoderConfig
from compress.grids import Array, get_grid
from compress.plan.shapes import Artifact, Plan, PlanEntry, Written
from compress.plan.weights import Weights
from exporters.coreml import constants, writer
from exporters.coreml.ane.graph import HIDDEN, Functions, mask_name, table_names
from exporters.coreml.ane.planning import (
    EXPERIMENTAL,
    FUNCTIONS,
    Package,
    packages,
    stored_parts,
)
from exporters.coreml.card import CHUNKS
from exporters.coreml.constants import HEADER, SLABS, STEP, VERSION, Blob, Layout, as_stored
from exporters.coreml.planning import ALIGNMENT, parts

FORMAT_VERSION = 1  # of chunks.json


class Constants(constants.Constants):
    """The constants of a package, with the axes of ``stored_parts``; those of each function are
    placed at the same offsets."""

    def __init__(
        self, tools: writer.CoreMLTools, plan: Plan, package: Package, config: DecoderConfig
    ) -> None:
        plan = replace(plan, entries=package.entries)
        super().__init__(tools.mb, tools.storage, plan, config)
        self._pieces = {entry.name: stored_parts(entry) for entry in package.entries}
        names = [entry.name for entry in package.entries]
        self.head_pieces = sum(name.startswith("lm_head.weight") for name in names)

    def begin_function(self) -> None:
        """Forget the placeholders: each function has its own."""
        self._vars.clear()


class Writer:
    """See ``compress.plan.shapes.Writer``: all packages of a plan.

    Raises:
        RuntimeMissingError: coremltools is not installed, or in another version.
    """

    def __init__(self, plan: Plan, weights: Weights, folder: Path, written: Written) -> None:
        self.plan, self.weights, self._written = plan, weights, written
        tools = writer.CoreMLTools()
        self._storage = tools.storage
        self._folder, self._path = folder, folder / f"{plan.model_name}-ane"
        self._packages = packages(plan)
        self._layouts: dict[str, Layout] = {}
        self._constants: dict[str, Constants] = {}
        self._models: dict[str, Any] = {}
        for package in self._packages:
            self._file(package).parent.mkdir(parents=True, exist_ok=True)
            model, layout, made = build(tools, plan, package, weights, weights)
            self._models[package.name], self._layouts[package.name] = model, layout
            self._constants[package.name] = made
        self._begin_files()
        self.file = self._file(self._packages[0])

    def _file(self, package: Package) -> Path:
        model_folder = self._path / f"{package.name}.mlpackage" / "Data" / writer.AUTHOR
        return model_folder / writer.WEIGHTS_FOLDER / writer.WEIGHT_FILE

    def _begin_files(self) -> None:
        """Keep what an interrupted build has finished; begin the other files."""
        ledger = self.weights.ledger
        ends = {}
        for package in self._packages:
            done = [ledger[name]["end"] for name in self._targets(package) if name in ledger]
            if done:
                ends[package.name] = max(done)
        for package in self._packages:
            there = package.name in ends and ledger.cut(self._file(package), ends[package.name])
            if package.name in ends and not there:
                ends = {}
        for package in self._packages:
            if package.name not in ends:
                count = len(self._layouts[package.name].offsets)
                self._file(package).write_bytes(HEADER.pack(count, VERSION))

    def _targets(self, package: Package) -> set[str]:
        """Target names of its entries; those of the head's pieces without their numbers."""
        numbered = {entry.target_name for entry in package.entries}
        return numbered | {name.rpartition("_")[0] for name in numbered}

    def put(self, entry: PlanEntry) -> int:
        """Write the arrays of one tensor at their offsets, of the head piece by piece."""
        package, stored = next(
            (package, found) for package in self._packages if (found := pieces_of(package, entry))
        )
        self.file = self._file(package)
        layout = self._layouts[package.name]
        end, start = ALIGNMENT, 0
        with self.file.open("r+b", buffering=0) as stream:
            for piece in stored:
                rows = slice(start, start + piece.shape[0])
                start = rows.stop
                blobs = {}
                for part in stored_parts(piece):
                    suffix = "" if part.name == "val" else f"_{part.name}"
                    offset = layout.offsets.get(f"{piece.target_name}{suffix}")
                    if offset is not None:  # small arrays are in the graph
                        blobs[part.name] = Blob(stream, offset, part), part.dtype
                for arrays in self._arrays(entry, piece, rows) if blobs else ():
                    for key, (blob, dtype) in blobs.items():
                        values = np.asarray(arrays[key], self._storage[dtype])
                        self._written(blob.append(values))
                end = max([end, *(blob.close() for blob, _ in blobs.values())])
        return end

    def _arrays(
        self, entry: PlanEntry, piece: PlanEntry, rows: slice
    ) -> Iterator[dict[str, Array]]:
        """The arrays of a piece (rows of the entry), some rows at a time, by name."""
        weights = self.weights
        if entry.name.startswith("rope."):
            made = self._constants[self._packages[0].name]
            yield {"val": made.values(entry.target_name, None)}
            return
        grid = get_grid(entry.grid)
        if len(entry.shape) == 1:
            yield {"val": weights.read(entry.name, rows)}
            return
        slabs: list[slice | None] = [None]  # all rows at once, where they share one table
        if grid.group_rows:
            slabs = [
                slice(rows.start + slab.start, rows.start + slab.stop)
                for slab in weights.slabs(piece.shape, SLABS, STEP)
            ]
        if len(parts(entry.grid, entry.shape)) == 1:
            for slab in slabs:
                yield {"val": weights.read(entry.name, slab)}
            return
        yield from weights.in_slabs(entry.name, grid, slabs, as_stored)

    def close(self) -> Artifact:
        """See ``compress.plan.shapes.Writer.close``."""
        plan, config = self.plan, self.weights.config
        for package in self._packages:
            model = self._models[package.name].SerializeToString(deterministic=True)
            model_folder = self._file(package).parent.parent
            (model_folder / writer.MODEL_FILE).write_bytes(model)
            manifest = model_folder.parent.parent / "Manifest.json"
            manifest.write_text(writer.MANIFEST, encoding="utf-8")
        (self._path / CHUNKS).write_text(chunks_json(plan, config), encoding="utf-8")
        write_side_files(config, self.weights.checkpoint, self._folder)
        return Artifact(
            format=plan.format,
            type_name=plan.type_name,
            path=self._path,
            nbytes=sum(file.stat().st_size for file in self._path.rglob("*") if file.is_file()),
            weights_bytes=plan.weights_bytes,
            kv_cache_bytes_per_token=config.kv_cache_bytes_per_token(plan.kv_bytes_per_value),
            plan=plan,
            notes=plan.notes,
        )


def pieces_of(package: Package, entry: PlanEntry) -> list[PlanEntry]:
    """The package's entries that a plan's entry is stored as."""
    if entry.name.startswith("lm_head."):
        return [own for own in package.entries if own.name.rpartition(".")[0] == entry.name]
    return [own for own in package.entries if own.name == entry.name]


def file_bytes(plan: Plan, source: Source) -> int:
    """See ``compress.formats``: bytes of the programs, built without values, and of the arrays."""
    tools, config = writer.CoreMLTools(), folded_config(source.config, plan.folded)
    total = len(chunks_json(plan, config).encode())
    for package in packages(plan):
        model, layout, _ = build(tools, plan, package, source, None, config)
        total += layout.end + int(model.ByteSize()) + len(writer.MANIFEST)
    return total


def build(
    tools: writer.CoreMLTools,
    plan: Plan,
    package: Package,
    source: Weights | Source,
    weights: Weights | None,
    config: DecoderConfig | None = None,
) -> tuple[Any, Layout, Constants]:
    """The model of a package (protobuf) with the offsets of its arrays.

    Args:
        source: for metadata.
        weights: for small arrays, which are zeros without.
        config: of the graph; None: the source's.
    """
    config = config or source.config
    made, layout = Constants(tools, plan, package, config), Layout()
    with writer.ONE_AT_A_TIME:
        program = tools.Program()
        program.export_as_multifunction = True
        program.default_function_name = next(iter(FUNCTIONS))
        for name, ids in FUNCTIONS.items():
            made.begin_function()
            function = build_function(tools, config, plan.settings["context"], package, made, ids)
            program.add_function(name, function)
        model = tools.export(program, made, layout, weights)
    writer.add_metadata(model, plan, source)
    model.description.metadata.shortDescription = (
        f"{plan.model_name}, {plan.type_name}, {package.name} of {len(packages(plan))} packages; "
        f"functions {' and '.join(FUNCTIONS)}, for iOS 18. {EXPERIMENTAL}"
    )
    return model, layout, made


def build_function(
    tools: writer.CoreMLTools,
    config: DecoderConfig,
    context: int,
    package: Package,
    made: Constants,
    ids: int,
) -> Any:
    """One function of a package, of static shapes."""
    mb, types = tools.mb, tools.types
    integers = package.kind == "embedding"
    inputs = {
        name: mb.placeholder(shape, dtype=types.int32 if integers else types.fp16)
        for name, shape in input_shapes(config, context, package, ids).items()
    }
    with tools.Function(inputs, opset_version=tools.ct.target.iOS18) as function:
        functions = Functions(mb, config, context, made, ids)
        found = {name: function.inputs[name] for name in inputs}
        match package.kind:
            case "embedding":
                outputs = functions.embedding(found["ids"], found["positions"])
            case "head":
                outputs = functions.head(found["hidden"])
            case _:
                outputs = functions.blocks(package.first, package.last, found)
        function.set_outputs(outputs)
    function.input_types = []
    return function


def input_shapes(
    config: DecoderConfig, context: int, package: Package, ids: int
) -> dict[str, tuple[int, ...]]:
    """Inputs of a package's function by name, in order."""
    hidden = (1, config.hidden_size, 1, ids)
    if package.kind == "embedding":
        return {"ids": (1, ids), "positions": (ids,)}
    if package.kind == "head":
        return {"hidden": hidden}
    found = {"hidden": hidden}
    kinds = [config.kinds[config.layers[block]] for block in range(package.first, package.last)]
    half = config.ropes[0].rotary_dim // 2
    for rope in sorted({kind.rope for kind in kinds if kind.rope is not None}):
        found |= dict.fromkeys(table_names(rope), (1, half, 1, ids))
    for window in sorted({kind.window or 0 for kind in kinds}):
        found[mask_name(window)] = (1, context + ids, 1, ids)
    return found | cache_shapes(config, context, package)


def cache_shapes(
    config: DecoderConfig, context: int, package: Package
) -> dict[str, tuple[int, ...]]:
    """Shapes of a package's caches."""
    count, width = package.last - package.first, config.num_key_value_heads * config.head_dim
    return {"key_cache": (count, context, 1, width), "value_cache": (count, width, 1, context)}


def chunks_json(plan: Plan, config: DecoderConfig) -> str:
    """The text of ``chunks.json``."""
    context = plan.settings["context"]
    rows = []
    for package in packages(plan):
        row: dict[str, Any] = {"file": f"{package.name}.mlpackage", "kind": package.kind}
        if package.kind == "blocks":
            kinds = [config.kinds[config.layers[b]] for b in range(package.first, package.last)]
            row |= {
                "blocks": [package.first, package.last],
                "masks": {mask_name(kind.window): kind.window for kind in kinds},
            }
            row |= {k: list(v) for k, v in cache_shapes(config, context, package).items()}
        rows.append(row)
    document = {
        "format_version": FORMAT_VERSION,
        "made_by": f"packlight {__version__}",
        "name": plan.model_name,
        "note": EXPERIMENTAL,
        "grid": plan.type_name,
        "context": context,
        "vocab_size": config.vocab_size,
        "functions": FUNCTIONS,
        "mask_value": HIDDEN,
        "packages": rows,
    }
    return json.dumps(document, indent=2) + "\n"
