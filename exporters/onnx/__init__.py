"""ONNX: one folder that onnxruntime, ORT GenAI, Optimum and Transformers.js all load.

    planning.py   settings → which tensor gets which grid, and its bytes
    packing.py    codes, scales and zero points as MatMulNBits and GatherBlockQuantized store them
    graph.py      the decoder, node by node, from a DecoderConfig; builder.py collects the nodes
    writer.py     the .onnx file and its external data, streamed
    folder.py     config.json, genai_config.json, the tokenizer
    runtime.py    onnxruntime
    inspection.py what a folder says of itself

Importing this package loads none of onnx, onnx_ir and onnxruntime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.checkpoint.sources import Source
from compress.decoder.config import DecoderConfig
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
    """``int4-g32``, ``int8-g128-asym`` …; ``F16`` for embeddings and what shall stay float."""
    from exporters.onnx.planning import GRIDS

    return GRIDS


def plan(
    config: DecoderConfig,
    settings: Mapping[str, Any],
    *,
    model_name: str = "model",
    choices: Mapping[str, str] | None = None,
) -> Plan:
    """See ``exporters.onnx.planning.make_plan``."""
    from exporters.onnx.planning import make_plan

    return make_plan(config, settings, model_name, choices)


def candidates(
    entry: PlanEntry, settings: Mapping[str, Any], wanted: Sequence[str] = ()
) -> Sequence[Candidate]:
    """See ``exporters.onnx.planning.candidates``."""
    from exporters.onnx import planning

    return planning.candidates(entry, wanted)


def file_bytes(plan: Plan, source: Source) -> int:
    """See ``exporters.onnx.writer.file_bytes``."""
    from exporters.onnx import writer

    return writer.file_bytes(plan, source)


def write(plan: Plan, weights: Weights, folder: Path, progress: Progress) -> Artifact:
    """See ``exporters.onnx.writer.write``."""
    from exporters.onnx import writer

    return writer.write(plan, weights, folder, progress)


def writing_memory(plan: Plan) -> int:
    """Slabs of weights, and the graph."""
    return 160 << 20


def open_runtime(path: Path, *, context: int, threads: int = 0) -> Runtime:
    """See ``exporters.onnx.runtime.OnnxRuntime``."""
    from exporters.onnx.runtime import OnnxRuntime

    return OnnxRuntime(path, context=context, threads=threads)


def describe(path: Path) -> dict[str, Any]:
    """See ``exporters.onnx.inspection.describe``."""
    from exporters.onnx import inspection

    return inspection.describe(path)
