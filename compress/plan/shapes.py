"""Types shared by the packages and the formats: Plan, Writer, Artifact, Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compress.decoder.config import DecoderConfig, split_name
from compress.errors import UsageError
from compress.grids import get_grid
from compress.grids.affine import Affine
from compress.grids.palette import Palette

if TYPE_CHECKING:
    from compress.decoder.tokenizer_facts import TokenizerFacts
    from compress.plan.weights import Weights


@dataclass(frozen=True)
class PlanEntry:
    """One tensor of the artifact.

    Attributes:
        name: packlight's name of the weight (``blocks.3.q_proj.weight``, ``embed_tokens.weight``,
            ``blocks.3.qkv_proj.weight``), by which ``Weights`` reads it. Computed tables are
            ``rope.…``; empty in an artifact that was read back, which has only target names.
        target_name: the name in the artifact (``blk.3.attn_qkv.weight``).
        grid: the grid's name; ``F32``/``F16`` for what stays float.
        shape: ``[rows, columns]``, or one-dimensional for norms and biases.
        nbytes: bytes in the file, without alignment.
        note: why this grid, when it is not the requested one (shown in the report).
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
        type_name: as in file names and tables: ``Q4_K_M``, ``int4-g32``, ``lut4-g8``,
            ``mix-3.92bpw`` where each tensor's grid was chosen (``mix_name``).
        model_name: base of the file names, safe on every file system.
        entries: in the order of writing.
        settings: the recipe's target settings that the writer needs again.
        notes: lines for the report (fallbacks, caveats such as an ignored sliding window).
        max_context: positions up to which the artifact agrees with the float model.
        kv_bytes_per_value: of the KV cache as the runtime holds it: 2 for float16.
        file_bytes: predicted bytes of the model files; 0 where not computed.
        folded: scalars of the model that the target has inside its weights
            (``compress.checkpoint.scalars``).
        expected_divergence: KL from the float model that a cost table predicts, nats per token.
        doubt: why nobody should want it, in a line; ``--force`` builds it anyway.
        weights_outside: the system holds the weights outside an app's memory, as it does for the
            Neural Engine.

    Example:
        >>> entry = PlanEntry("lm_head.weight", "output.weight", "Q6_K", (512, 256), 107520)
        >>> Plan("gguf", "Q4_K_M", "tiny", (entry,)).weights_bytes
        107520
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
    folded: frozenset[str] = frozenset()
    expected_divergence: float | None = None
    doubt: str = ""
    weights_outside: bool = False

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries)

    def by_part(self, config: DecoderConfig) -> dict[int, list[PlanEntry]]:
        """The entries of each part of the model: 0 the embedding, then the stored blocks, last the
        final norm and head. A computed table belongs to the part of the entry before it."""
        parts: dict[int, list[PlanEntry]] = {}
        part = 0
        for entry in self.entries:
            block, role, _ = split_name(entry.name) if entry.name else (None, "", "")
            if block is not None:
                part = 1 + block // config.block_repeat
            elif role in ("norm", "lm_head"):
                part = 1 + config.num_hidden_layers
            parts.setdefault(part, []).append(entry)
        return parts


def bits_per_weight(nbytes: int, weights: int | None) -> float:
    """``nbytes`` as bits per weight; 0 where the number of weights is not known."""
    return nbytes * 8 / weights if weights else 0.0


def mix_name(entries: Sequence[PlanEntry], config: DecoderConfig) -> str:
    """``Plan.type_name`` of a mix, with its bits per weight: ``mix-3.92bpw``."""
    bits = bits_per_weight(sum(entry.nbytes for entry in entries), config.num_parameters)
    return f"mix-{bits:.2f}bpw"


TIED_ERROR = 0.4
"""Share of the KL divergence that comes from a tied matrix where every matrix has 4 bits. Measured
on SmolLM2-135M, int4-g32: 0.39, also with its weights moved off the grid of their source."""


