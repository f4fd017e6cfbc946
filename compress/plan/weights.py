"""The weights that a writer asks for, on their grids, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from compress.checkpoint.sources import Source
from compress.grids import Float32, Grid, Quantized
from compress.machine import in_order
from compress.plan.ledger import Ledger
from compress.plan.shapes import PlanEntry

if TYPE_CHECKING:
    from compress.calibration.statistics import Statistics

__all__ = ["Solver", "Weights"]

T = TypeVar("T")

SIDE_BY_SIDE = 32  # rows that the kernels take at once: ``compress.grids.lanes.LANES``

Solver = Callable[[Float32, Grid, str], Quantized]
"""``solve(weight, grid, name)``: the solver with its statistics already bound."""


class Weights:
    """The weights that an artifact is made of, under our names, read when asked for, never kept.

    Names (see ``compress.decoder.config.WeightMap``): ``blocks.{i}.{role}.weight`` and ``.bias``,
    ``embed_tokens.weight``, ``norm.weight``, ``lm_head.weight``. Fused roles (``qkv_proj``,
    ``gate_up_proj``) and their parts are both readable, however the checkpoint stores them.

    Attributes:
        read: a weight as float32, whole or some of its rows (``Source.read``).
        fallen: rows by weight name for which the solver fell back on a simpler one, in this run.
        ledger: the tensors that are written, in this run or before.
        held: slabs of a weight that are in memory at a time, at most.
    """

    def __init__(
        self,
        source: Source,
        solve: Solver,
        ledger: Ledger | None = None,
        *,
        at_once: int = 1,
        slab: int | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        """
        Args:
            source: of the weights.
            solve: puts one on a grid.
            ledger: of an earlier run.
            at_once: slabs that are solved at a time; 1 for a solver that keeps all threads busy
                with one.
            slab: weights in memory at a time, at most; None for as many as a writer asks for.
            statistics: what the solver goes by, let go at the end of each part of the model.
        """
        self.source = source
        self.checkpoint = source.checkpoint
        self.config = source.config
        self.read = source.read
        self.ledger = Ledger() if ledger is None else ledger
        self.statistics = statistics
        self.fallen: dict[str, int] = {}
        self.held = at_once + 1 if at_once > 1 else 1
        self._solve, self._at_once, self._slab = solve, at_once, slab

    def quantize(self, name: str, grid: Grid, rows: slice | None = None) -> Quantized:
        """A weight on a grid, by the recipe's solver; ``rows`` for one slab of a large tensor."""
        if rows is None or rows.start == 0:
            self.fallen.pop(name, None)  # begun anew
        found = self._solve(self.read(name, rows), grid, name)
        if found.fallen:
            self.fallen[name] = self.fallen.get(name, 0) + found.fallen
        return found

    def slabs(self, shape: Sequence[int], most: int, step: int = SIDE_BY_SIDE) -> list[slice]:
        """Runs of rows of a matrix for ``in_slabs``: equal ones, as many for each thread, so that
        all threads come to the end of it together.

        Args:
            shape: of the matrix.
            most: weights that may be in memory at a time.
            step: all runs but the last are a multiple of it, one at least.
        """
        rows, columns = shape
        most = min(most, self._slab or most)
        fewest = -(-rows // max(most // self.held // columns // step * step, step))
        even = -(-fewest // self._at_once) * self._at_once
        count = -(-rows // (even if fewest > 1 else 1) // step) * step
        return [slice(start, min(start + count, rows)) for start in range(0, rows, count)]

    def in_slabs(
        self, name: str, grid: Grid, slabs: Sequence[slice | None], pack: Callable[[Quantized], T]
    ) -> Iterator[T]:
        """What ``pack`` makes of each slab of a weight on a grid, in order; it and the solver may
        be at work on the next ones meanwhile, in threads.

        Args:
            slabs: as ``quantize`` takes them; of no more weights than ``held`` of them may take.
        """
        if self._at_once == 1 or len(slabs) == 1:
            for rows in slabs:
                yield pack(self.quantize(name, grid, rows))
            return

        def solved(values: Float32 | None, rows: slice | None) -> T:
            weight = self.read(name, rows) if values is None else values
            return pack(self._solve(weight, grid, name))

        # A source that computes its weights is read here, by one thread.
        alone = not self.source.threadsafe
        works = (partial(solved, self.read(name, rows) if alone else None, rows) for rows in slabs)
        yield from in_order(works, self._at_once)

    def finish(self, entry: PlanEntry, file: Path, end: int) -> None:
        """Note in the ledger that a tensor is written.

        Args:
            entry: of the tensor.
            file: that holds it; its bytes are out of the process (flushed).
            end: of the file, in bytes, as far as it is written.
        """
        fallen = self.fallen.get(entry.name, 0)
        self.ledger.add(entry.target_name, file, end, weight=entry.name, fallen=fallen)

    def notes(self) -> tuple[str, ...]:
        """A line for the report, where rows fell back."""
        rows_of = {row["weight"]: row["fallen"] for row in self.ledger.values()}
        fallen = {name: rows for name, rows in (self.fallen | rows_of).items() if rows}
        if not fallen:
            return ()
        worst = max(sorted(fallen), key=lambda name: fallen[name])
        return (
            f"{sum(fallen.values()):,} rows of {len(fallen)} tensors are as scale_search "
            "leaves them, which measured better on inputs held back from calibration; most in "
            f"{worst}: {fallen[worst]:,}",
        )
