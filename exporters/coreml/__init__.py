"""Core ML: one ``.mlpackage`` for iOS 18 and macOS 15, with the names of swift-transformers.

    planning.py   settings → which tensor gets which grid, how it is stored, and its bytes
    graph.py      the decoder as a MIL program, operation by operation, from a DecoderConfig
    constants.py  placeholders for its constants, filled one at a time
    writer.py     the package, streamed; all that is private of coremltools
    weight_file.py its arrays, written slab by slab or only counted
    runtime.py    Core ML on macOS, the MIL evaluator elsewhere
    inspection.py what a package says of itself
    evaluator.py  runs a package on any machine; mil*.py, constexpr.py, blobs.py are its parts

Importing this package loads neither coremltools nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.checkpoint.sources import Source
from compress.decoder.config import DecoderConfig
from compress.grids import get_grid
from compress.grids.sparse import SparseGrid
from compress.plan.shapes import Artifact, Candidate, Plan, PlanEntry, Progress, Runtime, Weights

__all__ = [
    "candidates",
    "describe",
    "file_bytes",
    "grids",
    "open_runtime",
    "plan",
    "write",
    "writing_memory",
]


def grids() -> Sequence[str]:
    """``int4-g32``, ``int8-channel``, ``lut4-g8``, ``lut6-tensor`` …, ``F16``."""
    from exporters.coreml.planning import GRIDS

    return GRIDS


def plan(
    config: DecoderConfig,
    settings: Mapping[str, Any],
    *,
    model_name: str = "model",
    choices: Mapping[str, str] | None = None,
) -> Plan:
    """See ``exporters.coreml.planning.make_plan``."""
    from exporters.coreml.planning import make_plan

    return make_plan(config, settings, model_name, choices)


def candidates(
    entry: PlanEntry, settings: Mapping[str, Any], wanted: Sequence[str] = ()
) -> Sequence[Candidate]:
    """See ``exporters.coreml.planning.candidates``."""
    from exporters.coreml import planning

    return planning.candidates(entry, settings, wanted)


def file_bytes(plan: Plan, source: Source) -> int:
    """See ``exporters.coreml.writer.file_bytes``."""
    from exporters.coreml import writer

    return writer.file_bytes(plan, source)


def write(plan: Plan, weights: Weights, folder: Path, progress: Progress) -> Artifact:
    """See ``exporters.coreml.writer.write``."""
    from exporters.coreml import writer

    return writer.write(plan, weights, folder, progress)


def writing_memory(plan: Plan) -> int:
    """coremltools with its program, and what does not go slab by slab: a matrix that shares one
    table, and the values of a sparse one, which come behind its mask."""
    whole = [8 * math.prod(e.shape) for e in plan.entries if e.grid.endswith("-tensor")]
    sparse = [2 * e.nbytes for e in plan.entries if isinstance(get_grid(e.grid), SparseGrid)]
    return (360 << 20) + max([0, *whole, *sparse])


def open_runtime(path: Path, *, context: int, threads: int = 0) -> Runtime:
    """See ``exporters.coreml.runtime.open_runtime``."""
    from exporters.coreml import runtime

    return runtime.open_runtime(path, context=context, threads=threads)


def describe(path: Path) -> dict[str, Any]:
    """See ``exporters.coreml.inspection.describe``."""
    from exporters.coreml import inspection

    return inspection.describe(path)
