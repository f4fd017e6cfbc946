"""Solves a multiple-choice knapsack: one option per choice, the least cost within a budget.

First a Lagrangian sweep (Everett, *Operations Research* 11, 1963): every choice starts at its
smallest option, and the step that saves most cost per byte is taken next, along the lower convex
hull of each choice, until the budget is reached. The rest is filled greedily with any option that
still fits. That is within one step of the optimum; a search over partial choices, pruned by the
Lagrangian bound, then closes the gap: exactly, unless more than ``WIDTH`` partial choices are left
at some point, of which only the best are followed.

The result is deterministic: ties go to the earlier choice and the fewer bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Option", "solve"]

WIDTH = 20_000  # most partial choices at a time
SLACK = 1e-12  # relative; costs are summed in different orders

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]


class Option(NamedTuple):
    """Bytes and cost of an option; neither is negative."""

    nbytes: int
    cost: float


@dataclass(frozen=True)
class Step:
    """A step along the hull of a choice, from one option to the next larger one.

    Attributes:
        gain: cost saved per byte.
    """

    gain: float
    choice: int
    option: int
    nbytes: int


def solve(choices: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Choose an option index for each choice: least total cost within ``budget`` bytes.

    Args:
        choices: each with at least one option, in any order.
        budget: bytes for all.

    Raises:
        ValueError: the smallest options together exceed the budget.
    """
    smallest = [min(range(len(c)), key=lambda i: (c[i].nbytes, c[i].cost)) for c in choices]
    if sum(choice[i].nbytes for choice, i in zip(choices, smallest, strict=True)) > budget:
        raise ValueError(f"nothing fits in {budget} bytes")
    picked, price = sweep(choices, smallest, budget)
    fill(choices, picked, budget)
    return search(choices, picked, price, budget)


def sweep(
    choices: Sequence[Sequence[Option]], smallest: Sequence[int], budget: int
) -> tuple[list[int], float]:
    """The sweep: the picked options, and the price per byte at which the budget is reached."""
    picked = list(smallest)
    steps = [step for index, choice in enumerate(choices) for step in hull(index, choice)]
    steps.sort(key=lambda step: -step.gain)  # stable: a choice's own steps stay in order
    left = budget - sum(choice[i].nbytes for choice, i in zip(choices, picked, strict=True))
    price, stuck = 0.0, set()
    for step in steps:
        if step.choice in stuck:
            continue
        if step.nbytes > left:
            price = price or step.gain
            stuck.add(step.choice)
            continue
        picked[step.choice] = step.option
        left -= step.nbytes
    return picked, price


def hull(index: int, choice: Sequence[Option]) -> list[Step]:
    """The steps of one choice, each saving less per byte than the one before."""
    order = sorted(range(len(choice)), key=lambda i: (choice[i].nbytes, choice[i].cost))
    corners = [order[0]]
    for option in order[1:]:
        if choice[option].cost >= choice[corners[-1]].cost:
            continue
        while len(corners) > 1 and slope(choice, corners[-1], option) >= slope(
            choice, corners[-2], corners[-1]
        ):
            corners.pop()
        if choice[option].nbytes == choice[corners[-1]].nbytes:  # same bytes: keep the lower cost
            corners.pop()
        corners.append(option)
    return [
        Step(slope(choice, a, b), index, b, choice[b].nbytes - choice[a].nbytes)
        for a, b in pairwise(corners)
    ]


def slope(choice: Sequence[Option], small: int, large: int) -> float:
    """Cost saved per byte between two options."""
    more = choice[large].nbytes - choice[small].nbytes
    return (choice[small].cost - choice[large].cost) / more if more else float("inf")


def fill(choices: Sequence[Sequence[Option]], picked: list[int], budget: int) -> None:
    """The greedy fill: while any option fits in the remaining bytes, take the best saving."""
    left = budget - sum(choice[i].nbytes for choice, i in zip(choices, picked, strict=True))
    while True:
        best, saved = None, 0.0
        for index, choice in enumerate(choices):
            now = choice[picked[index]]
            for option, other in enumerate(choice):
                if other.nbytes - now.nbytes <= left and now.cost - other.cost > saved:
                    best, saved = (index, option), now.cost - other.cost
        if best is None:
            return
        left += choices[best[0]][picked[best[0]]].nbytes - choices[best[0]][best[1]].nbytes
        picked[best[0]] = best[1]


# --- the search ---------------------------------------------------------------------------------


def search(
    choices: Sequence[Sequence[Option]], picked: Sequence[int], price: float, budget: int
) -> list[int]:
    """A better pick than ``picked`` where there is one.

    Partial choices are (bytes, cost) of the first choices. One that takes no fewer bytes and costs
    no less than another is dropped; so is one whose cost, plus the least cost of the other choices
    at the ``price`` of a byte, is not below that of ``picked``.
    """
    tables = [np.array(choice, np.float64) for choice in choices]
    known = sum(choice[i].cost for choice, i in zip(choices, picked, strict=True))
    limit = known * (1 - SLACK)
    priced = [float((table[:, 1] + price * table[:, 0]).min()) for table in tables]
    fewest = [int(table[:, 0].min()) for table in tables]
    nbytes, cost = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[Int64, Int64]] = []
    for index, table in enumerate(tables):
        options = len(table)
        nbytes = (nbytes[:, None] + table[:, 0].astype(np.int64)).ravel()
        cost = (cost[:, None] + table[:, 1]).ravel()
        room = budget - sum(fewest[index + 1 :]) - nbytes
        bound = cost + sum(priced[index + 1 :]) - price * (budget - nbytes)
        survivors = np.flatnonzero((room >= 0) & (bound < limit))
        survivors = survivors[frontier(nbytes[survivors], cost[survivors])]
        if len(survivors) > WIDTH:
            survivors = np.sort(survivors[np.argsort(bound[survivors], kind="stable")[:WIDTH]])
        if not len(survivors):
            return list(picked)
        trail.append((survivors // options, survivors % options))
        nbytes, cost = nbytes[survivors], cost[survivors]
    at = int(np.lexsort((nbytes, cost))[0])
    if cost[at] >= limit:
        return list(picked)
    found: list[int] = []
    for parents, options_taken in reversed(trail):
        found.append(int(options_taken[at]))
        at = int(parents[at])
    return found[::-1]


def frontier(nbytes: Int64, cost: Float64) -> Int64:
    """Indices of the Pareto-optimal partial choices, by rising bytes and falling cost."""
    order = np.lexsort((cost, nbytes))
    sorted_cost = cost[order]
    lowest = np.minimum.accumulate(sorted_cost)
    better = np.ones(len(order), bool)
    better[1:] = sorted_cost[1:] < lowest[:-1]
    found: Int64 = order[better]
    return found
