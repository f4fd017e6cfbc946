"""The distance of an artifact from the float model: perplexity, KL divergence, top-1 agreement.

All figures are over the same scored positions: every token of every window but the first. Token
scores within a window are correlated (one hard paragraph is hard for many tokens), so standard
errors are over windows, not tokens: the cluster-robust error of a ratio of sums (CR1; Cochran,
*Sampling Techniques*, §6.4), which for windows of one length is the delete-one-window jackknife.
Scores are skewed, so with tens of windows ±2 errors cover the true value 8 or 9 times in 10
(simulated in the tests), not 19 in 20. Not included: neighbouring windows of one document are not
independent either, and two texts differ by more than two halves of one text.

``KL(baseline ‖ artifact)`` is in nats per token. The perplexity ratio's error comes from the paired
differences of per-token negative log-likelihoods, so the text's own difficulty cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from compress.errors import ArtifactError
from compress.plan.shapes import Runtime
from compress.verify.baseline import BaselineStore, Float32, Float64, chunks, exponentials

SERIES_POINTS = 96  # most points of a series in the report


@dataclass(frozen=True)
class TokenScores:
    """Scores of every scored position, in the order of the text; arrays of one length.

    Attributes:
        window: int32, which window.
        position: int32, place in the window (0 predicts the second token).
        baseline_nll, nll: float64, -log p of the token that follows; float model, artifact.
        kl: float64, KL(baseline ‖ artifact) in nats.
        agrees: bool, both have the same most likely token.
    """

    window: NDArray[np.int32]
    position: NDArray[np.int32]
    baseline_nll: Float64
    nll: Float64
    kl: Float64
    agrees: NDArray[np.bool_]

    def save(self, path: Path) -> None:
        """Write the scores as ``.npz``."""
        np.savez(path, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> TokenScores:
        """Read the scores of ``save``."""
        with np.load(path) as saved:
            return cls(**{field.name: saved[field.name] for field in fields(cls)})

    @classmethod
    def joined(cls, parts: Sequence[TokenScores]) -> TokenScores:
        """The scores of several windows, one after another."""
        return cls(
            **{
                field.name: np.concatenate([getattr(part, field.name) for part in parts])
                for field in fields(cls)
            }
        )

    def in_text_order(self, places: Sequence[int]) -> TokenScores:
        """The scores of windows that were shuffled, by their ``places`` in the text."""
        window = np.asarray(places, np.int32)[self.window]
        order = np.argsort(window, kind="stable")
        sorted_fields = {field.name: getattr(self, field.name)[order] for field in fields(self)}
        return TokenScores(**{**sorted_fields, "window": window[order]})


class Estimate(NamedTuple):
    """A figure and its standard error (None: fewer than two windows, or not finite)."""

    value: float
    se: float | None


@dataclass(frozen=True)
class Series:
    """A curve for the report: bins of ``tokens_per_point`` positions, their mean and largest KL."""

    tokens_per_point: int
    mean: tuple[float, ...]
    max: tuple[float, ...]


@dataclass(frozen=True)
class Quality:
    """An artifact's figures against the float model, over ``tokens`` scored positions.

    Attributes:
        perplexity, baseline_perplexity: exp of the mean negative log-likelihood.
        perplexity_ratio: artifact ÷ baseline.
        kl_mean, kl_p99, kl_max: nats per token; the largest has no standard error.
        top1_agreement: share of positions with the same most likely token.
        nonfinite_tokens: positions where the artifact's logits were NaN or infinite.
        kl_along_text: in the order of the text.
        kl_by_position: by position in the window, over all windows; a rising curve means that
            the artifact handles positions wrongly.
    """

    windows: int
    tokens: int
    perplexity: Estimate
    baseline_perplexity: Estimate
    perplexity_ratio: Estimate
    kl_mean: Estimate
    kl_p99: Estimate
    kl_max: float
    top1_agreement: Estimate
    nonfinite_tokens: int
    kl_along_text: Series
    kl_by_position: Series


def score(
    runtime: Runtime,
    baseline: BaselineStore,
    windows: range | None = None,
) -> TokenScores:
    """Run a runtime over some of the baseline's windows; default: all that are ready.

    Raises:
        ArtifactError: another vocabulary than the float model's, or logits of another shape.
    """
    if runtime.vocab_size != baseline.vocab_size:
        raise ArtifactError(
            f"the artifact has {runtime.vocab_size} tokens, the float model {baseline.vocab_size}",
            hint="compare an artifact with the checkpoint that it was built from",
        )
    windows = range(baseline.ready) if windows is None else windows
    texts = [baseline.windows[index].tolist() for index in windows]
    together = getattr(runtime, "logits_of", None) if len(texts) > 1 else None
    logits = together(texts) if together else map(runtime.logits, texts)
    scores = [score_window(baseline, *each) for each in zip(windows, logits, strict=True)]
    return TokenScores.joined(scores)


def score_window(baseline: BaselineStore, index: int, logits: Float32) -> TokenScores:
    """Scores of one window.

    Args:
        baseline: the float model's log-probabilities.
        index: of the window.
        logits: the artifact's, float32 ``[len(window), vocab]``.
    """
    tokens = baseline.windows[index]
    expected = (len(tokens), baseline.vocab_size)
    if logits.shape != expected:
        raise ArtifactError(f"the runtime gave logits of shape {logits.shape}, not {expected}")
    scored = baseline.scored(index)
    count = len(tokens) - 1
    nll, kl = np.empty(count), np.empty(count)
    for rows in chunks(count, baseline.vocab_size):
        p, log_p = baseline.probs(index, rows)
        nll[rows], kl[rows] = divergence(p, log_p, logits[rows], tokens[1:][rows])
    # argmax returns a NaN's index; this must not count as agreement.
    finite = np.isfinite(logits[:count].max(axis=1))
    kl[~finite] = np.nan
    return TokenScores(
        window=np.full(count, index, np.int32),
        position=np.arange(count, dtype=np.int32),
        baseline_nll=baseline.nll[scored],
        nll=nll,
        kl=kl,
        agrees=finite & (logits[:count].argmax(axis=1) == baseline.top[scored]),
    )


def divergence(
    p: Float32, log_p: Float32, logits: Float32, targets: NDArray[np.int32]
) -> tuple[Float64, Float64]:
    """-log q of the tokens that follow, and KL(p ‖ q) in nats, float64 ``[rows]``.

    ``Σ p (log p - log q)`` with ``log q = shifted - log Σ exp shifted``, in one pass over blocks
    that stay in the processor's cache: float32 products, whose rounding errors have random signs,
    and sums in float64.

    Args:
        p, log_p: of ``BaselineStore.probs``, which sum to ``Σ p`` near one; overwritten.
        logits: of q, float32 ``[rows, vocab]``.
        targets: token ids, int32 ``[rows]``.
    """
    shifted, total = exponentials(logits)
    logs = np.log(total)
    nll = logs - shifted[np.arange(len(targets)), targets]
    mass = p.sum(axis=1, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        log_p -= shifted
        log_p *= p
        if np.isneginf(shifted.min()):  # 0 · log 0, also where the artifact has -Inf
            log_p[p == 0] = 0.0
        cross = log_p.sum(axis=1, dtype=np.float64)
        return nll, cross / mass - np.log(mass) + logs


def summarize(scores: TokenScores) -> Quality:
    """Compute the figures and standard errors from the scores of all positions."""
    window = scores.window
    difference = cluster_mean(scores.nll - scores.baseline_nll, window)
    return Quality(
        windows=len(np.unique(window)),
        tokens=len(window),
        perplexity=exponential(cluster_mean(scores.nll, window)),
        baseline_perplexity=exponential(cluster_mean(scores.baseline_nll, window)),
        perplexity_ratio=exponential(difference),
        kl_mean=cluster_mean(scores.kl, window),
        kl_p99=cluster_quantile(scores.kl, window, 0.99),
        kl_max=float(scores.kl.max()),
        top1_agreement=cluster_mean(scores.agrees.astype(np.float64), window),
        nonfinite_tokens=int((~np.isfinite(scores.kl)).sum()),
        kl_along_text=series(scores.kl, np.arange(len(window))),
        kl_by_position=series(scores.kl, scores.position),
    )


def cluster_mean(values: Float64, window: NDArray[np.int32]) -> Estimate:
    """Mean over all tokens; standard error over windows (CR1).

    With window sums ``S_w`` of ``n_w`` tokens, ``G`` windows, ``N`` tokens and the mean ``m``:
    ``se² = G / (G - 1) · Σ (S_w - m n_w)² / N²``.
    """
    mean = float(values.mean())
    _, index = np.unique(window, return_inverse=True)
    counts = np.bincount(index)
    groups = len(counts)
    if groups < 2 or not math.isfinite(mean):
        return Estimate(mean, None)
    residuals = np.bincount(index, weights=values) - mean * counts
    variance = groups / (groups - 1) * float(residuals @ residuals)
    return Estimate(mean, math.sqrt(variance) / len(values))


def cluster_quantile(values: Float64, window: NDArray[np.int32], share: float) -> Estimate:
    """A quantile; standard error by Woodruff's method (JASA 47, 1952).

    The share of tokens below the quantile has a clustered standard error ``s``; half the distance
    between the quantiles at ``share - s`` and ``share + s`` is the error of the quantile.
    """
    if not np.isfinite(values).all():
        return Estimate(float("inf") if np.isinf(values).any() else float("nan"), None)
    value = float(np.quantile(values, share))
    below = cluster_mean((values <= value).astype(np.float64), window)
    if below.se is None:
        return Estimate(value, None)
    low, high = np.quantile(values, [max(share - below.se, 0.0), min(share + below.se, 1.0)])
    return Estimate(value, float(high - low) / 2)


def exponential(log: Estimate) -> Estimate:
    """exp of an estimate; the standard error to first order."""
    with np.errstate(over="ignore"):
        value = float(np.exp(log.value))
    return Estimate(value, None if log.se is None else value * log.se)


def series(values: Float64, place: NDArray[np.integer]) -> Series:
    """At most ``SERIES_POINTS`` bins of ``values`` by their ``place``, in order."""
    width = max(1, math.ceil((int(place.max()) + 1) / SERIES_POINTS))
    bins = place // width
    count = int(bins.max()) + 1
    highest = np.full(count, -np.inf)
    with np.errstate(invalid="ignore"):
        np.maximum.at(highest, bins, values)
        mean = np.bincount(bins, weights=values, minlength=count) / np.bincount(bins)
    return Series(width, tuple(mean.tolist()), tuple(highest.tolist()))
