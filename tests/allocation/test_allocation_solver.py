"""The knapsack against exhaustive search, and properties of every solution."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from compress.allocation.solver import Option, fill, search, solve, sweep

Choices = list[list[Option]]


def random_choices(rng: random.Random, most: int = 6) -> Choices:
    """Small tables with ties, dominated options and uneven scales."""
    return [
        [
            Option(rng.randint(1, 40) * rng.choice((1, 3)), rng.randint(0, 30) * rng.choice((1, 9)))
            for _ in range(rng.randint(1, 5))
        ]
        for _ in range(rng.randint(1, most))
    ]


def total(choices: Choices, picked: Sequence[int]) -> Option:
    taken = [choice[i] for choice, i in zip(choices, picked, strict=True)]
    return Option(sum(o.nbytes for o in taken), sum(o.cost for o in taken))


def exhaustive(choices: Choices, budget: int) -> float:
    sums = (
        (sum(o.nbytes for o in combination), sum(o.cost for o in combination))
        for combination in itertools.product(*choices)
    )
    return min(cost for nbytes, cost in sums if nbytes <= budget)


def test_equals_exhaustive_search() -> None:
    rng = random.Random(0)
    gaps = 0
    for _ in range(500):
        choices = random_choices(rng)
        lowest = sum(min(o.nbytes for o in choice) for choice in choices)
        budget = rng.randint(lowest, lowest + 200)
        found = total(choices, solve(choices, budget))
        assert found.nbytes <= budget
        best = exhaustive(choices, budget)
        assert found.cost == pytest.approx(best, abs=1e-9)
        smallest = [min(range(len(c)), key=lambda i: (c[i].nbytes, c[i].cost)) for c in choices]
        picked, _ = sweep(choices, smallest, budget)
        fill(choices, picked, budget)
        gaps += total(choices, picked).cost > best
    assert gaps > 5  # the sweep and the repair alone do not reach it


def model_like(seed: int, blocks: int = 32) -> Choices:
    """Phi-3-mini's shapes on GGUF's bits, with costs that fall by four per bit."""
    rng = random.Random(seed)
    sizes = (3 * 3072**2, 3072**2, 2 * 3072 * 8192, 3072 * 8192)
    return [
        [
            Option(int(size * bits / 8), weight * 4**-bits * rng.uniform(0.9, 1.1))
            for bits in (2.625, 3.0625, 3.4375, 4.25, 4.5, 5.5, 6.5625, 8.5)
        ]
        for _ in range(blocks)
        for size in sizes
        for weight in (rng.random() ** 3,)
    ]


@pytest.mark.parametrize("budget", [int(1.8e9), int(1.8 * 2**30), int(2.4e9)])
def test_a_model_is_filled_to_the_last_step(budget: int) -> None:
    choices = model_like(1)
    picked = solve(choices, budget)
    taken = total(choices, picked)
    assert 0.9999 * budget < taken.nbytes <= budget
    for index, choice in enumerate(choices):  # no remaining single step fits and reduces the cost
        now = choice[picked[index]]
        assert not any(
            o.cost < now.cost and taken.nbytes - now.nbytes + o.nbytes <= budget for o in choice
        )
    assert solve(choices, budget) == picked


def test_more_bytes_never_cost_more() -> None:
    choices = model_like(2, blocks=4)
    costs = [
        total(choices, solve(choices, budget)).cost
        for budget in range(190_000_000, 500_000_000, 10_000_000)
    ]
    assert costs == sorted(costs, reverse=True)


def test_what_does_not_fit_is_refused() -> None:
    choices = [[Option(5, 1.0), Option(9, 0.0)], [Option(3, 0.5)]]
    assert solve(choices, 8) == [0, 0]
    assert solve(choices, 12) == [1, 0]
    with pytest.raises(ValueError, match="nothing fits in 7 bytes"):
        solve(choices, 7)


def test_the_search_keeps_what_it_cannot_better() -> None:
    choices = [[Option(1, 1.0), Option(2, 0.0)], [Option(1, 1.0), Option(2, 0.0)]]
    assert search(choices, [1, 0], 1.0, 3) == [1, 0]
