"""The solvers that a recipe may name, and what each needs of the statistics of inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compress.errors import UsageError, did_you_mean, one_line


@dataclass(frozen=True)
class SolverRow:
    """One solver (``quantize.solver``).

    Attributes:
        solve: ``solve(weight, grid, stats) -> Quantized``, see ``compress.solvers``; or where it
            is, ``module:function``: modules are loaded when first asked for.
        needs: what of the inputs' statistics it goes by: ``importance``, ``hessian``, or None,
            which means no calibration.
    """

    solve: Callable[..., Any] | str
    needs: str | None = None


SOLVERS: dict[str, SolverRow] = {
    "rtn": SolverRow("compress.solvers:rtn"),
    "scale_search": SolverRow("compress.solvers:scale_search", "importance"),
    "gptq": SolverRow("compress.solvers.gptq:gptq", "hessian"),
}
BUILTIN_SOLVERS = tuple(SOLVERS)
SOLVER_NEEDS = (None, "importance", "hessian")
SOLVER_ENTRY_POINTS = "packlight.solvers"  # group in which other packages name solvers


def solver_names() -> list[str]:
    """Every solver that a recipe may name: those of the table, then installed packages'."""
    from importlib.metadata import entry_points

    found = entry_points(group=SOLVER_ENTRY_POINTS)
    return list(dict.fromkeys([*SOLVERS, *(point.name for point in found)]))


def solver_row(name: str) -> SolverRow:
    """The solver of that name.

    A solver of another package is loaded here. What it needs is the attribute ``needs`` of its
    function; it needs nothing where there is none.

    Raises:
        UsageError: no such solver, or one that cannot be loaded.
    """
    if name in SOLVERS:
        return SOLVERS[name]
    from importlib.metadata import entry_points

    for point in entry_points(group=SOLVER_ENTRY_POINTS, name=name):
        try:
            solve = point.load()
        except Exception as error:  # importing another package's code may raise anything
            raise UsageError(
                f"solver {name!r} cannot be loaded: {one_line(error)}", hint=f"it is {point.value}"
            ) from error
        SOLVERS[name] = checked_row(name, SolverRow(solve, getattr(solve, "needs", None)))
        return SOLVERS[name]
    raise UsageError(f"unknown solver {name!r}", hint=did_you_mean(name, solver_names()))


def checked_row(name: str, row: SolverRow) -> SolverRow:
    """The row.

    Raises:
        UsageError: its solver is no function, or needs what calibration does not have.
    """
    if not callable(row.solve):
        raise UsageError(f"solver {name!r} is no function", hint="solve(weight, grid, stats)")
    if row.needs not in SOLVER_NEEDS:
        raise UsageError(
            f"solver {name!r} needs {row.needs!r}, which calibration does not have",
            hint="None, importance or hessian",
        )
    return row


def needs_of(solver: str) -> str | None:
    """What of the inputs' statistics a solver goes by; None: no calibration.

    Raises:
        UsageError: as ``solver_row``.
    """
    return (SOLVERS.get(solver) or solver_row(solver)).needs
