"""Describes chosen grids in plan.json and on the terminal: sizes, expected divergence, tensors with
more bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from compress.allocation.step import Budgeted
from compress.console import Console, format_bytes
from compress.plan.document import HighTensor, PlannedBudget

__all__ = ["describe", "print_budgets"]

SHOWN = 5  # tensors with more bits that are listed
HIGH = 1.15  # times the file's bits per weight


def describe(budgeted: Budgeted) -> PlannedBudget:
    """``plan.json``'s ``budget`` of a target."""
    target, limit = budgeted.target, budgeted.limit
    return PlannedBudget(
        limit_bytes=limit.nbytes,
        limit_is=limit.description,
        smallest_bytes=target.smallest_bytes,
        recommended_bytes=budgeted.recommended,
        kept_high=high_precision(budgeted),
    )


def high_precision(budgeted: Budgeted) -> list[HighTensor]:
    """The tensors with clearly more bits per weight than the file, the most costly ones first;
    empty where nothing was measured.
    """
    target, table = budgeted.target, budgeted.table
    if table is None:
        return []
    rows = []
    for choice, picked in zip(target.choices, budgeted.allocation.options, strict=True):
        options = target.options(choice, table)
        weights = math.prod(choice.shape) * len(choice.names)
        rows.append((choice, picked, options, weights))
    whole = sum(o[picked].nbytes for _, picked, o, _ in rows) / sum(row[3] for row in rows)
    typical = median(options[0].cost / weights for _, _, options, weights in rows)
    found = []
    for choice, picked, options, weights in rows:
        if options[picked].nbytes / weights < HIGH * whole:
            continue
        lowest = choice.options[0].grid
        if picked == 0:
            why = f"the recipe keeps it at {choice.floor} bits or more"
        else:
            times = options[0].cost / weights / typical if typical else 0.0
            why = (
                f"in {lowest} it alone would cost {options[0].cost:.3g} nats, "
                f"{times:.2g} times the median tensor per weight"
            )
        grid = choice.options[picked].grid
        found.append((options[0].cost, HighTensor(name=choice.name, grid=grid, why=why)))
    found.sort(key=lambda row: -row[0])
    return [row for _, row in found[:SHOWN]]


def print_budgets(budgeted: Sequence[Budgeted], console: Console) -> None:
    """Print the part of ``--dry-run`` on budgets."""
    rows = []
    for b in budgeted:
        plan = b.allocation.plan
        share = 100 * plan.file_bytes / b.limit.nbytes
        rows.append(
            [
                plan.format,
                format_bytes(b.limit.nbytes),
                f"{format_bytes(plan.file_bytes)}, {share:.1f} %",
                show_divergence(plan.expected_divergence),
                format_bytes(b.target.smallest_bytes),
                format_bytes(b.recommended) if b.table else show_divergence(None),
            ]
        )
    headers = ["format", "budget", "file", "expected KL", "smallest", "recommended"]
    console.table(headers, rows)
    for b in budgeted:
        if b.table is None:
            name = b.target.plan.format
            console.data(f"{name}: every tensor has its largest grid; nothing was measured")
        if b.limit.description:
            console.data(f"{b.target.plan.format}: {b.limit.description}")
        for row in high_precision(b):
            console.data(f"{b.target.plan.format}: {row.name} is {row.grid}: {row.why}")


def show_divergence(divergence: float | None) -> str:
    """A divergence with four decimals, or a dash where it was not measured."""
    return "–" if divergence is None else f"{divergence:.4f}"
