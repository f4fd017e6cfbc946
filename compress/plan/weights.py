"""The weights that a writer asks for, on their grids, some rows at a time; and the ledger of what
is written of one target.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from compress.checkpoint.sources import Source
from compress.files import sync
from compress.grids import Float32, Grid, Quantized
from compress.machine import in_order

if TYPE_CHECKING:
    from compress.calibration.statistics import LayerStats, Statistics

__all__ = ["Ledger", "Solver", "Weights", "has_finished"]

T = TypeVar("T")

SIDE_BY_SIDE = 32  # rows that the kernels take at once: ``compress.grids.lanes.LANES``

Solver = Callable[[Float32, Grid, "LayerStats | None"], Quantized]
"""``solve(weight, grid, stats)``: see ``compress.solvers``."""


class Weights:
    """The weights that an artifact is made of, under our names, read on request, never cached.

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
            statistics: what the solver goes by, let go at the end of each part of the model; None:
                nothing.
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
        return next(self.in_slabs(name, grid, [rows], lambda quantized: quantized))

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
        stats = self.statistics.for_weight(name) if self.statistics else None
        if self._at_once == 1 or len(slabs) == 1:
            for rows in slabs:
                if rows is None or rows.start == 0:
                    self.fallen.pop(name, None)  # begun anew
                found = self._solve(self.read(name, rows), grid, stats)
                if found.fallen:
                    self.fallen[name] = self.fallen.get(name, 0) + found.fallen
                yield pack(found)
            return

        def solved(values: Float32 | None, rows: slice | None) -> T:
            weight = self.read(name, rows) if values is None else values
            return pack(self._solve(weight, grid, stats))

        # A source that computes its weights is read here, by one thread.
        alone = not self.source.threadsafe
        works = (partial(solved, self.read(name, rows) if alone else None, rows) for rows in slabs)
        yield from in_order(works, self._at_once)

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


# --- the ledger -------------------------------------------------------------------------------
#
# What is written of one target: its finished tensors, a line each, so that a build that was cut
# off goes on behind them.
#
# A line is appended when the tensor's bytes are in the target's file. What a process wrote outlives
# it, even after kill -9; it need not outlive the machine. So the file is synced every few seconds,
# the ledger says up to where, and lines behind that count only until the machine starts again. The
# line that was being written when the build ended is left out.

SYNC_EVERY = 5.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Row = dict[str, Any]


class Ledger(dict[str, Row]):
    """Finished tensors by name, in the order of their coming.

    Args:
        path: the file; None keeps the ledger in memory only.
        target: names what is written. What stands in the file of another target is forgotten.
        sync_every: seconds of work that a loss of power may cost.
        boot: file that is another after every start of the machine (Linux has one); where there is
            none, every start is taken for new.
    """

    def __init__(
        self,
        path: Path | None = None,
        target: str = "",
        *,
        sync_every: float = SYNC_EVERY,
        boot: Path = BOOT_ID,
    ) -> None:
        super().__init__()
        self._path, self._target, self._sync_every = path, target, sync_every
        self._synced_at = time.monotonic()
        self._unsynced: Path | None = None  # file of the last tensor, unless that is synced
        if path is None:
            return
        try:
            self._boot = boot.read_text(encoding="ascii").strip()
        except OSError:
            self._boot = ""
        lines = list(read_lines(path))
        boots = [row["boot"] for row, _ in lines if "boot" in row]
        if not lines or lines[0][0].get("target") != target:
            self._begin()
            return
        if not boots[-1] or boots[-1] != self._boot:
            synced = [i for i, (row, _) in enumerate(lines) if "synced" in row]
            lines = lines[: synced[-1] + 1 if synced else 1]
        os.truncate(path, lines[-1][1])
        self.update({row["done"]: row for row, _ in lines if "done" in row})
        self._append({"boot": self._boot})

    def add(self, name: str, file: Path, end: int, **facts: Any) -> None:
        """A tensor is finished.

        Args:
            name: of the tensor.
            file: that it was written to; its bytes are out of the process (flushed).
            end: where they end in the file.
            facts: what the writer will want to know of it.
        """
        self[name] = {"done": name, "end": end, **facts}
        self._append(self[name])
        self._unsynced = file
        if time.monotonic() > self._synced_at + self._sync_every:
            self.sync()

    def sync(self) -> None:
        """Have what is finished outlive the machine, too."""
        if self._path is not None and self._unsynced is not None:
            sync(self._unsynced)
            self._append({"synced": True})
            self._unsynced, self._synced_at = None, time.monotonic()

    def cut(self, file: Path) -> bool:
        """Make a file end where its last finished tensor does.

        Returns:
            False where it is to be written from its start: nothing is finished, or it is not as
            long as the ledger says; then the ledger is empty, too.
        """
        end = max((row["end"] for row in self.values()), default=0)
        if end and file.is_file() and file.stat().st_size >= end:
            os.truncate(file, end)
            return True
        if self:
            self._begin()
        return False

    # --- the file ----------------------------------------------------------------------------

    def _begin(self) -> None:
        self.clear()
        if self._path is not None:
            self._path.parent.mkdir(exist_ok=True)
            self._path.unlink(missing_ok=True)
            self._append({"target": self._target, "boot": self._boot})

    def _append(self, row: Row) -> None:
        if self._path is not None:
            with self._path.open("ab", buffering=0) as stream:
                stream.write(json.dumps(row).encode() + b"\n")


def has_finished(path: Path) -> bool:
    """Whether a ledger's file tells of any tensor."""
    return any("done" in row for row, _ in read_lines(path))


def read_lines(path: Path) -> Iterator[tuple[Row, int]]:
    """Rows of a ledger's file and where each ends, up to the first that is not whole."""
    if not path.is_file():
        return
    end = 0
    for line in path.read_bytes().splitlines(keepends=True):
        end += len(line)
        try:
            row = json.loads(line)
        except ValueError:  # the page of a file that never came to the disk is zeros
            return
        if not line.endswith(b"\n") or not isinstance(row, dict):
            return
        yield row, end
