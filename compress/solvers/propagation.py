"""Weights of one target, each block solved with the inputs that quantized blocks before it produce
(``calibration.propagate: quantized``).

The walk over the calibration texts goes along with the writing. A writer asks for the tensors of a
block; the walk comes to that block, its statistics are gathered, and all its tensors are solved.
Their codes are stored for the writer; decoded, they produce the next block's hidden states.
So every tensor is solved once, and codes and statistics of one block are in memory at a time. What
a build that was cut off leaves are the hidden states before the block that it was at
(``calibration.walk.Boundary``), which the next one goes on with. The embedding and the head are
solved by slabs, as the writer asks.

Within a block the float weights are used, as in the code of GPTQ (Frantar et al., arXiv
2210.17323): ``o_proj`` is calibrated on what the float ``q_proj`` gives, on quantized blocks'
states.

Solvers see weights that lean towards what the float model would have put out (GPTAQ, Li et al.,
arXiv 2504.02692). Where the float model has the input ``f`` and the quantized blocks give ``x``,
``W f`` is best met by ``(W + W D H⁻¹) x``, with ``D = E[(f - x) xᵀ]`` and ``H = E[x xᵀ]``. To go
all the way makes the model worse, although held-back inputs agree with it; ``SHARE`` of the way
makes it better in every format that was tried.
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
SHARE = 0.25  # of the way from the float weights to those that meet the float outputs best
DAMPING = 0.03  # share of the Hessian diagonal's mean that is added to it there
ROWS = 512  # that are solved for at a time


class PropagatedWeights(Weights):
    """See the module. A writer should ask for blocks in order: going back starts the walk anew.

    Args:
        source: the weights.
        plan: the grid of every tensor.
        solver: one that needs statistics (``compress.recipe.needs_of``).
        windows: token ids to calibrate on, all of the same length.
        work: folder for hidden states beyond ``calibration.walk.states_limit``; stays until the
            last tensor was asked for.
        ledger: see ``Weights``.
        states: folder where hidden states are stored for a build that goes on with this one; None
            keeps none.
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
            shutil.rmtree(states, ignore_errors=True)  # of what was forgotten
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
        """See ``Weights.in_slabs``; one after the other."""
        for rows in slabs:
            yield pack(self.quantize(name, grid, rows))

    # --- the walk ----------------------------------------------------------------------------

    def _start(self) -> None:
        boundary = Boundary(self._states) if self._states else None
        first = boundary.index if boundary else 0
        self._block = first - self.config.block_repeat  # stored block that the walk has come to
        self._solved: dict[str, Quantized] = {}  # its tensors, by name in the plan
        self._steps: Iterator[dict[str, LayerStats]] = walk_beside(
            self.config, self.source.read, self._carried, self._windows,
            work=self._work, boundary=boundary,
        )  # fmt: skip

    def _reach(self, block: int) -> None:
        """Walk on until a stored block is solved."""
        if block < self._block or (block == self._block and not self._solved):
            if self._states:
                shutil.rmtree(self._states)
            self._start()
        while self._block < block:
            self.ledger.sync()  # what the states that are saved now will be behind
            stats = next(self._steps)  # carries the states through the block before
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
        """What is solved for: the float weight, and ``SHARE`` of what makes up for the drift."""
        weight = self.read(name, rows)
        stats = statistics.for_weight(name)
        if stats is None or stats.drift is None:
            return weight
        if self._shift[0] is not stats:
            self._shift = None, ()  # before the next one needs the room
            self._shift = stats, shifts(stats)
        start, leaning = 0, weight.copy()
        for shift in self._shift[1]:
            part = slice(start, start + len(shift))
            leaning[:, part] += np.float32(SHARE) * (weight[:, part] @ shift)
            start += len(shift)
        return leaning

    # --- weights as the artifact has them -----------------------------------------------------

    def _carried(self, name: str) -> Float32:
        """A weight as the runtime decodes it: of the block that was just solved, or of none."""
        entry, rows = self._locate(name)
        if len(entry.shape) == 1:  # norms and biases, float32 or float16
            return get_grid(entry.grid).quantize(self.read(name)).decode()
        if entry.name in self._solved:
            return self._solved[entry.name].decode()[rows]
        return self._decoded_by_slabs(entry)

    def _decoded_by_slabs(self, entry: PlanEntry) -> Float32:
        """The embedding; no calibrated solver has statistics of what it multiplies."""
        rows, columns = entry.shape
        grid = get_grid(entry.grid)
        step = max(SLAB // columns // 256, 1) * 256 if grid.group_rows else rows
        decoded = np.empty((rows, columns), np.float32)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            decoded[part] = self.quantize(entry.name, grid, part).decode()
        return decoded

    def _locate(self, name: str) -> tuple[PlanEntry, slice]:
        """The entry of the plan that holds a weight, and its rows there."""
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
    """``D H⁻¹`` of ``H = L Lᵀ``, float32 ``[n, n]``: some rows of ``D`` at a time, in threads."""
    import torch

    solved = np.empty(tuple(drift.shape), np.float32)

    def work(begin: int, end: int) -> None:
        for start in range(begin * ROWS, min(end * ROWS, len(drift)), ROWS):
            part = slice(start, start + ROWS)
            solved[part] = torch.cholesky_solve(drift[part].T.contiguous(), lower).T.numpy()

    in_threads(work, -(-len(drift) // ROWS), 1)
    return solved
