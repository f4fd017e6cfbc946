"""Writes the .onnx file and its external data, with some rows of one tensor in memory at a time.

Offsets are known from the plan, so codes, scales and zero points of a slab are written at once, and
every weight is read and quantized exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from compress.checkpoint.sources import Source
from compress.decoder.config import FUSED, split_name
from compress.files import sync
from compress.grids import Array, get_grid
from compress.plan.shapes import Artifact, Plan, PlanEntry, Written
from compress.plan.weights import Weights
from exporters.onnx.folder import data_file, graph_file, write_folder
from exporters.onnx.packing import FLOATS, layout, pack

SLABS = 4 << 20  # weights in memory at once: 16 MiB as float32


class Writer:
    """See ``compress.plan.shapes.Writer``: graph, external data, configs and tokenizer.

    The artifact's path is the folder.
    """

    def __init__(self, plan: Plan, weights: Weights, folder: Path, written: Written) -> None:
        self.plan, self.weights, self._written = plan, weights, written
        self._folder, self._pieces = folder, layout(plan.entries)
        self.file = folder / data_file(plan)
        self.file.parent.mkdir(exist_ok=True)
        if not weights.ledger.cut(self.file):
            self.file.write_bytes(b"")

    def put(self, entry: PlanEntry) -> int:
        """Write every piece of a tensor at its offset; gaps of alignment are zeros."""
        weights, name = self.weights, entry.target_name
        with self.file.open("r+b") as file:

            def put(part: str, row: int, values: Array) -> None:
                piece = self._pieces[part]
                assert values.dtype.str == piece.dtype, (piece, values.dtype)
                # .scales [rows, groups] and flat .codes have the same bytes per row as the piece.
                file.seek(piece.offset + row * (values.nbytes // len(values)))
                file.write(values.data if values.flags.c_contiguous else values.tobytes())
                self._written(values.nbytes)

            if entry.name.startswith("rope."):
                number = int(entry.name.partition("_")[2] or 0)
                context = self.plan.max_context
                switch = entry.shape[0] - context
                cos, sin = weights.config.ropes[number].cos_sin(context, switch)
                put(name, 0, cos if entry.name.startswith("rope.cos") else sin)
                return file.tell()
            if len(entry.shape) == 3:
                for part, row, values in self._of_experts(entry):
                    put(f"{name}.{part}", row, values)
                return file.tell()
            if len(entry.shape) == 2 and entry.name.endswith(".bias"):  # of all experts
                put(name, 0, np.stack([*self._biases(entry)]))
                return file.tell()
            rows, *columns = entry.shape
            slabs = weights.slabs(entry.shape, SLABS) if columns else [slice(0, rows)]
            if entry.grid in FLOATS:
                for slab in slabs:
                    values = weights.read(entry.name, slab)
                    put(name, slab.start, values.astype(FLOATS[entry.grid]))
                return file.tell()
            packed = weights.in_slabs(entry.name, get_grid(entry.grid), slabs, pack)
            for slab, arrays in zip(slabs, packed, strict=True):
                for part, values in arrays.items():
                    put(f"{name}.{part}", slab.start, values)
            return file.tell()

    def _of_experts(self, entry: PlanEntry) -> Iterator[tuple[str, int, Array]]:
        """The arrays of all experts, in slabs: name, first row, values.

        Of ``gate_up_proj`` the rows of gate and up alternate, as QMoE's SwiGLU reads them.
        """
        weights, grid = self.weights, get_grid(entry.grid)
        count, rows, columns = entry.shape
        role = split_name(entry.name)[1].rpartition(".")[2]
        members = FUSED.get(role, (role,))
        step = len(members)
        slabs = weights.slabs((rows // step, columns), SLABS // step)
        for expert in range(count):
            stem = entry.name.removesuffix(f"{role}.weight") + f"{expert}"
            names = [f"{stem}.{member}.weight" for member in members]
            packed = [weights.in_slabs(name, grid, slabs, pack) for name in names]
            for slab, *arrays in zip(slabs, *packed, strict=True):
                for part in arrays[0]:
                    both = np.stack([values[part] for values in arrays], axis=1)
                    row = expert * rows + step * slab.start
                    yield part, row, both.reshape(-1, both.shape[-1])
            for name in names:
                lost = weights.fallen.pop(name, 0)
                weights.fallen[entry.name] = weights.fallen.get(entry.name, 0) + lost

    def _biases(self, entry: PlanEntry) -> Iterator[Array]:
        """The bias of each expert, of ``gate_up_proj`` alternating as the rows of its weight."""
        role = split_name(entry.name)[1].rpartition(".")[2]
        for expert in range(entry.shape[0]):
            stem = entry.name.removesuffix(f"{role}.bias") + f"{expert}"
            members = [self.weights.read(f"{stem}.{m}.bias") for m in FUSED.get(role, (role,))]
            yield np.stack(members, axis=1).reshape(-1).astype("<f4")

    def close(self) -> Artifact:
        """See ``compress.plan.shapes.Writer.close``."""
        # Both take a second to import.
        import onnx_ir as ir

        from exporters.onnx.graph import build

        plan, config = self.plan, self.weights.config
        sync(self.file)
        graph = self._folder / graph_file(plan)
        ir.save(build(config, plan, self._pieces, self.file.name), graph)
        write_folder(plan, config, self.weights.checkpoint, self._folder)
        return Artifact(
            format=plan.format,
            type_name=plan.type_name,
            path=self._folder,
            nbytes=graph.stat().st_size + self.file.stat().st_size,
            weights_bytes=plan.weights_bytes,
            kv_cache_bytes_per_token=config.kv_cache_bytes_per_token(plan.kv_bytes_per_value),
            plan=plan,
            notes=plan.notes,
        )


def writing_memory(plan: Plan) -> int:
    """Bytes of memory: slabs of weights, and the graph."""
    return 160 << 20


def file_bytes(plan: Plan, source: Source) -> int:
    """See ``compress.formats``: bytes of the graph and of the external data."""
    import onnx_ir as ir

    from exporters.onnx.graph import build

    pieces = layout(plan.entries)
    model = build(source.config, plan, pieces, Path(data_file(plan)).name)
    graph = ir.serde.serialize_model(model)
    return int(graph.ByteSize()) + max(piece.offset + piece.nbytes for piece in pieces.values())
