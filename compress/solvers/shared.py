"""Codes of the weights that several targets store on the same grid: solved for the first of them,
and held for the others while the part of the model is written.

int4-g32 of ONNX and of Core ML are the same numbers, and a solver that needs Hessians is most of a
build's CPU time. The targets may store a weight fused or not, and ask for other rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from compress.decoder.config import FUSED, DecoderConfig, split_name
from compress.grids import CodebookGrid, Grid, LatticeGrid, Quantized, get_grid
from compress.machine import available_memory
from compress.plan.shapes import Plan
from compress.plan.weights import Weights

__all__ = ["SharedWeights", "Solutions"]

T = TypeVar("T")

SHARE = 1 / 8  # of the available memory, for the codes of one part of the model, at most
BYTES = 1.25  # of a held weight: a code, and its share of the group's parameters


class Solutions:
    """Solved rows by weight and grid, of the part of the model that is being written.

    Args:
        config: of the model.
        plans: of the targets that have the same weights and input statistics, in the order of
            writing.
    """

    def __init__(self, config: DecoderConfig, plans: Sequence[Plan]) -> None:
        self._config = config
        self._held: dict[tuple[str, str], list[tuple[int, Quantized]]] = {}
        self._part: int | None = None
        stored = {
            plan.format: {
                (member, entry.grid)
                for entry in plan.entries
                if len(entry.shape) == 2 and rounds(get_grid(entry.grid))
                for member, _ in self.members(entry.name, slice(0, entry.shape[0]))
            }
            for plan in plans
        }
        room, sizes = SHARE * available_memory(), dict[int | None, float]()
        self._later: dict[str, set[tuple[str, str]]] = {name: set() for name in stored}
        order = list(stored)
        for index, name in enumerate(order):
            others: set[tuple[str, str]] = set().union(*(stored[n] for n in order[index + 1 :]))
            for member, grid in sorted(stored[name] & others):
                block, role, _ = split_name(member)
                size = sizes.get(block, 0.0) + BYTES * math.prod(config.weight_shape(role))
                if size < room:
                    sizes[block] = size
                    self._later[name].add((member, grid))

    def members(self, name: str, rows: slice) -> Iterator[tuple[str, slice]]:
        """The weights that rows of a weight, fused or not, are of, and which of their rows."""
        _, role, kind = split_name(name)
        stem, first = name.removesuffix(f"{role}.{kind}"), 0
        for member in FUSED.get(role, (role,)):
            size = self._config.weight_shape(member)[0]
            start, stop = max(rows.start - first, 0), min(rows.stop - first, size)
            if start < stop:
                yield f"{stem}{member}.{kind}", slice(start, stop)
            first += size

    def begin(self, name: str) -> None:
        """Drop what is held of another part of the model than the weight's."""
        part, _, _ = split_name(name)
        if part != self._part:
            self._held.clear()
            self._part = part

    def find(self, member: str, grid: Grid, rows: slice) -> list[Quantized] | None:
        """Solved rows of a weight; None unless all of them are held. The rows on which the solver
        fell back are those of the pieces that begin here."""
        found, at = [], rows.start
        for start, piece in self._held.get((member, grid.name), ()):
            stop = start + piece.shape[0]
            if start <= at < min(stop, rows.stop):
                some = piece.rows(slice(at - start, min(stop, rows.stop) - start))
                found.append(replace(some, fallen=piece.fallen if at == start else 0))
                at += some.shape[0]
        return found if at == rows.stop else None

    def keep(self, format: str, member: str, rows: slice, solved: Quantized) -> None:
        """Hold solved rows of a weight, where a later target stores them too."""
        key = (member, solved.grid.name)
        if key in self._later[format]:
            self._held.setdefault(key, []).append((rows.start, solved))


class SharedWeights(Weights):
    """``Weights`` of one target, with the ``solutions`` of all of them.

    Args:
        solutions: of the targets.
        format: of this one.
    """

    def __init__(self, solutions: Solutions, format: str, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._solutions, self._format = solutions, format

    def in_slabs(
        self, name: str, grid: Grid, slabs: Sequence[slice | None], pack: Callable[[Quantized], T]
    ) -> Iterator[T]:
        """See ``Weights.in_slabs``; slabs are solved in sequence."""
        self._solutions.begin(name)
        for rows in slabs:
            if rows is None or ".experts." in name:
                yield from super().in_slabs(name, grid, [rows], pack)
                continue
            if rows.start == 0:
                self.fallen.pop(name, None)  # the weight starts over
            found = self._solved(name, grid, rows)
            if found.fallen:
                self.fallen[name] = self.fallen.get(name, 0) + found.fallen
            yield pack(found)

    def _solved(self, name: str, grid: Grid, rows: slice) -> Quantized:
        """Rows of a weight that are held, or solved now, a member of a fused weight at a time."""
        pieces, first = [], rows.start
        for member, some in self._solutions.members(name, rows):
            here = slice(first, first + some.stop - some.start)
            first = here.stop
            if (held := self._solutions.find(member, grid, some)) is not None:
                pieces += held
                continue
            stats = self.statistics.for_weight(name) if self.statistics else None
            solved = self._solve(self.read(name, here), grid, stats)
            self._solutions.keep(self._format, member, some, solved)
            pieces.append(solved)
        return pieces[0] if len(pieces) == 1 else joined(pieces)


def rounds(grid: Grid) -> bool:
    """Whether a grid has codes, and parameters of its own for each row."""
    return isinstance(grid, LatticeGrid | CodebookGrid) and grid.group_rows == 1


def joined(pieces: Sequence[Quantized]) -> Quantized:
    """Rows of one weight after another; their grid has parameters of its own for each row."""
    first = pieces[0]
    params = {key: np.concatenate([piece.params[key] for piece in pieces]) for key in first.params}
    codes = np.concatenate([piece.codes for piece in pieces])
    fallen = sum(piece.fallen for piece in pieces)
    return Quantized(codes, params, first.grid, codes.shape, fallen)
