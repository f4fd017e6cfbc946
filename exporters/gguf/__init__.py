"""GGUF: one file for llama.cpp, with the weights, the keys and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.arch import DecoderConfig
from compress.model import Artifact, Plan, Progress, Weights

if TYPE_CHECKING:
    from exporters.gguf.runtime import LlamaCpp

__all__ = ["describe", "grids", "open_runtime", "plan", "write"]


def grids() -> Sequence[str]:
    """See ``exporters.Exporter.grids``."""
    from exporters.gguf.mixes import BLOCKS

    return tuple(BLOCKS)


def plan(config: DecoderConfig, settings: Mapping[str, Any], *, model_name: str = "model") -> Plan:
    """See ``exporters.Exporter.plan``; ``settings["type"]`` is a llama.cpp preset."""
    from exporters.gguf.planning import make_plan

    return make_plan(config, settings, model_name=model_name)


def write(plan: Plan, weights: Weights, folder: Path, progress: Progress) -> Artifact:
    """See ``exporters.Exporter.write``; the artifact's path is the file."""
    from exporters.gguf.writer import write_file

    return write_file(plan, weights, folder, progress)


def open_runtime(path: Path, *, context: int, threads: int = 0) -> LlamaCpp:
    """See ``exporters.Exporter.open_runtime``: llama.cpp itself."""
    from exporters.gguf.runtime import LlamaCpp

    return LlamaCpp(path, context=context, threads=threads)


def describe(path: Path) -> dict[str, Any]:
    """See ``exporters.Exporter.describe``."""
    from exporters.gguf.inspection import describe_file

    return describe_file(path)
