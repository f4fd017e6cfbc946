"""What passes between the workshop and the shipyards: Plan, Weights, Artifact, Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from compress.calibration.statistics import Statistics
from compress.checkpoint.sources import Source
from compress.decoder.config import DecoderConfig
from compress.errors import UsageError
from compress.grids import Float32, Grid, Quantized
from compress.machine import in_order
from compress.output.ledger import Ledger

T = TypeVar("T")

SIDE_BY_SIDE = 32  # rows that the kernels take at once: ``compress.grids.lanes.LANES``

Progress = Callable[[int, int], None]
"""``progress(done, total)``, in bytes of the artifact."""

Solver = Callable[[Float32, Grid, str], Quantized]
"""``solve(weight, grid, name)``: the solver with its statistics already bound."""


@dataclass(frozen=True)
class PlanEntry:
    """One tensor of the artifact.

    Attributes:
        name: our name of the weight (``blocks.3.q_proj.weight``, ``blocks.3.qkv_proj.weight``,
            ``embed_tokens.weight``): what to ask ``Weights`` for. Tables that are computed are
            ``rope.…``; empty in an artifact that was read back, which only knows its own names.
        target_name: the name in the artifact (``blk.3.attn_qkv.weight``).
        grid: the grid's name; ``F32``/``F16`` for what stays float.
        shape: ``[rows, columns]``, or one-dimensional for norms and biases.
        nbytes: bytes in the file, without alignment.
        note: why this grid, when it is not the one asked for (told in the report).
    """

    name: str
    target_name: str
    grid: str
    shape: tuple[int, ...]
    nbytes: int
    note: str = ""


@dataclass(frozen=True)
class Candidate:
    """One grid that a tensor may be stored on.

    Attributes:
        grid: its name.
        nbytes: bytes that the tensor takes in the file, alignment and records included.
    """

    grid: str
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """Which tensor gets which grid, for one target.

    Attributes:
        format: ``gguf``, ``onnx``, ``coreml``.
        type_name: as it stands in file names and tables: ``Q4_K_M``, ``int4-g32``, ``lut4-g8``,
            ``mix-3.92bpw`` where each tensor's grid was chosen (``mix_name``).
        model_name: base of the file names; nothing in it that a file system minds.
        entries: in the order of writing.
        settings: the recipe's target settings that the writer needs again.
        notes: lines for the report (fallbacks, caveats such as an ignored sliding window).
        max_context: positions up to which the artifact agrees with the float model.
        kv_bytes_per_value: of the KV cache as the runtime holds it: 2 for float16.
        file_bytes: predicted bytes of the model files; 0 where nobody asked.
        expected_divergence: KL from the float model that a cost table predicts, nats per token.
    """

    format: str
    type_name: str
    model_name: str
    entries: tuple[PlanEntry, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    max_context: int = 0
    kv_bytes_per_value: int = 2
    file_bytes: int = 0
    expected_divergence: float | None = None

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries)


def mix_name(entries: Sequence[PlanEntry], config: DecoderConfig) -> str:
    """``Plan.type_name`` of a mix: bytes of its tensors in bits per weight of the float model."""
    bits = 8 * sum(entry.nbytes for entry in entries) / config.num_parameters
    return f"mix-{bits:.2f}bpw"


@dataclass(frozen=True)
class Artifact:
    """A written artifact.

    Attributes:
        format: ``gguf``, ``onnx``, ``coreml``.
        type_name: as in the plan.
        path: the file or folder that a runtime opens (GGUF: the file; ONNX: the folder with
            config.json; Core ML: the .mlpackage).
        nbytes: bytes of the model files on disk (weights, graph, in-file tokenizer), without
            side files such as tokenizer.json.
        weights_bytes: bytes of the packed tensors.
        kv_cache_bytes_per_token: of this artifact's cache, at its dtype.
        plan: what was written.
        notes: lines for the report.
    """

    format: str
    type_name: str
    path: Path
    nbytes: int
    weights_bytes: int
    kv_cache_bytes_per_token: int
    plan: Plan
    notes: tuple[str, ...] = ()


class Runtime(Protocol):
    """A loaded artifact: tokens in, logits out. Not thread-safe."""

    @property
    def name(self) -> str:
        """The runtime and its version, for the report: ``llama.cpp (xllamacpp 2026.10.11549)``."""
        ...

    @property
    def vocab_size(self) -> int: ...

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits at every position of a fresh sequence, float32 ``[len(tokens), vocab]``.

        Forgets whatever the cache held. The array is the caller's to keep.

        Raises:
            UsageError: no tokens, or more than there is room for (``check_room``).
        """
        ...

    def reset(self) -> None:
        """Empty the KV cache."""
        ...

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens to the cached sequence; logits after the last one, float32 ``[vocab]``.

        Raises:
            UsageError: as ``logits``.
        """
        ...

    def close(self) -> None:
        """Free the model. Calling it twice is harmless."""
        ...


def check_room(used: int, count: int, room: int) -> None:
    """What every runtime refuses: no tokens, or more than its context holds.

    Args:
        used: positions in the cache.
        count: tokens that come.
        room: positions of the context.

    Raises:
        UsageError: either.
    """
    if count == 0:
        raise UsageError("a runtime needs at least one token")
    if used + count > room:
        raise UsageError(
            f"{used + count} tokens do not fit: the runtime has room for {room}",
            hint="a larger context, up to what the artifact was built for",
        )


class Weights:
    """The weights that an artifact is made of, under our names, read when asked for, never kept.

    Names (see ``compress.decoder.config.WeightMap``): ``blocks.{i}.{role}.weight`` and ``.bias``,
    ``embed_tokens.weight``, ``norm.weight``, ``lm_head.weight``. Fused roles (``qkv_proj``,
    ``gate_up_proj``) and their parts are both readable, however the checkpoint stores them.

    Attributes:
        fallen: rows by weight name for which the solver fell back on a simpler one, in this run.
        ledger: what the writer has finished, in this run or before: it need not ask for that.
        held: slabs of a weight that are in memory at a time, at most.
    """

    def __init__(
        self, source: Source, solve: Solver, ledger: Ledger | None = None, *, at_once: int = 1
    ) -> None:
        """
        Args:
            source: of the weights.
            solve: puts one on a grid.
            ledger: of an earlier run.
            at_once: slabs that are solved at a time; 1 for a solver that keeps all threads busy
                with one.
        """
        self.source = source
        self.checkpoint = source.checkpoint
        self.config = source.config
        self.ledger = Ledger() if ledger is None else ledger
        self.fallen: dict[str, int] = {}
        self.held = at_once + 1 if at_once > 1 else 1
        self._solve, self._at_once = solve, at_once

    def read(self, name: str, rows: slice | None = None) -> Float32:
        """A weight as float32, whole or some of its rows; checked to be finite.

        Raises:
            CheckpointError: not there, truncated, or with NaN/Inf.
        """
        return self.source.read(name, rows)

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
        fewest = -(-rows // max(most // self.held // columns // step * step, step))
        even = -(-fewest // self._at_once) * self._at_once
        count = -(-rows // (even if fewest > 1 else 1) // step) * step
        return [slice(start, min(start + count, rows)) for start in range(0, rows, count)]

    def in_slabs(
        self, name: str, grid: Grid, slabs: Iterable[slice | None], pack: Callable[[Quantized], T]
    ) -> Iterator[T]:
        """What ``pack`` makes of each slab of a weight on a grid, in order; it and the solver may
        be at work on the next ones meanwhile, in threads.

        Args:
            slabs: as ``quantize`` takes them; of no more weights than ``held`` of them may take.
        """
        slabs = list(slabs)
        if self._at_once == 1 or len(slabs) == 1:
            for rows in slabs:
                yield pack(self.quantize(name, grid, rows))
            return

        def solved(read: Callable[[], Float32]) -> T:
            return pack(self._solve(read(), grid, name))

        # Asked for here: targets that keep step wait for each other in their own threads.
        readers = (self.source.reader(name, rows) for rows in slabs)
        yield from in_order((partial(solved, read) for read in readers), self._at_once)

    def finish(self, target_name: str, name: str, file: Path, end: int, **facts: Any) -> None:
        """Note that a tensor is written; see ``Ledger.add``.

        Args:
            target_name: of the tensor, in the artifact.
            name: of the weight that it holds.
            file, end, facts: as ``Ledger.add``.
        """
        fallen = self.fallen.get(name, 0)
        self.ledger.add(target_name, file, end, weight=name, fallen=fallen, **facts)

    def notes(self) -> tuple[str, ...]:
        """A line for the report, where rows fell back."""
        told = {row["weight"]: row["fallen"] for row in self.ledger}
        fallen = {name: rows for name, rows in (self.fallen | told).items() if rows}
        if not fallen:
            return ()
        worst = max(sorted(fallen), key=lambda name: fallen[name])
        return (
            f"{sum(fallen.values()):,} rows of {len(fallen)} tensors are as scale_search "
            "leaves them, which measured better on inputs held back from calibration; most in "
            f"{worst}: {fallen[worst]:,}",
        )


@dataclass(frozen=True)
class Shipyard:
    """What the pipeline is given of the exporters, which it does not import.

    Attributes:
        get_exporter: format → exporter.
        probe: the command that opens one artifact in a child process.
        write_pages: writes ``report.html`` and ``README.md`` for a report into a folder.
        read_imatrix: statistics from an importance file of llama.cpp.
        write_imatrix: and to one.
    """

    get_exporter: Callable[[str], Exporter]
    probe: Sequence[str]
    write_pages: Callable[[Mapping[str, Any], Path], None]
    read_imatrix: Callable[[Path, DecoderConfig], Statistics]
    write_imatrix: Callable[[Path, DecoderConfig, Statistics], None]


class Exporter(Protocol):
    """What the package of a format offers (its ``__init__`` has these as plain functions)."""

    def grids(self) -> Sequence[str]:
        """Names of the grids that the format can write."""
        ...

    def plan(
        self,
        config: DecoderConfig,
        settings: Mapping[str, Any],
        *,
        model_name: str = "model",
        choices: Mapping[str, str] | None = None,
    ) -> Plan:
        """Which tensor gets which grid, and its bytes; arithmetic only, nothing is read.

        Args:
            config: the model.
            settings: the recipe's ``targets.<format>`` (already validated).
            model_name: base of the file names.
            choices: entry name → grid, for entries that shall not have the settings' grid; the
                plan then goes by ``mix_name``.

        Raises:
            GridError: a row that no grid of the target can hold.
            UnsupportedModelError: a model that the target cannot express.
        """
        ...

    def candidates(
        self, entry: PlanEntry, settings: Mapping[str, Any], wanted: Sequence[str] = ()
    ) -> Sequence[Candidate]:
        """Grids that a planned tensor may have instead, by bytes; what the runtime takes for the
        tensor's role and row length.

        Args:
            entry: of a plan.
            settings: the plan's; a format may leave out what its preferred hardware runs badly.
            wanted: names of grids to choose among, some of ``grids()``; none: the format's choice.

        Empty for what has one form only: norms, biases, computed tables.
        """
        ...

    def file_bytes(self, plan: Plan, source: Source) -> int:
        """``Artifact.nbytes`` of what ``write`` would make: graph, header and tokenizer are made
        as for writing, without a weight being read.

        Raises:
            CheckpointError: no tokenizer, where it is part of the file.
            UnsupportedModelError: a tokenizer that the target cannot express.
            RuntimeMissingError: what writes the format is not installed.
        """
        ...

    def write(self, plan: Plan, weights: Weights, folder: Path, progress: Progress) -> Artifact:
        """Write the artifact into ``folder``, streaming.

        ``folder`` is in a ``.partial`` work folder of the caller, who renames it when all is well.
        It exists, and is empty or what an earlier call left there that was cut off: tensors in
        ``weights.ledger`` are in it. Calls ``progress(done_bytes, total_bytes)`` as it goes.
        """
        ...

    def writing_memory(self, plan: Plan) -> int:
        """Bytes that ``write`` holds at most, libraries included, beside what ``Weights`` does."""
        ...

    def open_runtime(self, path: Path, *, context: int, threads: int = 0) -> Runtime:
        """Load a written artifact in the runtime that will execute it.

        Args:
            path: the artifact as ``Artifact.path`` names it (file or folder).
            context: positions to make room for.
            threads: 0 for the CPUs that the process may use.

        Raises:
            ArtifactError: unreadable, or refused by the runtime.
            RuntimeMissingError: the runtime is not installed.
        """
        ...

    def describe(self, path: Path) -> dict[str, Any]:
        """What ``packlight inspect`` shows of an artifact: metadata and tensors, no weights read.

        Keys: ``format``, ``type`` (only where the file names one), ``name``, ``architecture``,
        ``parameters`` (None when unknown), ``bytes``, ``bits_per_weight``, ``kv_bytes_per_value``,
        ``context`` (positions that the file itself holds; 0 where only the model sets a limit),
        ``config`` (as ``config.json``, at least the sizes; empty when unknown), ``metadata`` (str
        → printable), ``tensors`` (list of name, shape, grid, bytes).
        """
        ...
