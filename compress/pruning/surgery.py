"""The algebra of removing inputs of a linear, from the second moments of those inputs.

A linear ``y = W x`` whose inputs are reduced to the columns ``K`` loses least when the retained
weights compensate the removed ones: ``min ‖W x - W' x_K‖² + λ‖W' - W_K‖²`` has the solution
``W' = W_K + W_P H_PK (H_KK + λI)⁻¹`` with ``H = E[x xᵀ]`` and ``P`` the removed columns. The ridge
pulls towards the old weights, not to zero: with nothing removed nothing changes.

The removed columns are those that cost least after this update, ``W_P (H⁻¹_PP)⁻¹ W_Pᵀ`` (Optimal
Brain Surgeon, Hassibi & Stork 1993; for whole structures ZipLM, Kurtić et al., arXiv 2302.04089).
They are removed in rounds, with weights and inverse updated after each, so that of two redundant
channels one stays. Without the update the cost is ``W_P H_PP W_Pᵀ``.

A wide Hessian is stored as diagonal blocks (``calibration.walk``); columns then only compensate
columns of their own block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from compress.grids import Array, Float32

__all__ = ["choose", "compensate"]

ROUNDS = 64  # of removals; fewer columns at a time are chosen better


def diagonal_blocks(hessian: tuple[Float32, ...]) -> Iterator[tuple[slice, Float32]]:
    """Yield each diagonal block with its columns."""
    start = 0
    for block in hessian:
        yield slice(start, start + len(block)), block
        start += len(block)


def choose(
    weight: Float32,
    hessian: tuple[Float32, ...],
    retained: int,
    *,
    size: int = 1,
    damping: float = 0.01,
    update: bool = True,
) -> Array:
    """Select the groups of columns to retain.

    Args:
        weight: float32 ``[rows, columns]``.
        hessian: diagonal blocks of ``E[x xᵀ]``, each of whole groups.
        retained: number of groups to retain.
        size: columns of a group: 1 for MLP channels, those of a key-value head for ``o_proj``.
        damping: share of the diagonal's mean that is added to it.
        update: whether the retained columns will be updated (``compensate``).

    Returns:
        int64 ``[retained]``, ascending indices of groups.
    """
    groups = weight.shape[1] // size
    if not update:
        pieces = [plain_costs(weight[:, s], block, size) for s, block in diagonal_blocks(hessian)]
        return np.sort(np.argsort(-np.concatenate(pieces), kind="stable")[:retained])
    parts = [Remaining(weight[:, s], block, size, damping) for s, block in diagonal_blocks(hessian)]
    firsts = np.cumsum([0, *(len(part.alive) for part in parts)])
    left = groups - retained
    while left:
        count = min(left, max(1, -(-(groups - retained) // ROUNDS)))
        costs = np.concatenate([part.costs() for part in parts])
        going = np.argsort(costs, kind="stable")[:count]
        for part, first in zip(parts, firsts, strict=False):
            inside = going[(going >= first) & (going < first + len(part.alive))] - first
            if len(inside):
                part.remove(inside)
        left -= count
    return np.flatnonzero(np.concatenate([part.alive for part in parts]))


def plain_costs(weight: Float32, hessian: Float32, size: int) -> Array:
    """The cost of removing each group without an update, ``tr(W_g H_gg W_gᵀ)``, float64
    ``[groups]``."""
    costs = np.empty(len(hessian) // size)
    for group in range(len(costs)):
        part = slice(group * size, (group + 1) * size)
        costs[group] = np.einsum(
            "ij,jk,ik->", weight[:, part], hessian[part, part], weight[:, part], optimize=True
        )
    return costs


class Remaining:
    """Weights and inverse Hessian of the remaining columns of one diagonal block.

    Attributes:
        alive: bool ``[groups]``.
    """

    def __init__(self, weight: Float32, hessian: Float32, size: int, damping: float) -> None:
        self.size = size
        self.alive = np.ones(weight.shape[1] // size, bool)
        self._weight = weight.copy()
        damped = hessian.copy()
        ridge = damping * float(np.diagonal(hessian).mean())
        np.fill_diagonal(damped, np.diagonal(damped) + max(ridge, 1e-12))
        # Scaled to a unit diagonal, it can be inverted in float32.
        roots = np.sqrt(np.diagonal(damped))
        damped /= roots
        damped /= roots[:, None]
        self._inverse = np.linalg.inv(damped)
        self._inverse /= roots
        self._inverse /= roots[:, None]

    def costs(self) -> Array:
        """The cost of removing each group, float64 ``[groups]``; infinite for removed ones."""
        costs = np.full(len(self.alive), np.inf)
        if self.size == 1:
            squares = np.einsum("ij,ij->j", self._weight, self._weight, dtype=np.float64)
            variances = np.diagonal(self._inverse)
            costs[self.alive] = squares[self.alive] / variances[self.alive]
            return costs
        for group in np.flatnonzero(self.alive):
            part = slice(group * self.size, (group + 1) * self.size)
            weight = self._weight[:, part].astype(np.float64)
            solved = np.linalg.solve(self._inverse[part, part].astype(np.float64), weight.T)
            costs[group] = np.einsum("ij,ji->", weight, solved)
        return costs

    def remove(self, groups: Array) -> None:
        """Remove groups, and update the remaining columns by least squares."""
        gone = (groups[:, None] * self.size + np.arange(self.size)).reshape(-1)
        corner = self._inverse[np.ix_(gone, gone)].astype(np.float64)
        shares = np.linalg.solve(corner, self._inverse[gone]).astype(np.float32)
        self._weight -= self._weight[:, gone] @ shares
        self._inverse -= self._inverse[:, gone] @ shares
        self.alive[groups] = False


def compensate(
    weight: Float32, hessian: tuple[Float32, ...], columns: Array, *, damping: float = 0.01
) -> Float32:
    """The retained columns, updated by least squares; float32 ``[rows, len(columns)]``.

    Args:
        weight: float32 ``[rows, columns]``.
        hessian: diagonal blocks of ``E[x xᵀ]``.
        columns: int64, ascending: the retained ones.
        damping: share of the diagonal's mean in the ridge towards the old weights.
    """
    pieces = []
    for span, block in diagonal_blocks(hessian):
        inside = columns[(columns >= span.start) & (columns < span.stop)] - span.start
        gone = np.setdiff1d(np.arange(len(block)), inside, assume_unique=True)
        part = weight[:, span]
        stays = part[:, inside]
        if len(inside) and len(gone):
            system = block[np.ix_(inside, inside)].astype(np.float64)
            ridge = damping * float(np.diagonal(block).mean())
            np.fill_diagonal(system, np.diagonal(system) + max(ridge, 1e-12))
            moved = part[:, gone] @ block[np.ix_(gone, inside)]
            stays = stays + np.linalg.solve(system, moved.T.astype(np.float64)).T
        pieces.append(stays.astype(np.float32))
    return np.concatenate(pieces, axis=1)
