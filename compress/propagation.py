"""Weights of one target whose every block is solved with the inputs that it will really have: those
that the blocks before it, quantized and decoded, produce (``calibration.propagate: quantized``).

The walk over the calibration texts goes along with the writing. A writer asks for the tensors of a
block; the walk comes to that block, its statistics are gathered, and all its tensors are solved.
Their codes are kept for the writer, and decoded they carry the hidden states on to the next block.
So every tensor is solved once, codes and statistics of one block are in memory at a time, and
nothing is left on disk. The embedding and the head are solved by slabs, as the writer asks.

Within a block the float weights speak, as in the code of GPTQ (Frantar et al., arXiv 2210.17323):
``o_proj`` is calibrated on what the float ``q_proj`` gives, on quantized blocks' states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from compress.arch import FUSED, split_name
from compress.grids import Float32, Grid, Quantized, get_grid
from compress.model import Plan, PlanEntry, Weights
from compress.solvers import NEEDS, get_solver
from compress.sources import Source
from compress.statistics import LayerStats, Statistics, stored_block
from compress.walk import walk

__all__ = ["PropagatedWeights"]

SLAB = 1 << 23  # weights of the embedding that are decoded at a time


class PropagatedWeights(Weights):
    """See the module. A writer should ask for blocks in order: going back starts the walk anew.

    Args:
        source: the weights.
        plan: the grid of every tensor.
        solver: one of ``compress.solvers.NEEDS``.
        windows: token ids to calibrate on, all of the same length.
        work: folder for hidden states beyond ``compress.walk.STATES_LIMIT``; stays until the last
            tensor was asked for.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        solver: str,
        windows: Sequence[Sequence[int]],
        *,
        work: Path | None = None,
    ) -> None:
        super().__init__(source, get_solver(solver, Statistics(source.config, self._reach_head)))
        self._solver = solver
        self._entries = {entry.name: entry for entry in plan.entries}
        self._windows, self._work = windows, work
        self._start()

    def quantize(self, name: str, grid: Grid, rows: slice | None = None) -> Quantized:
        """See ``Weights.quantize``."""
        block, _, _ = split_name(name)
        if block is None:
            return super().quantize(name, grid, rows)
        self._reach(stored_block(self.config, block))
        solved = self._solved[name]
        if solved.fallen:
            self.fallen[name] = solved.fallen
        return solved.rows(rows) if rows else solved

    # --- the walk ----------------------------------------------------------------------------

    def _start(self) -> None:
        self._block = -1  # stored block that the walk has come to
        self._solved: dict[str, Quantized] = {}  # its tensors, by name in the plan
        self._steps: Iterator[dict[str, LayerStats]] = walk(
            self.config,
            self.source.read,
            self._windows,
            hessian=NEEDS.get(self._solver) == "hessian",
            carry=self._carried,
            work=self._work,
        )

    def _reach(self, block: int) -> None:
        """Walk on until a stored block is solved."""
        if block < self._block:
            self._start()
        while self._block < block:
            stats = next(self._steps)  # carries the states through the block before
            self._block = 0 if self._block < 0 else self._block + self.config.block_repeat
            self._solve_block(Statistics.of(self.config, stats))

    def _reach_head(self, key: str) -> LayerStats | None:
        """Statistics of the head's input, after all blocks; for ``Statistics``."""
        self._reach(stored_block(self.config, self.config.num_hidden_layers - 1))
        stats = next(self._steps)
        self._block = self.config.num_hidden_layers
        self._solved.clear()
        return stats[key]

    def _solve_block(self, statistics: Statistics) -> None:
        self._solved.clear()
        solve = get_solver(self._solver, statistics)
        for name, entry in self._entries.items():
            block, _, _ = split_name(name)
            if block is None or len(entry.shape) == 1:
                continue
            if stored_block(self.config, block) == self._block:
                self._solved[name] = solve(self.read(name), get_grid(entry.grid), name)

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
        step = rows if entry.grid.endswith("-tensor") else max(SLAB // columns // 256, 1) * 256
        grid = get_grid(entry.grid)
        decoded = np.empty((rows, columns), np.float32)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            decoded[part] = super().quantize(entry.name, grid, part).decode()
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
