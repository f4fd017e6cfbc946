"""Quantizes each block on the outputs of the quantized blocks before it
(``calibration.propagate: quantized``).

The calibration walk runs along with the writing. When a writer requests a tensor of the next block,
the walk runs up to that block, gathers its statistics, and all its tensors are solved. Their codes
are held for the writer; decoded, they produce the next block's hidden states. So every tensor is
solved once, and codes and statistics of one block are in memory at a time. The hidden states before
the current block are saved (``calibration.walk.Boundary``), so that an interrupted build can be
resumed there. The embedding and the head are solved by slabs, on request.

Within a block the float weights are used, as in the code of GPTQ (Frantar et al., arXiv
2210.17323): ``o_proj`` is calibrated on the output of the float ``q_proj``, on quantized blocks'
states.

Solvers get weights that are shifted to compensate the drift of the inputs (GPTAQ, Li et al., arXiv
2504.02692). Where the float model has the input ``f`` and the quantized blocks give ``x``, the
least-squares fit of ``W f`` is ``(W + W D H⁻¹) x``, with ``D = E[(f - x) xᵀ]`` and ``H = E[x xᵀ]``.
The full shift makes the model worse, although it fits held-back inputs; ``SHARE`` of it makes the
model better in every format that was tried.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from compress.calibration.statistics import LayerStats, Statistics
from compress.calibration.walk import Boundary, walk_beside
from compress.checkpoint.sources import Source
from compress.decoder.config import FUSED, split_name, stored_block
from compress.grids import Float32, Grid, Quantized, get_grid
from compress.machine import in_threads, one_thread
from compress.plan.shapes import Plan, PlanEntry
from compress.plan.weights import Ledger, Weights
from compress.solvers import get_solver

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PropagatedWeights"]

T = TypeVar("T")

SLAB = 1 << 23  # weights of the embedding that are decoded at a time
SHARE = 0.25  # of the shift from the float weights to the best fit of the float outputs
DAMPING = 0.03  # share of the Hessian diagonal's mean that is added to it for the shift
ROWS = 512  # of the shift that are solved at a time


class PropagatedWeights(Weights):
    """See the module. Blocks should be read in order: going back restarts the walk.

    Args:
        source: the weights.
        plan: the grid of every tensor.
        solver: one that needs statistics (``compress.recipe.needs_of``).
        windows: token ids to calibrate on, all of the same length.
        work: folder for hidden states beyond ``calibration.walk.states_limit``, needed until the
            last tensor is read.
        ledger: see ``Weights``.
        states: folder where hidden states are saved for ``--resume``; None: not saved.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        solver: str,
        windows: Sequence[Sequence[int]],
        *,
        work: Path | None = None,
        ledger: Ledger | None = None,
        states: Path | None = None,
    ) -> None:
        self._head = Statistics(source.config, self._reach_head)
        super().__init__(source, get_solver(solver), ledger)
        self._shift: tuple[LayerStats | None, tuple[Float32, ...]] = (None, ())
        self._entries = {entry.name: entry for entry in plan.entries}
        self._windows, self._work, self._states = windows, work, states
        if states is not None and not len(self.ledger):
            shutil.rmtree(states, ignore_errors=True)  # the ledger was emptied: they are outdated
        self._start()

    def quantize(self, name: str, grid: Grid, rows: slice | None = None) -> Quantized:
        """See ``Weights.quantize``."""
        block, _, _ = split_name(name)
        if block is None:
            weight = self._leaning(name, self._head, rows)
            return self._solve(weight, grid, self._head.for_weight(name))
        self._reach(stored_block(self.config, block))
        solved = self._solved[name]
        if solved.fallen:
            self.fallen[name] = solved.fallen
        return solved.rows(rows) if rows else solved

    def in_slabs(
        self, name: str, grid: Grid, slabs: Sequence[slice | None], pack: Callable[[Quantized], T]
    ) -> Iterator[T]:
        """See ``Weights.in_slabs``; slabs are solved in sequence."""
        for rows in slabs:
            yield pack(self.quantize(name, grid, rows))

    # --- the walk ----------------------------------------------------------------------------

    def _start(self) -> None:
        boundary = Boundary(self._states) if self._states else None
        first = boundary.index if boundary else 0
        self._block = first - self.config.block_repeat  # stored block that the walk has reached
        self._solved: dict[str, Quantized] = {}  # its tensors, by name in the plan
        self._steps: Iterator[dict[str, LayerStats]] = walk_beside(
            self.config, self.source.read, self._carried, self._windows,
            work=self._work, boundary=boundary,
        )  # fmt: skip

    def _reach(self, block: int) -> None:
        """Continue the walk until a stored block is solved."""
        if block < self._block or (block == self._block and not self._solved):
            if self._states:
                shutil.rmtree(self._states)
            self._start()
        while self._block < block:
            self.ledger.sync()  # its tensors must be on disk before the states after them are saved
            stats = next(self._steps)  # runs the states through the previous block
            self._block += self.config.block_repeat
            self._solve_block(Statistics.of(self.config, stats))

    def _reach_head(self, key: str) -> LayerStats | None:
        """Statistics of the head's input, after all blocks; for ``Statistics``."""
        last = stored_block(self.config, self.config.num_hidden_layers - 1)
        if self._block != last:
            self._reach(last)
        self.ledger.sync()
        stats = next(self._steps)
        self._block = self.config.num_hidden_layers
        self._solved.clear()
        return stats[key]

    def _solve_block(self, statistics: Statistics) -> None:
        self._solved.clear()
        for name, entry in self._entries.items():
            block, _, _ = split_name(name)
            if block is None or len(entry.shape) == 1:
                continue
            if stored_block(self.config, block) == self._block:
                weight = self._leaning(name, statistics)
                grid, stats = get_grid(entry.grid), statistics.for_weight(name)
                self._solved[name] = self._solve(weight, grid, stats)

    def _leaning(self, name: str, statistics: Statistics, rows: slice | None = None) -> Float32:
        """The float weight plus ``SHARE`` of the shift that compensates the drift."""
        weight = self.read(name, rows)
        stats = statistics.for_weight(name)
        if stats is None or stats.drift is None:
            return weight
        if self._shift[0] is not stats:
            self._shift = None, ()  # freed before the next one is computed
            self._shift = stats, shifts(stats)
        start, leaning = 0, weight.copy()
        for shift in self._shift[1]:
            part = slice(start, start + len(shift))
            leaning[:, part] += np.float32(SHARE) * (weight[:, part] @ shift)
            start += len(shift)
        return leaning

    # --- weights as the artifact has them -----------------------------------------------------

    def _carried(self, name: str) -> Float32:
        """A weight as the runtime decodes it: of the block just solved, the embedding or a norm."""
        entry, rows = self._locate(name)
        if len(entry.shape) == 1:  # norms and biases, float32 or float16
            return get_grid(entry.grid).quantize(self.read(name)).decode()
        if entry.name in self._solved:
            return self._solved[entry.name].decode()[rows]
        return self._decoded_by_slabs(entry)

    def _decoded_by_slabs(self, entry: PlanEntry) -> Float32:
        """The embedding, decoded; it has no input statistics."""
        rows, columns = entry.shape
        grid = get_grid(entry.grid)
        step = max(SLAB // columns // 256, 1) * 256 if grid.group_rows else rows
        decoded = np.empty((rows, columns), np.float32)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            decoded[part] = self.quantize(entry.name, grid, part).decode()
        return decoded

    def _locate(self, name: str) -> tuple[PlanEntry, slice]:
        """The plan entry that holds a weight, and the weight's rows in it."""
        block, role, kind = split_name(name)
        if block is None:
            return self._entries[name], slice(None)
        for index in (block, stored_block(self.config, block)):
            for whole, members in ((role, (role,)), *FUSED.items()):
                entry = self._entries.get(f"blocks.{index}.{whole}.{kind}")
                if entry is not None and role in members:
                    before = members[: members.index(role)]
                    first = sum(self.config.weight_shape(member)[0] for member in before)
                    return entry, slice(first, first + self.config.weight_shape(role)[0])
        raise KeyError(name)


def shifts(stats: LayerStats) -> tuple[Float32, ...]:
    """``D H⁻¹`` of the module, damped: one for each diagonal block, float32 ``[n, n]``.

    Zeros where the Hessian cannot be inverted.
    """
    import torch

    found = []
    for hessian, drift in zip(stats.hessian or (), stats.drift or (), strict=True):
        damped = torch.from_numpy(hessian.copy())
        damped.diagonal().add_(DAMPING * float(damped.diagonal().mean()))
        with one_thread():
            lower, failed = torch.linalg.cholesky_ex(damped)
            if int(failed):
                found.append(np.zeros_like(drift))
                continue
            found.append(solve_by_slabs(lower, torch.from_numpy(drift)))
    return tuple(found)


def solve_by_slabs(lower: Tensor, drift: Tensor) -> Float32:
    """``D H⁻¹`` for ``H = L Lᵀ``, float32 ``[n, n]``: some rows of ``D`` at a time, in threads."""
    import torch

    solved = np.empty(tuple(drift.shape), np.float32)

    def work(begin: int, end: int) -> None:
        for start in range(begin * ROWS, min(end * ROWS, len(drift)), ROWS):
            part = slice(start, start + ROWS)
            solved[part] = torch.cholesky_solve(drift[part].T.contiguous(), lower).T.numpy()

    in_threads(work, -(-len(drift) // ROWS), 1)
    return solved
