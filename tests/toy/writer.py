"""The file and its header."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compress.checkpoint.side_files import hf_config, write_side_files
from compress.checkpoint.sources import Source
from compress.decoder.config_json import write_json
from compress.grids import get_grid
from compress.plan.shapes import Artifact, Plan, PlanEntry, Written
from compress.plan.weights import Weights


class Writer:
    """See ``compress.plan.shapes.Writer``."""

    def __init__(self, plan: Plan, weights: Weights, folder: Path, written: Written) -> None:
        self.plan, self.weights, self._written = plan, weights, written
        self._folder = folder
        self.file = folder / f"{plan.model_name}.toy"
        if not weights.ledger.cut(self.file):
            self.file.write_bytes(b"")

    def put(self, entry: PlanEntry) -> int:
        """Append codes and scales to the file."""
        with self.file.open("ab") as file:
            if entry.grid == "F32":
                file.write(self.weights.read(entry.name).astype(np.float32).tobytes())
            else:
                packed = self.weights.quantize(entry.name, get_grid(entry.grid)).pack()
                file.write(packed["codes"].tobytes() + packed["scale"].tobytes())
            self._written(entry.nbytes)
            return file.tell()

    def close(self) -> Artifact:
        """Config, places and side files."""
        plan, config = self.plan, self.weights.config
        header = {
            "type": plan.type_name,
            "config": hf_config(config),
            "tensors": [[entry.name, entry.grid, list(entry.shape)] for entry in plan.entries],
        }
        beside = self.file.with_suffix(".toy.json")
        write_json(beside, header)
        write_side_files(config, self.weights.checkpoint, self._folder)
        return Artifact(
            format=plan.format,
            type_name=plan.type_name,
            path=self.file,
            nbytes=self.file.stat().st_size,
            weights_bytes=plan.weights_bytes,
            kv_cache_bytes_per_token=config.kv_cache_bytes_per_token(plan.kv_bytes_per_value),
            plan=plan,
            notes=plan.notes,
        )


def writing_memory(plan: Plan) -> int:
    """The largest tensor, in float32 and as codes."""
    return 8 * max(entry.nbytes for entry in plan.entries)


def file_bytes(plan: Plan, source: Source) -> int:
    """See ``compress.formats``."""
    return plan.weights_bytes