def tied_bits(config: DecoderConfig, bits: int) -> int:
    """Bits of an embedding that is the head, too, where the recipe names none.

    Its error acts twice, on the input and on the logits. 8 bits instead of ``bits`` remove more of
    the error per byte there than in other matrices, unless it is a larger share of the weights than
    of the error (small models with a large vocabulary).
    """
    share = config.vocab_size * config.hidden_size / config.num_parameters
    return max(bits, 8) if config.tie_word_embeddings and share < TIED_ERROR else bits


def fitting_grid(asked: str, shape: tuple[int, int]) -> str:
    """The wanted grid, or that with the next smaller groups that divide the tensor.

    Where no smaller group does: one scale or palette per row.
    """
    grid = get_grid(asked)
    if isinstance(grid, Palette):
        size = grid.rows
        while size and shape[0] % size:
            size //= 2
        return replace(grid, rows=size).name
    if isinstance(grid, Affine):
        size = grid.group_size
        while size and shape[1] % size:
            size = size // 2 if size > 16 else 0
        return replace(grid, group_size=size).name
    return asked


def value_bits(config: DecoderConfig, bits: int) -> int:
    """Bits of ``v_proj`` where the recipe names none: 8 instead of ``bits`` where several query
    heads share a value head.

    The matrix is small there, and all of them have its error. SmolLM2-135M (9 query heads, 3 of
    keys and values; weights moved off the grid of their source), int4-g32: 0.10 more bits per
    weight take a quarter off the KL divergence (0.269, 0.201).
    """
    return max(bits, 8) if config.num_key_value_heads < config.num_attention_heads else bits


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


@dataclass(frozen=True)
class PlanRequest:
    """Arguments of a format's ``plan``.

    Attributes:
        settings: the recipe's ``targets.<format>``, validated.
        model_name: base of the file names.
        choices: entry name → grid, for entries with another grid than the settings'; the plan's
            type name is then ``mix_name``.
        context: positions of the KV cache, where one was given.
        importance: whether the solver uses input statistics.
        tokenizer: the checkpoint's, for formats that store it; None: planned without.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    model_name: str = "model"
    choices: Mapping[str, str] = field(default_factory=dict)
    context: int | None = None
    importance: bool = False
    tokenizer: TokenizerFacts | None = None


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

        Empties the KV cache first. The array belongs to the caller.

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


class RewindingRuntime(Runtime, Protocol):
    """A runtime whose KV cache can be cut back: sequences that begin alike share that beginning."""

    def extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """``feed`` with the logits at every new position, float32 ``[len(tokens), vocab]``."""
        ...

    def rewind(self, length: int) -> int:
        """Keep the first ``length`` positions of the KV cache, at most those that it holds.

        Returns:
            The positions kept: 0 where this model's cache can only be emptied.
        """
        ...


def check_room(used: int, count: int, room: int) -> None:
    """Raise the error of every runtime for no tokens, or more than its context holds.

    Args:
        used: positions in the cache.
        count: tokens to append.
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


Written = Callable[[int], None]
"""``written(nbytes)``: called as tensors are written, with the number of new bytes."""


class Writer(Protocol):
    """Writes one artifact; ``compress.build.write`` passes it the tensors one by one.

    ``Writer(plan, weights, folder, written)`` begins the files in ``folder``, inside the caller's
    ``.partial`` work folder. The folder is empty, or holds the files of an interrupted writer with
    the tensors that are in ``weights.ledger``. ``written(nbytes)`` is called as bytes of tensors
    are written.

    Attributes:
        plan: of the artifact.
        weights: source of its tensors.
        file: the file that holds the tensors.
    """

    plan: Plan
    weights: Weights
    file: Path

    def put(self, entry: PlanEntry) -> int:
        """Write one tensor of the plan; returns the offset of its end in ``file``.

        Called in the order of the plan; only some rows of a tensor are in memory at a time.

        Raises:
            CheckpointError: weights that cannot be read.
            GridError: values that a grid cannot hold.
            DiskFullError: no room.
        """
        ...

    def close(self) -> Artifact:
        """After the last tensor: write the remaining files and return the artifact."""
        ...
