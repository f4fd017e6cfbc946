"""The order of the columns in GPTQ, and the factor of the Hessian in that order.

With ``H = U D Uᵀ``, ``U`` unit upper triangular, the output error of a row that changed by ``e`` is
``e H eᵀ = Σ_k D_k (e_k + Σ_{j<k} e_j U_jk)²``. To round the columns in turn, each with the sum of
its ``e_j U_jk`` added, makes each term the cost of rounding that column alone. This is GPTQ
(Frantar et al., arXiv 2210.17323) in the form of LDLQ (Chee et al., QuIP, arXiv 2307.13304, theorem
6): the same codes, but one factorisation is enough, the Hessian is not inverted, and errors refer
to the original weights, so that no updated copy of them is needed.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import numpy as np

from compress.calibration.statistics import LayerStats
from compress.grids import Array, Float32
from compress.machine import in_threads

__all__ = ["Factor", "factors_of", "output_errors"]

# Shares of the diagonal that are added to it in turn until the Hessian is positive definite.
REPAIRS = (0.0, 1e-3, 1e-2, 1e-1, 1.0)
TILE = 256
SLAB = 1024  # rows of one matrix product


@dataclass(frozen=True)
class Factor:
    """One diagonal block of a Hessian.

    Attributes:
        order: int64 ``[n]``: columns of the weight in the order of rounding.
        feedback: float32 ``[n, n]``, ``U`` of the module, rows and columns in that order.
        variances: float32 ``[n]``, ``D`` of the module: of each input, given those after it.
        settles: first column of a span, in that order → inverse of its part of ``feedback``; filled
            by who needs it.
    """

    order: Array
    feedback: Float32
    variances: Float32
    settles: dict[int, Float32] = field(default_factory=dict)


def factors_of(
    stats: LayerStats, span: int, damping: float, together: int = 1
) -> tuple[Factor, ...]:
    """Factorize a Hessian's diagonal blocks; the factors of the last call are cached.

    Args:
        stats: with a Hessian.
        span: columns that are fitted, and so rounded, together; 0 for columns in any order.
        damping: share of the diagonal's mean that is added to it.
        together: columns that stay adjacent in the order of rounding.

    Returns:
        One for each block; none where the Hessian cannot be factorized (it is zero, not finite, or
        far from a covariance).
    """
    for known, settings, factors in _last:
        if known() is stats and settings == (span, damping, together):
            return factors
    _last.clear()  # before the next are computed: they are large
    made: list[Factor] = []
    start = 0
    for block in stats.hessian or ():
        diagonal = np.diagonal(block).astype(np.float64)
        damp, variances = damping * float(diagonal.mean()), None
        order = rounding_order(diagonal, span, together)
        for repair in REPAIRS if np.isfinite(damp) and damp > 0 else ():
            damped = block[np.ix_(order, order)]
            np.fill_diagonal(damped, np.diagonal(damped) * (1 + repair) + damp)
            variances = factor_in_place(damped)
            if variances is not None:
                break
        if variances is None:
            made = []
            break
        made.append(Factor(order + start, damped, variances))
        start += len(block)
    factors = tuple(made)
    _last.append((weakref.ref(stats, lambda _: _last.clear()), (span, damping, together), factors))
    return factors


# Row slabs of a tensor, and q, k and v, are solved in sequence with the same statistics; the
# cached factors are freed with the statistics.
_last: list[tuple[weakref.ref[LayerStats], tuple[int, float, int], tuple[Factor, ...]]] = []


def rounding_order(diagonal: Array, span: int, together: int = 1) -> Array:
    """The columns by falling importance; spans by falling total, and within a span its columns
    (groups of columns that stay ``together`` by falling total).

    A column that is rounded early has the most columns left to compensate its error.
    """
    if not span:
        return np.argsort(-diagonal, kind="stable")
    groups = diagonal.reshape(-1, span // together, together).sum(axis=2)
    within = np.argsort(-groups, axis=1, kind="stable") * together
    columns = (within[..., None] + np.arange(together)).reshape(-1, span)
    spans = np.argsort(-groups.sum(axis=1), kind="stable")
    order: Array = (columns + span * np.arange(len(groups))[:, None])[spans].reshape(-1)
    return order


def factor_in_place(matrix: Float32, tile_columns: int = TILE) -> Float32 | None:
    """``U D Uᵀ`` of a symmetric matrix, float32 ``[n, n]``, which becomes ``U``; returns ``D``.

    A Cholesky factorisation from the last column to the first, ``tile_columns`` at a time: nearly
    all of it is matrix products, and a wide Hessian needs no second copy. None where the matrix
    is not positive definite in float32; its contents are then overwritten.
    """
    variances = np.empty(len(matrix), np.float32)
    for last in range(len(matrix), 0, -tile_columns):
        tile = slice(max(last - tile_columns, 0), last)
        known = matrix[tile, last:] * variances[last:]
        subtract_product(matrix, tile, last, known)
        try:
            # The factor of a reversed matrix, reversed, is upper triangular.
            lower = np.linalg.cholesky(matrix[tile, tile][::-1, ::-1].astype(np.float64))
        except np.linalg.LinAlgError:
            return None
        upper = lower[::-1, ::-1]
        roots = np.diagonal(upper)
        variances[tile] = roots**2
        above = slice(0, tile.start)
        matrix[above, tile] = matrix[above, tile] @ (np.linalg.inv(upper).T / roots).astype("f4")
        matrix[tile, tile] = upper / roots
    return variances if np.isfinite(matrix).all() else None


def subtract_product(matrix: Float32, tile: slice, last: int, known: Float32) -> None:
    """``matrix[:last, tile] -= matrix[:last, last:] @ knownᵀ``, some rows at a time in threads.

    The rows of one product are always the same: sums do not depend on the number of threads.
    """

    def work(begin: int, end: int) -> None:
        for start in range(begin * SLAB, min(end * SLAB, last), SLAB):
            part = slice(start, min(start + SLAB, last))
            matrix[part, tile] -= matrix[part, last:] @ known.T

    in_threads(work, -(-last // SLAB), 1)


def output_errors(errors: Float32, stats: LayerStats) -> Array:
    """Mean squared output error of every row, from the errors of its weights.

    Measured on the inputs held back from the Hessian, where there are any; else ``e H eᵀ``.

    Args:
        errors: float32 ``[rows, columns]``.
        stats: of the input; with a Hessian.

    Returns:
        float64 ``[rows]``.
    """
    if stats.held_back is not None:
        outputs = errors @ stats.held_back.T
        squares: Array = np.einsum("ij,ij->i", outputs, outputs, dtype=np.float64)
        return squares / len(stats.held_back)
    total = np.zeros(len(errors))
    start = 0
    for block in stats.hessian or ():
        part = errors[:, start : start + len(block)]
        total += np.einsum("ij,ij->i", part @ block, part, dtype=np.float64)
        start += len(block)
    return total
