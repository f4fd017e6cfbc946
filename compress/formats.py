"""The table of artifact formats, which ``exporters.formats`` fills, and the type of its rows."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UsageError, did_you_mean, reading

if TYPE_CHECKING:
    from compress.calibration.statistics import Statistics
    from compress.checkpoint.sources import Source
    from compress.decoder.config import DecoderConfig
    from compress.plan.job import Job
    from compress.plan.shapes import Artifact, Candidate, Plan, PlanRequest, Runtime, Written
    from compress.plan.shapes import Writer as WriterShape
    from compress.plan.weights import Weights
    from compress.recipe.model import TargetSettings

__all__ = ["FORMATS", "Check", "Format", "ProcessCost", "Usage", "get_format", "hub_path"]


@dataclass(frozen=True)
class ProcessCost:
    """Cost of a process that loads and runs an artifact, measured on the bundled models.

    Attributes:
        base_bytes: memory independent of the artifact's size.
        per_byte: memory for each byte of the artifact.
        seconds_per_weight: on one core, to round to nearest and pack.
        palette_seconds: the same for palettes; 0 where it is equal.
        library_bytes: additional memory of the libraries in a build that writes it.
    """

    base_bytes: int
    per_byte: float
    seconds_per_weight: float
    palette_seconds: float = 0.0
    library_bytes: int = 0


@dataclass(frozen=True)
class Check:
    """A row of ``packlight doctor``.

    Attributes:
        name: of the check.
        found: what was found.
        ok: whether it is sufficient.
        hint: what to type if not.
    """

    name: str
    found: str
    ok: bool
    hint: str = ""


@dataclass(frozen=True)
class Usage:
    """One way to run an artifact, for the model card.

    Attributes:
        text: a paragraph of Markdown.
        code: with ``{path}`` for the artifact's path.
        language: of the code.
        quote: quotes a path for that language.
        hub: the code for an artifact in a repository of the Hub, with ``{repo}`` for its id and
            ``{path}`` for the path in it.
    """

    text: str
    code: str
    language: str
    quote: Callable[[str], str]
    hub: str = ""

    def snippet(self, path: str, repo: str = "") -> str:
        """The code for a path, or for a repository of the Hub."""
        if repo and self.hub:
            return self.hub.format(path=self.quote(hub_path(path)), repo=self.quote(repo))
        return self.code.format(path=self.quote(path))


@dataclass(frozen=True)
class Format:
    """A format of artifacts: a row of ``exporters.formats``.

    Its functions are in the modules of its package (``MEMBERS``), which are imported at first use.

    Attributes:
        name: in recipes, reports and on the command line.
        title: on pages.
        package: with its modules.
        place: the argument of ``packlight verify``, for messages: ``a .gguf file``.
        libraries: distributions that affect its bytes, in addition to those of every format.
        process: cost of verifying it, for ``packlight batch``.
        tokenizer_inside: whether the file contains the tokenizer, so that one is required.
        speed_note: a sentence on its measured speeds.
        stores_zeros: whether zeros of a sparse grid take no bytes.
        imatrix: whether its tools have importance files.
        hub_root: whether its files are at the root of a Hub repository, where loaders look for
            them by the repository's id.
        extra: of packlight, that brings what writes or runs it; empty where its own dependencies
            are enough.
        extra_module: a module of that extra.
        app: whether it is for an app, whose files lie beside it (``write_app_files``).
        prompt_call: most ids of a prompt that apps give in one call, which returns the logits of
            all its positions: they count among activations. 0: of one position only.
    """

    name: str
    title: str
    package: str
    place: str
    process: ProcessCost
    libraries: tuple[str, ...] = ()
    tokenizer_inside: bool = False
    speed_note: str = ""
    stores_zeros: bool = False
    imatrix: bool = False
    hub_root: bool = False
    extra: str = ""
    extra_module: str = ""
    app: bool = False
    prompt_call: int = 0

    if TYPE_CHECKING:

        @property
        def Settings(self) -> type[TargetSettings]: ...

        @property
        def GRIDS(self) -> Sequence[str]: ...

        @property
        def plan(self) -> Callable[[DecoderConfig, PlanRequest], Plan]: ...

        @property
        def candidates(self) -> Callable[..., Sequence[Candidate]]: ...

        @property
        def Writer(self) -> Callable[[Plan, Weights, Path, Written], WriterShape]: ...

        @property
        def file_bytes(self) -> Callable[[Plan, Source], int]: ...

        @property
        def writing_memory(self) -> Callable[[Plan], int]: ...

        @property
        def write_app_files(
            self,
        ) -> Callable[[Artifact, Job, Mapping[str, Any] | None], None]: ...

        @property
        def open_runtime(self) -> Callable[..., Runtime]: ...

        @property
        def describe(self) -> Callable[[Path], dict[str, Any]]: ...

        @property
        def find(self) -> Callable[[Path], list[Path]]: ...

        @property
        def USAGE(self) -> Sequence[Usage]: ...

        @property
        def check_runtime(self) -> Callable[[], object]: ...

        @property
        def checks(self) -> Callable[[], list[Check]]: ...

        @property
        def read_imatrix(self) -> Callable[[Path, DecoderConfig], Statistics]: ...

        @property
        def write_imatrix(self) -> Callable[[Path, DecoderConfig, Statistics], None]: ...

    @property
    def installed(self) -> bool:
        """Whether the extra that it needs is here."""
        if not self.extra_module:
            return True
        from importlib.util import find_spec  # loads forty modules

        found = find_spec(self.extra_module)
        return found is not None and found.origin is not None  # not any folder of that name

    def inspect(self, path: Path) -> dict[str, Any]:
        """``describe`` an untrusted artifact.

        Raises:
            ArtifactError: it is damaged, or not an artifact of this format.
        """
        with reading(path.name):
            return self.describe(path)

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
# write_app_files   write_app_files(artifact, job, parity): files of an app beside an artifact
#                   (``exporters.app``), after verification, which gave ``parity``; where ``app``
# open_runtime      open_runtime(path, *, context, threads=0) -> Runtime: a written artifact in the
#                   runtime that will execute it. Raises ArtifactError, RuntimeMissingError
# describe          describe(path) -> what ``packlight inspect`` shows, no weights read. Keys:
#                   ``format``, ``type`` (only where the file names one), ``name``,
#                   ``architecture``, ``parameters`` (None when unknown), ``bytes``,
#                   ``bits_per_weight``, ``kv_bytes_per_value``, ``context`` (positions that the
#                   file itself holds; 0 where only the model sets a limit), ``config`` (as
#                   ``config.json``, at least the sizes; empty when unknown), ``metadata`` (str →
#                   printable), ``tensors`` (list of name, shape, grid, bytes)
# find              find(path) -> its artifacts at a place: one, or those in the folder of a build
# USAGE             a ``Usage`` for each way to run one, the first to recommend first
# check_runtime     check_runtime(): raises RuntimeMissingError where what runs it is not here; of
#                   formats with an ``extra``
# checks            checks() -> rows of ``packlight doctor``: whether what runs it is here; loads
#                   nothing
# read_imatrix      read_imatrix(path, config) -> Statistics, and write_imatrix(path, config,
#                   statistics), where ``imatrix``
# Settings          pydantic model of the recipe's ``targets.<name>``, a ``TargetSettings``
MEMBERS = {
    "Settings": "settings",
    "GRIDS": "planning",
    "plan": "planning",
    "candidates": "planning",
    "Writer": "writer",
    "file_bytes": "writer",
    "writing_memory": "writer",
    "write_app_files": "app",
    "open_runtime": "runtime",
    "describe": "inspection",
    "find": "card",
    "USAGE": "card",
    "check_runtime": "card",
    "checks": "card",
    "read_imatrix": "imatrix",
    "write_imatrix": "imatrix",
}

FORMATS: dict[str, Format] = {}
"""Rows by name, in the order of reports."""


def hub_path(path: str) -> str:
    """The path that a build's file has in a repository of the Hub.

    Example:
        >>> hub_path("onnx/onnx/model_q4.onnx"), hub_path("report.json")
        ('onnx/model_q4.onnx', 'report.json')
    """
    folder, _, inside = path.partition("/")
    return inside if inside and folder in FORMATS and FORMATS[folder].hub_root else path


def get_format(name: str) -> Format:
    """A row of the table.

    Raises:
        UsageError: no such format.
    """
    if name not in FORMATS:
        raise UsageError(f"unknown format {name!r}", hint=did_you_mean(name, FORMATS))
    return FORMATS[name]
