"""Solvers choose codes on a grid: ``solve(weight, grid, name) -> Quantized``.

They see weights, grids and statistics, never a file format.
"""

from __future__ import annotations

import importlib

from compress.errors import UsageError, did_you_mean
from compress.model import Solver

__all__ = ["SOLVERS", "get_solver"]

SOLVERS: dict[str, str] = {
    "rtn": "compress.solvers.rtn",
}


def get_solver(name: str) -> Solver:
    """The solver of that name (the function of the same name in its module).

    Raises:
        UsageError: no such solver.
    """
    if name not in SOLVERS:
        raise UsageError(f"unknown solver {name!r}", hint=did_you_mean(name, SOLVERS))
    solver: Solver = getattr(importlib.import_module(SOLVERS[name]), name)
    return solver
