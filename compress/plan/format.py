"""What a format is: a row with its name, and the modules of its package."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from compress.checkpoint.sources import Source
from compress.decoder.config import DecoderConfig
from compress.plan.shapes import Artifact, Candidate, Plan, PlanEntry, PlanRequest, Runtime
from compress.plan.weights import Weights

__all__ = ["Format", "Formats", "ProcessCost", "Writer", "Written"]

Written = Callable[[int], None]
"""``written(nbytes)``: so many bytes of the artifact's tensors more."""


class Writer(Protocol):
    """One artifact that is being written; ``compress.build.write`` puts its tensors in one by one.

    ``Writer(plan, weights, folder, written)`` begins the files in ``folder``, which lies in a
    ``.partial`` work folder of the caller: it is empty, or what an earlier writer left there that
    was cut off, and the tensors in ``weights.ledger`` are in it. ``written(nbytes)`` is called as
    bytes of tensors are written.

    Attributes:
        plan: what is written.
        weights: what it is made of.
        file: that tensors go to.
    """

    plan: Plan
    weights: Weights
    file: Path

    def put(self, entry: PlanEntry) -> int:
        """Write one tensor of the plan; where its bytes end in ``file``.

        Entries come in the order of the plan, some rows of one in memory at a time.

        Raises:
            CheckpointError: weights that cannot be read.
            GridError: values that a grid cannot hold.
            DiskFullError: no room.
        """
        ...

    def close(self) -> Artifact:
        """All tensors are there: write what belongs beside them."""
        ...


@dataclass(frozen=True)
class Format:
    """A format of artifacts: a row of ``exporters.formats.FORMATS``.

    What it can do lies in the modules of its package, which are imported at the first use:
    ``planning`` (``plan``, ``candidates``, ``GRIDS``), ``writer`` (``Writer``, ``file_bytes``,
    ``writing_memory``), ``runtime`` (``open_runtime``) and ``inspection`` (``describe``).

    Attributes:
        name: in recipes and on the command line.
        title: in reports.
        package: its modules are in.
        settings: JSON schema of the recipe's ``targets.<name>``.
        find: paths of its artifacts at a place: a file, an artifact's folder, a build's folder.
        how_to_run: Markdown for the model card, from a row of the report's ``artifacts``.
        process: what verifying it costs beside its bytes, for ``packlight batch``.
        stores_zeros: whether zeros of a sparse grid take no bytes.
        importance_file: name of its module that reads and writes importance files, or empty.
    """

    name: str
    title: str
    package: str
    settings: Mapping[str, Any]
    find: Callable[[Path], list[Path]]
    how_to_run: Callable[[Mapping[str, Any]], str]
    process: ProcessCost
    stores_zeros: bool = False
    importance_file: str = ""

    if TYPE_CHECKING:
        GRIDS: ClassVar[Sequence[str]]
        plan: ClassVar[Callable[[DecoderConfig, PlanRequest], Plan]]
        candidates: ClassVar[Callable[..., Sequence[Candidate]]]
        Writer: ClassVar[Callable[[Plan, Weights, Path, Written], Writer]]
        file_bytes: ClassVar[Callable[[Plan, Source], int]]
        writing_memory: ClassVar[Callable[[Plan], int]]
        open_runtime: ClassVar[Callable[..., Runtime]]
        describe: ClassVar[Callable[[Path], dict[str, Any]]]

    def __getattr__(self, name: str) -> Any:
        if name not in MEMBERS:
            raise AttributeError(name)
        found = getattr(importlib.import_module(f"{self.package}.{MEMBERS[name]}"), name)
        object.__setattr__(self, name, found)
        return found


# Members of a format, and the module of its package that has each:
#
# GRIDS             names of the grids that it can write
# plan              plan(config, request) -> Plan: which tensor gets which grid, and its bytes;
#                   arithmetic only. Raises GridError (a row that no grid can hold),
#                   UnsupportedModelError (a model that it cannot express)
# candidates        candidates(entry, settings, wanted=()) -> grids that a planned tensor may have
#                   instead, by bytes; among ``wanted`` if there are any. Empty for norms, biases
#                   and computed tables
# Writer            see ``Writer``
# file_bytes        file_bytes(plan, source) -> ``Artifact.nbytes`` of what would be written: graph,
#                   header and tokenizer are made as for writing, without a weight being read
# writing_memory    writing_memory(plan) -> bytes that a writer holds at most, libraries included,
#                   beside what ``Weights`` does
# open_runtime      open_runtime(path, *, context, threads=0) -> Runtime: a written artifact in the
#                   runtime that will execute it. Raises ArtifactError, RuntimeMissingError
# describe          describe(path) -> what ``packlight inspect`` shows, no weights read. Keys:
#                   ``format``, ``type`` (only where the file names one), ``name``,
#                   ``architecture``, ``parameters`` (None when unknown), ``bytes``,
#                   ``bits_per_weight``, ``kv_bytes_per_value``, ``context`` (positions that the
#                   file itself holds; 0 where only the model sets a limit), ``config`` (as
#                   ``config.json``, at least the sizes; empty when unknown), ``metadata`` (str →
#                   printable), ``tensors`` (list of name, shape, grid, bytes)
MEMBERS = {
    "GRIDS": "planning",
    "plan": "planning",
    "candidates": "planning",
    "Writer": "writer",
    "file_bytes": "writer",
    "writing_memory": "writer",
    "open_runtime": "runtime",
    "describe": "inspection",
}

Formats = Mapping[str, Format]
"""Formats by name: ``exporters.formats.FORMATS``, handed to whoever needs them."""


@dataclass(frozen=True)
class ProcessCost:
    """What a process that loads and runs an artifact takes, measured on the bundled models.

    Attributes:
        base_bytes: memory whatever the artifact's size.
        per_byte: memory for each byte of the artifact.
        seconds_per_weight: of one core, to round to nearest and to pack.
    """

    base_bytes: int
    per_byte: float
    seconds_per_weight: float
