"""GGUF: one file for llama.cpp, with the weights, the keys and the tokenizer.

    planning.py   type name → which tensor gets which grid, and its bytes
    mixes.py      llama.cpp's presets (Q4_K_M …) and what rows that do not fit get
    metadata.py   tensor names, architecture keys, rope tables
    tokenizer.py  the tokenizer's keys; splitting.py: llama.cpp's name of its pattern
    writer.py     the file, streamed
    runtime.py    llama.cpp itself
    inspection.py what a file says of itself; head.py reads its keys and tensor table

Importing this package loads neither gguf nor llama.cpp.
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
    """``Q4_K``, ``Q8_0``, ``IQ4_NL`` …: ggml's types, of which presets are mixed."""
    from exporters.gguf.mixes import BLOCKS

    return tuple(BLOCKS)


def plan(
    config: DecoderConfig,
    settings: Mapping[str, Any],
    *,
    model_name: str = "model",
    choices: Mapping[str, str] | None = None,
) -> Plan:
    """See ``exporters.gguf.planning.make_plan``."""
    from exporters.gguf.planning import make_plan

    return make_plan(config, settings, model_name, choices)


def candidates(
    entry: PlanEntry, settings: Mapping[str, Any], wanted: Sequence[str] = ()
) -> Sequence[Candidate]:
    """See ``exporters.gguf.planning.candidates``."""
    from exporters.gguf import planning

    return planning.candidates(entry, wanted)


def file_bytes(plan: Plan, source: Source) -> int:
    """See ``exporters.gguf.writer.file_bytes``."""
    from exporters.gguf import writer

    return writer.file_bytes(plan, source)


def write(plan: Plan, weights: Weights, folder: Path, progress: Progress) -> Artifact:
    """See ``exporters.gguf.writer.write``."""
    from exporters.gguf import writer

    return writer.write(plan, weights, folder, progress)


def writing_memory(plan: Plan) -> int:
    """Slabs of weights, and their blocks."""
    return 160 << 20


def open_runtime(path: Path, *, context: int, threads: int = 0) -> Runtime:
    """See ``exporters.gguf.runtime.LlamaCpp``."""
    from exporters.gguf.runtime import LlamaCpp

    return LlamaCpp(path, context=context, threads=threads)


def describe(path: Path) -> dict[str, Any]:
    """See ``exporters.gguf.inspection.describe``."""
    from exporters.gguf import inspection

    return inspection.describe(path)
