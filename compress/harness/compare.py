"""An artifact's figures beside the float model's: paired differences, their errors, and gates.

Standard errors are over documents. Those of a mean are exact; those of other metrics (F1, BLEU,
perplexity) are a jackknife over at most ``BLOCKS`` blocks of documents (Efron and Stein, Annals of
Statistics 9, 1981), which for a mean of one document per block is the same. A group's error is that
of a stratified mean: its tasks are independent. Differences are paired by document, so that what is
hard for both models cancels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.errors import RecipeError, UsageError, did_you_mean
from compress.harness.tasks import Figure, Part
from compress.verify.gates import COMPARE, Gate, Limit, parse_limit
from compress.verify.quality import Estimate

BLOCKS = 200
DROP = "_drop"  # ending of a gate's metric: how much worse than the float model


@dataclass(frozen=True)
class Compared:
    """One metric of an artifact and of the float model.

    Attributes:
        figure: the artifact's; the float model's where it is alone.
        value, baseline: with standard errors.
        difference: artifact - float.
    """

    figure: Figure
    value: Estimate
    baseline: Estimate | None
    difference: Estimate | None

    @property
    def items(self) -> int:
        """Number of documents."""
        return sum(len(part.scores) for part in self.figure.parts)

    @property
    def drop(self) -> float | None:
        """How much worse than the float model, in the metric's unit; negative: better."""
        if self.difference is None:
            return None
        return -self.difference.value if self.figure.higher_is_better else self.difference.value


def compare(ours: Sequence[Figure], theirs: Sequence[Figure]) -> list[Compared]:
    """The figures of an artifact beside those of the float model."""
    baseline = {(each.task, each.metric, each.filter): each for each in theirs}
    found = []
    for figure in ours:
        other = baseline[figure.task, figure.metric, figure.filter]
        pairs = list(zip(figure.parts, other.parts, strict=True))
        error = combined([paired_error(*pair) for pair in pairs], figure.parts)
        difference = Estimate(figure.value - other.value, error)
        found.append(Compared(figure, estimate(figure), estimate(other), difference))
    return found


def alone(figures: Sequence[Figure]) -> list[Compared]:
    """The float model's figures."""
    return [Compared(figure, estimate(figure), None, None) for figure in figures]


def estimate(figure: Figure) -> Estimate:
    """A figure and its standard error."""
    errors = [jackknife(list(part.scores.values()), part.aggregate) for part in figure.parts]
    return Estimate(figure.value, combined(errors, figure.parts))


def combined(errors: Sequence[float | None], parts: Sequence[Part]) -> float | None:
    """The standard error of the parts' weighted mean; None where one is not known."""
    known = [error for error in errors if error is not None]
    if len(known) < len(parts):
        return None
    weighted = [part.weight * error for part, error in zip(parts, known, strict=True)]
    return math.hypot(*weighted) / sum(part.weight for part in parts)


def paired_error(ours: Part, theirs: Part) -> float | None:
    """Standard error of the difference of one task, over the documents that both answered."""
    both = [key for key in ours.scores if key in theirs.scores]
    pairs = [(ours.scores[key], theirs.scores[key]) for key in both]

    def difference(rows: list[Any]) -> float:
        mine, others = zip(*rows, strict=True)
        return float(ours.aggregate(list(mine)) - theirs.aggregate(list(others)))

    return jackknife(pairs, difference)


def jackknife(rows: list[Any], aggregate: Callable[[list[Any]], float]) -> float | None:
    """Standard error of ``aggregate(rows)`` by leaving out one block of rows at a time.

    With one row per block and the mean as ``aggregate`` it is ``sd / √n``. None for fewer than two
    rows, and where the metric is not finite without one of them.
    """
    count = min(len(rows), BLOCKS)
    if count < 2:
        return None
    if len(rows) > BLOCKS and (simple := mean_error(rows, aggregate)) is not None:
        return simple
    blocks = [rows[index::count] for index in range(count)]
    without = [
        aggregate([row for other in blocks if other is not block for row in other])
        for block in blocks
    ]
    values = np.array(without, np.float64)
    if not np.isfinite(values).all():
        return None
    return math.sqrt((count - 1) / count * float(((values - values.mean()) ** 2).sum()))


def mean_error(rows: list[Any], aggregate: Callable[[list[Any]], float]) -> float | None:
    """``sd / √n`` where ``aggregate`` is the mean of one number per row; else None."""
    try:
        each = np.array([aggregate([row]) for row in rows], np.float64)
    except (ArithmeticError, TypeError, ValueError, IndexError):
        return None
    whole = aggregate(rows)
    if not np.isfinite(each).all() or not math.isclose(each.mean(), whole, abs_tol=1e-9):
        return None
    return float(each.std(ddof=1)) / math.sqrt(len(rows))


# --- gates -------------------------------------------------------------------------------------


def parse_gate(text: str, metrics: Mapping[str, Sequence[str]]) -> Limit:
    """``mmlu.acc_drop<=0.01`` → a limit; a metric ending in ``_drop`` is the loss against float.

    ``gsm8k.exact_match,strict-match>=0.7`` names one of a metric's filters.

    Args:
        text: of the option.
        metrics: those of each task.

    Raises:
        RecipeError: no gate of this form.
        UsageError: no such task or metric.
    """
    match = re.fullmatch(r"\s*([^<>=\s]+)\.([\w@]+)(,[\w-]+?)?(_drop)?\s*=?\s*([<>].*)", text)
    if not match:
        raise RecipeError(
            f"--gate {text}: write TASK.METRIC<=LIMIT", hint='--gate "mmlu.acc_drop<=0.01"'
        )
    task, metric, filter_name, drop, limit = match.groups(default="")
    metric, drop = (metric.removesuffix(DROP), DROP) if metric.endswith(DROP) else (metric, drop)
    if task not in metrics:
        raise UsageError(f"--gate {text}: no task {task}", hint=did_you_mean(task, metrics))
    if metric not in metrics[task]:
        hint = did_you_mean(metric, metrics[task])
        raise UsageError(f"--gate {text}: {task} has no metric {metric}", hint=hint)
    return parse_limit("--gate", f"{task}.{metric}{filter_name}{drop}", limit)


def judge(limits: Sequence[Limit], found: Sequence[Compared]) -> list[Gate]:
    """Evaluate gates; one that names no filter holds for every filter of its metric."""
    gates = []
    for limit in limits:
        wanted = limit.name.removesuffix(DROP)
        for each in found:
            figure = each.figure
            name = f"{figure.task}.{figure.metric}"
            full = name if figure.filter == "none" else f"{name},{figure.filter}"
            if wanted in (name, full):
                drops = limit.name.endswith(DROP)
                value = each.drop if drops else each.value.value
                passed = value is not None and bool(COMPARE[limit.operator](value, limit.number))
                gates.append(Gate(full + DROP * drops, limit.text, value, passed))
    return gates
