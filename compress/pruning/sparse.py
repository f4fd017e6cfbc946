"""Sparsity: sets single weights to zero, for formats that store zeros in no space (Core ML).

    magnitude   the smallest of a row
    wanda       the least |w| · sqrt(E[x²]) (Sun et al., arXiv 2306.11695)
    sparsegpt   column by column, those whose removal costs least when later columns compensate it,
                which are then updated (Frantar & Alistarh, arXiv 2301.00774), on the factor of the
                Hessian that GPTQ uses (``compress.solvers.hessian``)

Rows are independent, so a ``Sparsified`` source computes them when they are read.
"""

from __future__ import annotations

import numpy as np

from compress.calibration.statistics import LayerStats, Statistics
from compress.checkpoint.sources import Change, Source
from compress.decoder.config import FUSED, Float32, split_name
from compress.errors import UsageError
from compress.grids.sparse import Pattern
from compress.pruning.surgery import diagonal_blocks
from compress.recipe import MASK_NEEDS
from compress.solvers.hessian import REPAIRS, factor_in_place

__all__ = ["Sparsified", "sparsegpt", "sparsify"]

DAMPING = 0.01
BLOCK = 128  # columns whose mask is chosen together, and whose errors are applied to later ones


Factors = list[tuple[slice, Float32, Float32]]
"""Columns of each diagonal block, and its ``U`` and ``D``."""


class Sparsified(Change):
    """A source whose blocks' linears are sparse; embeddings, head and norms are unchanged.

    Args:
        source: the weights.
        statistics: of their inputs; None where the method needs none.
        pattern: number of nonzero weights in a row.
        method: ``magnitude``, ``wanda`` or ``sparsegpt``.
    """

    def __init__(
        self, source: Source, statistics: Statistics | None, pattern: Pattern, method: str
    ) -> None:
        # The calibration text is not part of the fingerprint.
        super().__init__(source, source.config, f"{pattern.name} by {method}")
        self._statistics, self._pattern, self._method = statistics, pattern, method
        self._last: tuple[LayerStats | None, Factors] = (None, [])
        roles = source.config.linear_roles
        self._roles = {*roles, *(fused for fused, members in FUSED.items() if members[0] in roles)}

    def read(self, name: str, rows: slice | None = None) -> Float32:
        """See ``Source.read``.

        Raises:
            UsageError: no statistics for a weight whose method needs them.
        """
        weight = self.source.read(name, rows)
        block, role, kind = split_name(name)
        if block is None or kind != "weight" or role not in self._roles or not len(weight):
            return weight
        stats = self._statistics.for_weight(name) if self._statistics is not None else None
        if self._method == "sparsegpt" and stats is not None and stats.hessian is not None:
            if self._last[0] is not stats:  # row slabs, and q, k and v, are read in sequence
                self._last = (None, [])  # freed before the next is computed: it is large
                self._last = (stats, factors(stats.hessian, DAMPING))
            return sweep(weight, self._last[1], self._pattern)
        return sparsify(weight, stats, self._pattern, self._method)


def sparsify(weight: Float32, stats: LayerStats | None, pattern: Pattern, method: str) -> Float32:
    """Set weights to zero by a pattern.

    Args:
        weight: float32 ``[rows, columns]``.
        stats: of its input; None for ``magnitude``.
        pattern: number of nonzero weights in a row.
        method: see the module.

    Raises:
        UsageError: statistics that lack what the method needs.
    """
    need = MASK_NEEDS.get(method)
    if need and (stats is None or (need == "hessian" and stats.hessian is None)):
        raise UsageError(f"{method} needs calibration texts (an imatrix has no second moments)")
    if stats is None or need is None:
        scores = np.abs(weight)
    elif need == "importance":
        scores = np.abs(weight) * np.sqrt(stats.importance)
    else:
        return sparsegpt(weight, stats.hessian or (), pattern)
    return np.where(pattern.mask(scores), weight, np.float32(0))


def sparsegpt(
    weight: Float32, hessian: tuple[Float32, ...], pattern: Pattern, *, damping: float = DAMPING
) -> Float32:
    """Set the weights to zero that cost least, and update the others to compensate.

    Args:
        weight: float32 ``[rows, columns]``.
        hessian: diagonal blocks of ``E[x xᵀ]``.
        pattern: number of nonzero weights in a row.
        damping: share of the diagonal's mean that is added to it.
    """
    return sweep(weight, factors(hessian, damping), pattern)


def factors(hessian: tuple[Float32, ...], damping: float) -> Factors:
    """``factor`` of every diagonal block."""
    return [(span, *factor(block, damping)) for span, block in diagonal_blocks(hessian)]


def sweep(weight: Float32, factors: Factors, pattern: Pattern) -> Float32:
    """``sparsegpt`` with a factored Hessian."""
    found = np.empty_like(weight)
    given = 0  # nonzero weights of a row in the columns before
    for span, feedback, variances in factors:
        left = np.zeros((len(weight), len(variances)), np.float32)
        part = weight[:, span]
        for first in range(0, len(variances), BLOCK):
            last = min(first + BLOCK, len(variances))
            until = pattern.count(weight.shape[1]) * (span.start + last) // weight.shape[1]
            now = part[:, first:last] + left[:, :first] @ feedback[:first, first:last]
            count = None if pattern.of else until - given
            given = until
            mask = pattern.mask(now**2 * variances[first:last], count)
            for k in range(last - first):
                if pattern.of and k % pattern.of == 0 and k:
                    group = slice(k, k + pattern.of)
                    cost = now[:, group] ** 2 * variances[first:last][group]
                    mask[:, group] = pattern.mask(cost)
                value = np.where(mask[:, k], now[:, k], np.float32(0))
                error = part[:, first + k] - value
                found[:, span.start + first + k] = value
                left[:, first + k] = error
                now[:, k + 1 :] += error[:, None] * feedback[first + k, first + k + 1 : last]
    return found


def factor(hessian: Float32, damping: float) -> tuple[Float32, Float32]:
    """``U`` and ``D`` of ``U D Uᵀ`` in the order of the columns (``compress.solvers.hessian``).

    Where the Hessian is empty or not a covariance, the factor of uncorrelated inputs.
    """
    damp = damping * float(np.diagonal(hessian).mean())
    for repair in REPAIRS if np.isfinite(damp) and damp > 0 else ():
        damped = hessian.copy()
        np.fill_diagonal(damped, np.diagonal(damped) * (1 + repair) + damp)
        variances = factor_in_place(damped)
        if variances is not None:
            return damped, variances
    size = len(hessian)
    return np.eye(size, dtype=np.float32), np.ones(size, np.float32)
