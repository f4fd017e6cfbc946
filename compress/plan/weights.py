"""Reads and quantizes weights for a writer, some rows at a time; and the ledger of one target's
finished tensors.
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

FALLEN_BACK = "as scale_search leaves them"  # in a note that a terminal has with -v only


class Weights:
    """The weights of an artifact, by packlight's names; read and quantized on request, not cached.

    Names (see ``compress.decoder.config.WeightMap``): ``blocks.{i}.{role}.weight`` and ``.bias``,
    ``embed_tokens.weight``, ``norm.weight``, ``lm_head.weight``. Fused roles (``qkv_proj``,
    ``gate_up_proj``) and their parts are both readable, however the checkpoint stores them.

    Attributes:
        read: a weight as float32, whole or some of its rows (``Source.read``).
        fallen: per weight name, rows for which the solver fell back on a simpler one in this run.
        ledger: the tensors that are written, in this run or an earlier one.
        held: most slabs of a weight that are in memory at a time.
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
            solve: quantizes a weight.
            ledger: of an earlier run.
            at_once: slabs that are solved at a time; 1 for a solver that uses all threads on one.
            slab: most weights in memory at a time; None: as many as a writer requests.
            statistics: the solver's input statistics, dropped after each part of the model;
                None for a solver that uses none.
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
        """Quantize a weight with the recipe's solver; ``rows`` for one slab of a large tensor."""
        return next(self.in_slabs(name, grid, [rows], lambda quantized: quantized))

    def slabs(self, shape: Sequence[int], most: int, step: int = SIDE_BY_SIDE) -> list[slice]:
        """Split a matrix's rows into equal slabs for ``in_slabs``, the same number for each thread,
        so that all threads finish together.

        Args:
            shape: of the matrix.
            most: weights that may be in memory at a time.
            step: all slabs but the last are a multiple of it, at least one.
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
        """Quantize a weight slab by slab and yield ``pack(slab)`` in order; the next slabs may be
        solved and packed in threads meanwhile.

        Args:
            slabs: row ranges as for ``quantize``, small enough that ``held`` of them fit in memory.
        """
        stats = self.statistics.for_weight(name) if self.statistics else None
        if self._at_once == 1 or len(slabs) == 1:
            for rows in slabs:
                if rows is None or rows.start == 0:
                    self.fallen.pop(name, None)  # the weight starts over
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
        """A report line where the solver fell back on a simpler one for some rows."""
        rows_of = {row["weight"]: row["fallen"] for row in self.ledger.values()}
        fallen = {name: rows for name, rows in (self.fallen | rows_of).items() if rows}
        if not fallen:
            return ()
        worst = max(sorted(fallen), key=lambda name: fallen[name])
        return (
            f"{sum(fallen.values()):,} rows of {len(fallen)} tensors are {FALLEN_BACK}, which "
            "measured better on inputs held back from calibration; most in "
            f"{worst}: {fallen[worst]:,}",
        )


# --- the ledger -------------------------------------------------------------------------------
#
# The finished tensors of one target, a line each, so that ``--resume`` continues an interrupted
# build after them.
#
# A line is appended when the tensor's bytes are in the target's file. Written bytes survive the
# process, even after kill -9, but not necessarily a power loss. So the file is synced every few
# seconds, the ledger records up to where, and later lines count only until the machine reboots. A
# line cut short when the build ended is ignored.

SYNC_EVERY = 5.0
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Row = dict[str, Any]


class Ledger(dict[str, Row]):
    """Finished tensors by name, in the order of writing.

    Args:
        path: the file; None keeps the ledger in memory only.
        target: identifies the artifact; lines of another target in the file are dropped.
        sync_every: seconds of work that a power loss may cost.
        boot: file whose content changes at every boot (Linux has one); without it every run is
            taken for a new boot.
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
        """Record a finished tensor.

        Args:
            name: of the tensor.
            file: that it was written to, flushed.
            end: offset of its end in the file.
            facts: values that the writer needs when it resumes.
        """
        self[name] = {"done": name, "end": end, **facts}
        self._append(self[name])
        self._unsynced = file
        if time.monotonic() > self._synced_at + self._sync_every:
            self.sync()

    def sync(self) -> None:
        """Sync the finished tensors to disk, so that they survive a power loss."""
        if self._path is not None and self._unsynced is not None:
            sync(self._unsynced)
            self._append({"synced": True})
            self._unsynced, self._synced_at = None, time.monotonic()

    def cut(self, file: Path, end: int | None = None) -> bool:
        """Truncate a file to the end of its last finished tensor.

        Args:
            end: where that is, of a writer with several files.

        Returns:
            False where the file must be written from its start: nothing is finished, or it is
            shorter than the ledger says; then the ledger is emptied.
        """
        if end is None:
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
    """Whether a ledger's file has any finished tensor."""
    return any("done" in row for row, _ in read_lines(path))


def read_lines(path: Path) -> Iterator[tuple[Row, int]]:
    """Rows of a ledger's file and their end offsets, up to the first incomplete one."""
    if not path.is_file():
        return
    end = 0
    for line in path.read_bytes().splitlines(keepends=True):
        end += len(line)
        try:
            row = json.loads(line)
        except ValueError:  # a page that was never flushed to the disk reads as zeros
            return
        if not line.endswith(b"\n") or not isinstance(row, dict):
            return
        yield row, end
