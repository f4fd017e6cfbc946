"""compress.harness.compare: paired differences, their errors, and gates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from compress.errors import RecipeError, UsageError
from compress.harness.compare import compare, jackknife, judge, parse_gate
from compress.harness.tasks import Figure, Part


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def perplexity(rows: Sequence[tuple[float, int]]) -> float:
    values, words = zip(*rows, strict=True)
    return math.exp(-sum(values) / sum(words))


def figure(
    *parts: Sequence[Any], metric: str = "acc", filter: str = "none", higher: bool = True,
    aggregate: Any = mean, equal: bool = False,
) -> Figure:  # fmt: skip
    made = tuple(
        Part(dict(enumerate(scores)), aggregate, 1 if equal else len(scores)) for scores in parts
    )
    total = sum(part.weight for part in made)
    value = sum(part.weight * aggregate(list(part.scores.values())) for part in made) / total
    return Figure("quiz", metric, filter, value, made, higher, 0, "1", True)


OURS = [1, 0, 1, 1, 0, 1, 0, 1]
THEIRS = [1, 1, 1, 1, 0, 1, 1, 0]


def test_a_mean_and_its_paired_difference_by_hand() -> None:
    (found,) = compare([figure(OURS)], [figure(THEIRS)])
    assert found.value.value == 5 / 8
    assert found.value.se == pytest.approx(statistics.stdev(OURS) / math.sqrt(8))
    assert found.baseline is not None and found.baseline.value == 6 / 8
    assert found.difference is not None and found.difference.value == pytest.approx(-1 / 8)
    paired = [a - b for a, b in zip(OURS, THEIRS, strict=True)]
    assert found.difference.se == pytest.approx(statistics.stdev(paired) / math.sqrt(8))
    assert found.drop == pytest.approx(1 / 8) and found.items == 8


def test_many_documents_give_the_same_error_as_all_blocks() -> None:
    values = np.random.default_rng(0).integers(0, 2, 900).tolist()
    assert jackknife(values, mean) == pytest.approx(statistics.stdev(values) / math.sqrt(900))
    assert jackknife(values[:1], mean) is None


def test_the_error_of_a_perplexity_is_that_of_many_draws() -> None:
    random = np.random.default_rng(1)

    def draw() -> list[tuple[float, int]]:
        words = random.integers(5, 30, 400)
        return [(float(-2 * n + random.normal(0, 4)), int(n)) for n in words]

    spread = statistics.stdev(perplexity(draw()) for _ in range(300))
    assert jackknife(draw(), perplexity) == pytest.approx(spread, rel=0.25)


def test_a_group_is_a_stratified_mean() -> None:
    ours, theirs = figure(OURS, OURS[:4]), figure(THEIRS, THEIRS[:4])
    (found,) = compare([ours], [theirs])
    errors = [statistics.stdev(part) / math.sqrt(len(part)) for part in (OURS, OURS[:4])]
    assert found.value.se == pytest.approx(math.hypot(8 * errors[0], 4 * errors[1]) / 12)
    (equal,) = compare([figure(OURS, OURS[:4], equal=True)], [theirs])
    assert equal.value.se == pytest.approx(math.hypot(*errors) / 2)
    assert found.items == 12


def test_documents_without_the_metric_are_left_out_of_both() -> None:
    ours, theirs = figure(OURS), figure(THEIRS)
    partial = Part({k: v for k, v in theirs.parts[0].scores.items() if k != 1}, mean, 7)
    (found,) = compare([ours], [replace(theirs, parts=(partial,))])
    paired = [a - b for i, (a, b) in enumerate(zip(OURS, THEIRS, strict=True)) if i != 1]
    assert found.difference is not None
    assert found.difference.se == pytest.approx(statistics.stdev(paired) / math.sqrt(7))


METRICS = {"quiz": ["acc", "exact_match"], "mmlu": ["acc"]}


def test_gates_on_values_and_on_losses() -> None:
    found = compare([figure(OURS)], [figure(THEIRS)])
    passes = ["quiz.acc>=0.6", "quiz.acc_drop<=0.125", "quiz.acc_drop=<=0.2"]
    gates = judge([parse_gate(text, METRICS) for text in passes], found)
    assert [gate.passed for gate in gates] == [True, True, True]
    assert [gate.name for gate in gates] == ["quiz.acc", "quiz.acc_drop", "quiz.acc_drop"]
    (gate,) = judge([parse_gate("quiz.acc_drop<=0.1", METRICS)], found)
    assert not gate.passed and gate.value == pytest.approx(0.125)


def test_a_loss_of_a_metric_where_less_is_better() -> None:
    ours = figure(OURS, metric="exact_match", higher=False)
    found = compare([ours], [figure(THEIRS, metric="exact_match", higher=False)])
    (gate,) = judge([parse_gate("quiz.exact_match_drop<=0", METRICS)], found)
    assert gate.passed and gate.value == pytest.approx(-0.125)


def test_a_gate_may_name_a_filter() -> None:
    both = [figure(OURS, metric="exact_match", filter=name) for name in ("strict", "flexible")]
    found = compare(both, both)
    (one,) = judge([parse_gate("quiz.exact_match,strict>=0.9", METRICS)], found)
    assert one.name == "quiz.exact_match,strict" and not one.passed
    assert len(judge([parse_gate("quiz.exact_match_drop<=0", METRICS)], found)) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("acc<=0.1", "write TASK.METRIC<=LIMIT"),
        ("quiz.acc", "write TASK.METRIC<=LIMIT"),
        ("quiz.acc<=much", "not a number"),
        ("quizz.acc<=1", "no task quizz"),
        ("quiz.f1<=1", "quiz has no metric f1"),
        ("mmlu.exact_match_drop<=1", "mmlu has no metric exact_match"),
    ],
)
def test_a_bad_gate_is_named(text: str, says: str) -> None:
    with pytest.raises((RecipeError, UsageError), match=says):
        parse_gate(text, METRICS)
