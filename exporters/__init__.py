"""The shipyards: one target each. A format is a package with the functions that
``compress.model.Exporter`` lists.

Formats never see each other, and see of the workshop only what ``compress`` gives: a
``DecoderConfig``, a ``Plan`` and ``Weights`` to pull from, one tensor at a time.
"""

from __future__ import annotations

import importlib
from typing import cast

from compress.errors import UsageError
from compress.model import Exporter

__all__ = ["EXPORTERS", "Exporter", "get_exporter"]

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
        raise UsageError(f"unknown format {name!r}", hint=f"one of: {', '.join(EXPORTERS)}")
    return cast(Exporter, importlib.import_module(EXPORTERS[name]))
