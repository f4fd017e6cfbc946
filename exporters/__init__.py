"""The shipyards: one target each. A format is a package with the functions that
``compress.plan.shapes.Exporter`` lists.

Formats never see each other, and see of the workshop only what ``compress`` gives: a
``DecoderConfig``, a ``Plan`` and ``Weights`` to pull from, one tensor at a time.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from compress.calibration.statistics import Statistics
from compress.decoder.config import DecoderConfig
from compress.errors import UsageError, did_you_mean
from compress.plan.shapes import Exporter, Shipyard

__all__ = ["EXPORTERS", "SHIPYARD", "get_exporter"]

EXPORTERS: dict[str, str] = {
    "gguf": "exporters.gguf",
    "onnx": "exporters.onnx",
    "coreml": "exporters.coreml",
}


def get_exporter(name: str) -> Exporter:
    """The exporter of a format, imported now.

    Raises:
        UsageError: an unknown format.
    """
    if name not in EXPORTERS:
        raise UsageError(f"unknown format {name!r}", hint=did_you_mean(name, EXPORTERS))
    return cast(Exporter, importlib.import_module(EXPORTERS[name]))


def write_pages(report: Mapping[str, Any], folder: Path) -> None:
    """``report.html`` and the model card, both from ``report.json``."""
    from compress.report.card import model_card
    from compress.report.html import render

    (folder / "report.html").write_text(render(report), encoding="utf-8")
    (folder / "README.md").write_text(model_card(report), encoding="utf-8")


def read_imatrix(path: Path, config: DecoderConfig) -> Statistics:
    """See ``exporters.gguf.imatrix.read_imatrix``."""
    from exporters.gguf.imatrix import read_imatrix

    return read_imatrix(path, config)


def write_imatrix(path: Path, config: DecoderConfig, statistics: Statistics) -> None:
    """See ``exporters.gguf.imatrix.write_imatrix``."""
    from exporters.gguf.imatrix import write_imatrix

    write_imatrix(path, config, statistics)


# -P: a folder named `exporters` where the user happens to stand must not shadow ours.
SHIPYARD = Shipyard(
    get_exporter=get_exporter,
    probe=(sys.executable, "-P", "-m", "exporters.probe"),
    write_pages=write_pages,
    read_imatrix=read_imatrix,
    write_imatrix=write_imatrix,
)
