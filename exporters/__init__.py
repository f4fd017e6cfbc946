"""The shipyards: one target each. A format is a package with the functions of ``Exporter``.

Formats never see each other, and see of the workshop only what ``compress`` gives: a
``DecoderConfig``, a ``Plan`` and ``Weights`` to pull from, one tensor at a time.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from compress.arch import DecoderConfig
from compress.errors import UsageError
from compress.model import Artifact, Plan, Progress, Runtime, Weights

__all__ = ["EXPORTERS", "Exporter", "get_exporter"]

EXPORTERS: dict[str, str] = {
    "gguf": "exporters.gguf",
    "onnx": "exporters.onnx",
    "coreml": "exporters.coreml",
}


class Exporter(Protocol):
    """What the package of a format offers (its ``__init__`` has these as plain functions)."""

    def grids(self) -> Sequence[str]:
        """Names of the grids that the format can write."""
        ...

    def plan(
        self, config: DecoderConfig, settings: Mapping[str, Any], *, model_name: str = "model"
    ) -> Plan:
        """Which tensor gets which grid, and its bytes; arithmetic only, nothing is read.

        Args:
            config: the model.
            settings: the recipe's ``targets.<format>`` (already validated).
            model_name: base of the file names.

        Raises:
            GridError: a row that no grid of the target can hold.
            UnsupportedModelError: a model that the target cannot express.
        """
        ...

    def write(self, plan: Plan, weights: Weights, folder: Path, progress: Progress) -> Artifact:
        """Write the artifact into ``folder`` (which exists and is empty), streaming.

        ``folder`` is a ``.partial`` work folder of the caller, who renames it when all is well.
        Calls ``progress(done_bytes, total_bytes)`` as it goes.
        """
        ...

    def open_runtime(self, path: Path, *, context: int, threads: int = 0) -> Runtime:
        """Load a written artifact in the runtime that will execute it.

        Args:
            path: the artifact as ``Artifact.path`` names it (file or folder).
            context: positions to make room for.
            threads: 0 for the CPUs that the process may use.

        Raises:
            ArtifactError: unreadable, or refused by the runtime.
            RuntimeMissingError: the runtime is not installed.
        """
        ...

    def describe(self, path: Path) -> dict[str, Any]:
        """What ``packlight inspect`` shows of an artifact: metadata and tensors, no weights read.

        Keys: ``format``, ``name``, ``architecture``, ``parameters`` (None when unknown), ``bytes``,
        ``bits_per_weight``, ``metadata`` (str → printable), ``tensors`` (list of name, shape,
        grid, bytes).
        """
        ...


def get_exporter(name: str) -> Exporter:
    """The exporter of a format, imported now.

    Raises:
        UsageError: an unknown format.
    """
    if name not in EXPORTERS:
        raise UsageError(f"unknown format {name!r}", hint=f"one of: {', '.join(EXPORTERS)}")
    return cast(Exporter, importlib.import_module(EXPORTERS[name]))
