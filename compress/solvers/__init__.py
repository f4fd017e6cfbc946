"""Solvers choose codes on a grid: ``solve(weight, grid, stats) -> Quantized``.

They see weights, grids and statistics, never a file format.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from compress.calibration.statistics import LayerStats, Statistics
from compress.errors import UsageError, did_you_mean
from compress.grids import Float32, Grid, Quantized
from compress.plan.shapes import Solver

__all__ = ["NEEDS", "SOLVERS", "get_solver", "slabs_at_once"]

SOLVERS: dict[str, str] = {
    "rtn": "compress.solvers.rtn",
    "scale_search": "compress.solvers.scale_search",
    "gptq": "compress.solvers.gptq",
}

# What of the statistics a solver goes by; nothing: no calibration.
NEEDS: dict[str, str] = {"scale_search": "importance", "gptq": "hessian"}

MOST_SLABS = 7

Solve = Callable[[Float32, Grid, LayerStats | None], Quantized]


def get_solver(name: str, statistics: Statistics | None = None) -> Solver:
    """The solver of that name (the function of the same name in its module).

    Args:
        name: key of ``SOLVERS``.
        statistics: what it looks a weight's input up in.

    Raises:
        UsageError: no such solver.
    """
    if name not in SOLVERS:
        raise UsageError(f"unknown solver {name!r}", hint=did_you_mean(name, SOLVERS))
    solve: Solve = getattr(importlib.import_module(SOLVERS[name]), name)

    def solver(weight: Float32, grid: Grid, tensor: str) -> Quantized:
        stats = statistics.for_weight(tensor) if statistics is not None else None
        return solve(weight, grid, stats)

    return solver


def slabs_at_once(name: str, threads: int) -> int:
    """Slabs of rows that a solver is best given at a time, each with its share of the threads.

    GPTQ shares one slab out among all threads itself, for the memory that each takes. The others
    take little, and work on a slab in steps of which each would wait for its slowest thread.
    """
    return 1 if NEEDS.get(name) == "hessian" else min(threads, MOST_SLABS)
