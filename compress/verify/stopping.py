"""How many windows of text are scored: a sequential test that ends when the verdict stands.

Windows are scored in rounds. After each, the gates that windows decide are judged: one is decided
when its figure is ``ERRORS`` standard errors from its limit. The verdict stands when one gate is
failed so, or when all are passed so. Scoring also ends when the mean KL divergence is known to
``PRECISION``, and at the recipe's number of windows.

After two or three windows their own spread says little. An error here is therefore the larger one
of that over windows and that over pieces of ``PIECE`` positions, and ``ERRORS`` is widened to the
quantile of Student's t with the same tail and as many degrees of freedom as there are pieces.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.verify.gates import COMPARE, Limit
from compress.verify.quality import (
    Estimate,
    TokenScores,
    cluster_mean,
    cluster_quantile,
    exponential,
)

__all__ = ["ALL", "FIRST", "OF_WINDOWS", "Stopping", "shuffled"]

Integers = NDArray[np.int32]

FIRST = 2  # windows of the first round
ERRORS = 3.0
PRECISION = 0.05  # relative standard error of the mean KL divergence
PRECISE_FROM = 4  # windows before which a KL divergence is not taken for known
PIECE = 64
SEED = 0
ALL = "all windows"

KL = Limit("kl_divergence", "", "<=", 0.0)

OF_WINDOWS = (
    "perplexity", "perplexity_ratio", "kl_divergence", "kl_divergence_p99", "kl_divergence_max",
    "top1_agreement",
)  # fmt: skip


@dataclass(frozen=True)
class Stopping:
    """When the scoring of an artifact ends.

    Attributes:
        limits: the gates; those on other figures than ``OF_WINDOWS`` are not looked at.
        most: windows at most.
        exact: score ``most`` windows, whatever they show.
    """

    limits: tuple[Limit, ...]
    most: int
    exact: bool = True

    def first(self) -> int:
        """Windows of the first round."""
        return self.most if self.exact else min(FIRST, self.most)

    def after(self, windows: int) -> int:
        """Windows after the next round: half as many again, at least two more."""
        return min(self.most, windows + max(FIRST, windows // 2))

    def reason(self, scores: TokenScores) -> str | None:
        """Why scoring ends after these windows; None where it goes on."""
        windows = len(np.unique(scores.window))
        pieces = pieces_of(scores)
        if not self.exact:
            verdict = self._verdict(scores, pieces)
            if verdict:
                return verdict
            kl = estimate(KL, scores, pieces)
            known = kl.se is not None and widened(kl.se, pieces, 1.0) <= PRECISION * kl.value
            if known and windows >= PRECISE_FROM:
                return f"the mean KL divergence is known to {PRECISION:.0%}"
        return ALL if windows >= self.most else None

    def _verdict(self, scores: TokenScores, pieces: Integers) -> str | None:
        limits = [limit for limit in self.limits if limit.name in OF_WINDOWS]
        decided = []
        for limit in limits:
            found = estimate(limit, scores, pieces)
            if not math.isfinite(found.value):
                return f"{limit.name} is not a number"
            if limit.name == "kl_divergence_max":  # grows with every window: only failing is final
                side = None if COMPARE[limit.operator](found.value, limit.number) else False
            else:
                side = decide(limit, found, pieces)
            if side is False:
                return f"{limit.name} fails by {ERRORS:g} standard errors"
            decided.append(side)
        if limits and all(decided):
            return f"every gate is passed by {ERRORS:g} standard errors"
        return None


def decide(limit: Limit, found: Estimate, pieces: Integers) -> bool | None:
    """Whether a gate is passed (True) or failed (False) beyond its error; None: neither."""
    if found.se is None:
        return None
    if abs(found.value - limit.number) <= widened(found.se, pieces, ERRORS):
        return None
    return bool(COMPARE[limit.operator](found.value, limit.number))


def estimate(limit: Limit, scores: TokenScores, pieces: Integers) -> Estimate:
    """The figure of a gate with its error, the larger one of that over pieces and over windows."""
    if limit.name == "kl_divergence_max":
        return Estimate(float(scores.kl.max()), None)
    both = [measured(limit.name, scores, clusters) for clusters in (pieces, scores.window)]
    errors = [found.se for found in both if found.se is not None]
    return Estimate(both[0].value, max(errors, default=None))


def measured(name: str, scores: TokenScores, clusters: Integers) -> Estimate:
    """A figure of ``OF_WINDOWS`` with its error over clusters of positions."""
    if name == "kl_divergence_p99":
        return cluster_quantile(scores.kl, clusters, 0.99)
    if name == "kl_divergence":
        return cluster_mean(scores.kl, clusters)
    if name == "top1_agreement":
        return cluster_mean(scores.agrees.astype(np.float64), clusters)
    paired = scores.nll - scores.baseline_nll if name == "perplexity_ratio" else scores.nll
    return exponential(cluster_mean(paired, clusters))


def pieces_of(scores: TokenScores) -> Integers:
    """Which piece of ``PIECE`` positions of its window each position is in, int32."""
    most = int(scores.position.max()) // PIECE + 1
    return (scores.window.astype(np.int64) * most + scores.position // PIECE).astype(np.int32)


def widened(se: float, pieces: Integers, errors: float) -> float:
    """``errors`` standard errors, as a quantile of Student's t with one degree of freedom less
    than there are pieces (Cornish and Fisher's expansion, within 2 % from seven on).
    """
    free = max(1, len(np.unique(pieces)) - 1)
    z = errors
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    return se * t


def shuffled(windows: Sequence[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The windows in a fixed random order, so that the first ones are a sample of the text.

    Returns:
        The windows, and the place in the text of each.
    """
    order = list(range(len(windows)))
    random.Random(SEED).shuffle(order)
    return [windows[place] for place in order], order
