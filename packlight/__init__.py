"""packlight as a library: all public names, loaded at first use.

>>> import packlight as pk
>>> pk.get_grid("int4-g32").bits
4

Docstrings have arguments, return values and an example each; docs/api.md shows five complete tasks.
Calls may run concurrently in several threads.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress import __version__ as __version__
    from compress.api import Progress as Progress
    from compress.api import build as build
    from compress.api import fit as fit
    from compress.api import inspect as inspect
    from compress.api import plan as plan
    from compress.api import verify as verify
    from compress.calibration.statistics import LayerStats as LayerStats
    from compress.checkpoint.checkpoint import Checkpoint as Checkpoint
    from compress.console import Console as Console
    from compress.errors import PacklightError as PacklightError
    from compress.grids import Grid as Grid
    from compress.grids import Quantized as Quantized
    from compress.grids import get_grid as get_grid
    from compress.grids import register_grid as register_grid
    from compress.plan.shapes import Plan as Plan
    from compress.recipe.model import Recipe as Recipe
    from compress.report.report import Report as Report
    from compress.solvers import quantize as quantize
    from compress.solvers import register_solver as register_solver

WHERE = {
    "Checkpoint": "compress.checkpoint.checkpoint",
    "Console": "compress.console",
    "Grid": "compress.grids",
    "LayerStats": "compress.calibration.statistics",
    "PacklightError": "compress.errors",
    "Plan": "compress.plan.shapes",
    "Progress": "compress.api",
    "Quantized": "compress.grids",
    "Recipe": "compress.recipe.model",
    "Report": "compress.report.report",
    "__version__": "compress",
    "build": "compress.api",
    "fit": "compress.api",
    "get_grid": "compress.grids",
    "inspect": "compress.api",
    "plan": "compress.api",
    "quantize": "compress.solvers",
    "register_grid": "compress.grids",
    "register_solver": "compress.solvers",
    "verify": "compress.api",
}

__all__ = [
    "Checkpoint", "Console", "Grid", "LayerStats", "PacklightError", "Plan", "Progress",
    "Quantized", "Recipe", "Report", "__version__", "build", "fit", "get_grid", "inspect", "plan",
    "quantize", "register_grid", "register_solver", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("exporters")  # fills the table of formats
    globals()[name] = found = getattr(importlib.import_module(WHERE[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
