"""Solvers choose codes on a grid: ``solve(weight, grid, stats) -> Quantized``.

    weight   float32 [rows, columns], whole or some of its rows
    grid     compress.grids.Grid
    stats    compress.calibration.statistics.LayerStats of the weight's input; None where there are
             none (an embedding, an input that calibration has not seen, a solver that needs none)

A solver sees weights, grids and statistics, never a file format. ``compress.recipe.SOLVERS`` is
the table of solvers. To add one, call ``register_solver`` in a program, or for the command line
install a package with this entry point, whose function may have an attribute ``needs``:

    [project.entry-points."packlight.solvers"]
    my_solver = "my_package:my_solver"
"""

from __future__ import annotations

import importlib

import numpy as np

from compress.calibration.statistics import LayerStats
from compress.errors import UsageError
from compress.grids import Float32, Grid, Quantized, get_grid
from compress.plan.weights import Solver
from compress.recipe import (
    BUILTIN_SOLVERS,
    SOLVERS,
    SolverRow,
    checked_row,
    needs_of,
    solver_row,
)

__all__ = ["get_solver", "quantize", "register_solver", "rtn", "scale_search"]

# Importance is raised to this power: inputs are correlated, and other texts use other columns, so
# the measured ratios between columns overstate the differences. On the demo model and a text that
# is neither the calibration's nor the held-out one, over three draws of calibration texts, mean KL
# at 0.75 against 1: Q4_K_M -4 %, Q3_K_M -5 %, lut4-g8 -4 %, int4-g32 +1 %; 0.5 and less are worse
# on int4.
POWER = 0.75


def rtn(weight: Float32, grid: Grid, stats: LayerStats | None = None) -> Quantized:
    """Round to nearest: each weight to the nearest code of the grid's best fit of the weights.

    Args:
        weight: float32 ``[rows, columns]``.
        grid: any grid.
        stats: unused.
    """
    return grid.quantize(weight)


def scale_search(weight: Float32, grid: Grid, stats: LayerStats | None = None) -> Quantized:
    """Fit the grid with the squared error weighted by column importance, then round to nearest.

    The output error of a linear is ``Σ_c E[x_c²] (w_c - ŵ_c)²`` summed over rows, where inputs are
    taken to be uncorrelated; ``E[x_c²]`` is the importance (llama.cpp's imatrix). The grids search
    scale, minimum, zero point or palette for the least such error and refit in closed form.

    Args:
        weight: float32 ``[rows, columns]``, whole or some of its rows: rows are independent, except
            those that share a palette.
        grid: any grid.
        stats: of the weight's input. None (an embedding, an input that calibration has not seen)
            is the unweighted fit, ``rtn``.
    """
    return grid.quantize(weight, error_weights(stats))


def error_weights(stats: LayerStats | None) -> Float32 | None:
    """The factors of each column's squared error in ``scale_search``, float32 ``[columns]``; None
    without statistics of the input."""
    if stats is None or not stats.importance.any():
        return None
    return np.power(stats.importance, np.float32(POWER))


def get_solver(name: str) -> Solver:
    """The solver of that name, ``solve(weight, grid, stats) -> Quantized``.

    Args:
        name: in ``SOLVERS``, or of an entry point.

    Raises:
        UsageError: no such solver, or one that cannot be loaded. The returned function raises it
            where the result is not a ``Quantized`` of the weight's shape on the grid.
    """
    solve = (SOLVERS.get(name) or solver_row(name)).solve
    if isinstance(solve, str):
        module, _, function = solve.partition(":")
        solve = getattr(importlib.import_module(module), function)
    if name in BUILTIN_SOLVERS:
        builtin: Solver = solve
        return builtin

    def checked(weight: Float32, grid: Grid, stats: LayerStats | None) -> Quantized:
        found = solve(weight, grid, stats)
        if isinstance(found, Quantized) and found.shape == weight.shape and found.grid == grid:
            return found
        raise UsageError(
            f"solver {name!r} returned something else than {grid.name} of shape {weight.shape}",
            hint="Quantized(codes, params, grid, weight.shape)",
        )

    return checked


def register_solver(name: str, solve: Solver, needs: str | None = None) -> None:
    """Add a solver to this process: recipes may name it (``quantize.solver``) from now on.

    Args:
        name: other than packlight's own; one that was registered before is replaced.
        solve: ``solve(weight, grid, stats) -> Quantized``; see the module. Rows of a weight come in
            slabs, several at once in threads, unless ``needs`` is ``hessian``.
        needs: ``importance`` or ``hessian``: what calibration collects for it. None: nothing.

    Raises:
        UsageError: a name of packlight's own, no function, or other needs.

    Example:
        >>> def halved(weight, grid, stats):
        ...     return grid.quantize(weight / 2)
        >>> register_solver("halved", halved)
        >>> quantize(np.ones((2, 32), np.float32), "F16", solver="halved").decode()[0, 0]
        np.float32(0.5)
    """
    if name in BUILTIN_SOLVERS:
        raise UsageError(f"solver {name!r} is packlight's own", hint="another name")
    SOLVERS[name] = checked_row(name, SolverRow(solve, needs))


def quantize(
    weight: Float32,
    grid: str | Grid,
    importance: Float32 | None = None,
    solver: str | None = None,
) -> Quantized:
    """Quantize one matrix.

    Args:
        weight: float32 (or what converts to it) ``[rows, columns]`` = ``[out, in]``.
        grid: a Grid, or its name: ``Q4_K``, ``int4-g32``, ``lut4-g8``, ``F16`` …
        importance: float ``[columns]``, mean squares of the inputs: what the squared errors of the
            columns are weighed by. None: all columns alike.
        solver: ``rtn``, ``scale_search`` or a registered one; by default ``scale_search`` with an
            importance and ``rtn`` without.

    Returns:
        The codes and parameters. ``decode()`` is the weight as a runtime reconstructs it, float32
        ``[rows, columns]``; ``pack()`` the arrays of a file; ``bits_per_weight`` what they take.

    Raises:
        GridError: no such grid, a shape that does not fit it, or numbers that are not finite.
        UsageError: a weight that is no matrix, an importance that is not ``[columns]`` numbers
            >= 0, an unknown solver, or one that needs more than is given (``gptq`` needs second
            moments of the inputs, which a build collects).

    Example:
        >>> import numpy as np
        >>> weight = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
        >>> quantized = quantize(weight, "Q4_K")
        >>> quantized.bits_per_weight
        4.5
        >>> quantized.pack()["blocks"].shape  # bytes of a GGUF tensor
        (64, 144)
        >>> error = ((quantized.decode() - weight) ** 2).mean() / (weight**2).mean()
        >>> bool(error < 0.01)
        True
    """
    found = get_grid(grid) if isinstance(grid, str) else grid
    weight = np.ascontiguousarray(weight, np.float32)
    if weight.ndim != 2:
        raise UsageError(f"quantize takes a matrix, not {weight.ndim} dimensions")
    found.check((weight.shape[0], weight.shape[1]))
    stats = None
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        if importance.shape != weight.shape[1:] or not (importance >= 0).all():
            raise UsageError(f"the importance is not {weight.shape[1]} numbers >= 0")
        stats = LayerStats(0, importance)
    name = solver or ("rtn" if stats is None else "scale_search")
    needs = needs_of(name)
    if needs == "hessian" or (needs and stats is None):
        what = "second moments of the inputs" if needs == "hessian" else "the importance of columns"
        raise UsageError(
            f"solver {name!r} needs {what}",
            hint="a build collects them" if needs == "hessian" else "importance=",
        )
    return get_solver(name)(weight, found, stats)
