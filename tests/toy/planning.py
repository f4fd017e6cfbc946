"""The grid of each tensor: matrices have the requested one, vectors float32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.decoder.config import DecoderConfig, WeightMap
from compress.grids import get_grid
from compress.plan.shapes import Candidate, Plan, PlanEntry, PlanRequest, mix_name

GRIDS = ("int8-g32", "int8-channel")


def plan(config: DecoderConfig, request: PlanRequest) -> Plan:
    """See ``compress.formats``."""
    settings = {"grid": "int8-channel"} | dict(request.settings)
    shapes = WeightMap(config)
    entries = []
    for name in shapes.names(tied_head=False, repeats=False):
        shape = shapes.shape(name)
        grid = request.choices.get(name, settings["grid"]) if len(shape) == 2 else "F32"
        entries.append(PlanEntry(name, name, grid, shape, entry_bytes(grid, shape)))
    return Plan(
        format="toy",
        type_name=mix_name(entries, config) if request.choices else settings["grid"],
        model_name=request.model_name,
        entries=tuple(entries),
        settings=settings,
        max_context=config.max_context,
        kv_bytes_per_value=4,
    )


def entry_bytes(grid: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor on a grid."""
    return 4 * shape[0] if grid == "F32" else get_grid(grid).nbytes((shape[0], shape[1]))


def candidates(
    entry: PlanEntry, settings: Mapping[str, Any], wanted: Sequence[str] = ()
) -> list[Candidate]:
    """See ``compress.formats``."""
    if len(entry.shape) != 2:
        return []
    return [Candidate(grid, entry_bytes(grid, entry.shape)) for grid in wanted or GRIDS]
