"""Calibration: texts become windows of tokens, the windows walk through the blocks, and every
linear's input leaves its statistics behind (``compress.statistics``).

The walk holds one block's weights and the hidden states of all windows, in bfloat16; above
``STATES_LIMIT`` the states live in a memory-mapped file. Blocks see what the float model's previous
blocks produce.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.arch import DecoderConfig, split_name
from compress.errors import UsageError
from compress.statistics import (
    Float32,
    LayerStats,
    Statistics,
    file_name,
    input_of,
    save,
    stored_block,
)
from compress.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

BUILTIN = "builtin"
STATES_LIMIT = 1 << 29  # bytes of hidden states in memory: 512 MiB
WIDEST_HESSIAN = 8192  # columns; wider inputs are split into diagonal blocks (268 MB each)
HELD_BACK = 16  # of so many windows one is kept out of the Hessian, to measure solvers on ...
HELD_ROWS = 1024  # ... or of more, where that would be more tokens than these
LAYOUT = 2  # of the cache; part of its key


# --- texts to windows -------------------------------------------------------------------------


@dataclass(frozen=True)
class CalibrationSet:
    """Windows of token ids to calibrate on.

    Attributes:
        windows: all of the same length.
        sources: names of the texts, for the report: ``builtin`` or file names.
    """

    windows: tuple[tuple[int, ...], ...]
    sources: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return sum(map(len, self.windows))

    def digest(self) -> str:
        """SHA-256 of the windows: names texts, tokenizer and sampling at once."""
        return hashlib.sha256(json.dumps(self.windows).encode()).hexdigest()

    @classmethod
    def load(
        cls,
        sources: Sequence[str],
        tokenizer: Tokenizer,
        *,
        tokens: int,
        sequence_length: int,
        seed: int,
    ) -> CalibrationSet:
        """Draw windows from texts: sources in equal parts, and the files of ``builtin`` too.

        Args:
            sources: ``builtin``, plain text files, or ``.jsonl`` files whose lines have a ``text``
                or chat ``messages``.
            tokens: how many to draw, rounded down to whole windows, at least one.
            sequence_length: of a window, a BOS included where the tokenizer adds one.
            seed: of the order of passages.

        Fewer windows come back where the texts are shorter.

        Raises:
            UsageError: a text that is not there, not readable, or shorter than one window.
        """
        streams = []
        for source in sources:
            paths = builtin_paths() if source == BUILTIN else [Path(source)]
            parts = [windows_of(path, tokenizer, sequence_length, seed) for path in paths]
            streams.append(take_turns(parts))
        count = max(1, tokens // sequence_length)
        windows = []
        for window, _ in zip(take_turns(streams), range(count), strict=False):
            windows.append(tuple(window))
        if not windows:
            raise UsageError(
                f"the calibration texts do not fill one window of {sequence_length} tokens",
                hint="longer texts, or --set calibration.sequence_length=128",
            )
        names = tuple(s if s == BUILTIN else Path(s).name for s in sources)
        return cls(tuple(windows), names)


def builtin_paths() -> list[Path]:
    """The files of the built-in set."""
    from compress.calibration_texts import paths

    return paths()


def take_turns(streams: Sequence[Iterator[list[int]]]) -> Iterator[list[int]]:
    """One from each in turn, as long as any has one."""
    waiting = list(streams)
    while waiting:
        for stream in list(waiting):
            item = next(stream, None)
            if item is None:
                waiting.remove(stream)
            else:
                yield item


def windows_of(path: Path, tokenizer: Tokenizer, length: int, seed: int) -> Iterator[list[int]]:
    """Windows of one file: its passages in shuffled order, one after the other, cut to length.

    Tokenizes no more than is asked for. An incomplete last window is dropped.
    """
    passages = read_passages(path, tokenizer, characters=4 * length)
    random.Random(seed).shuffle(passages)
    head = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    body = length - len(head)
    pending: list[int] = []
    for passage in passages:
        ids = tokenizer.encode(passage)
        if head and ids[:1] == head:  # a chat template writes its own
            ids = ids[1:]
        pending += ids
        while len(pending) >= body:
            yield [*head, *pending[:body]]
            pending = pending[body:]


def read_passages(path: Path, tokenizer: Tokenizer, characters: int) -> list[str]:
    """A plain text in pieces of whole lines, each at least ``characters`` long; or the lines of a
    JSONL file as texts.

    Raises:
        UsageError: not there, not UTF-8, or a line without ``text`` and ``messages``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(
            f"{path} does not exist", hint="calibration texts are .txt or .jsonl files, or builtin"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if path.suffix == ".jsonl":
        rows = enumerate(text.splitlines(), start=1)
        return [read_row(f"{path} line {n}", row, tokenizer) for n, row in rows if row.strip()]
    passages, piece, size = [], [], 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= characters:
            passages.append("".join(piece))
            piece, size = [], 0
    return [*passages, "".join(piece)]


def read_row(where: str, row: str, tokenizer: Tokenizer) -> str:
    """The text of one JSONL line; a chat through the tokenizer's template, or plainly without one.

    Raises:
        UsageError: not an object with ``text`` or ``messages``.
        CheckpointError: the template refuses the chat.
    """
    try:
        record = json.loads(row)
        if "messages" not in record:
            return str(record["text"])
        messages = [
            {"role": str(turn["role"]), "content": str(turn["content"])}
            for turn in record["messages"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{where} is not a calibration text",
            hint='one JSON object a line: {"text": "..."} or {"messages": [{"role": "user", '
            '"content": "..."}]}',
        ) from error
    if tokenizer.has_chat_template:
        return tokenizer.render_chat(messages, add_generation_prompt=False)
    return "".join(f"{turn['role'].capitalize()}: {turn['content']}\n" for turn in messages)


# --- windows through the blocks ---------------------------------------------------------------


class Accumulator:
    """Running sums over the rows of one input."""

    def __init__(self, columns: int, *, hessian: bool) -> None:
        import torch

        self.count = 0
        self.hessian_count = 0
        self.held_back: list[Tensor] = []
        self.sums = torch.zeros(columns, dtype=torch.float64)
        self.squares = torch.zeros(columns, dtype=torch.float64)
        self.spans = hessian_spans(columns) if hessian else []
        self.products = [torch.zeros(s.stop - s.start, s.stop - s.start) for s in self.spans]

    def add(self, x: Tensor, *, hold_back: bool) -> None:
        """Rows ``[n, columns]`` of the input; those held back are not for the Hessian."""
        self.count += x.shape[0]
        self.sums += x.sum(0)
        self.squares += (x * x).sum(0)
        if hold_back and self.spans:
            self.held_back.append(x.clone())
            return
        self.hessian_count += x.shape[0]
        for span, product in zip(self.spans, self.products, strict=True):
            part = x[:, span]
            product.addmm_(part.T, part)

    def finish(self) -> LayerStats:
        """The means."""

        import torch

        def mean(total: Tensor, count: int) -> Float32:
            values: Float32 = (total / count).float().numpy()
            return values

        return LayerStats(
            count=self.count,
            importance=mean(self.squares, self.count),
            mean=mean(self.sums, self.count),
            hessian=tuple(mean(p, self.hessian_count) for p in self.products) or None,
            held_back=torch.cat(self.held_back).float().numpy() if self.held_back else None,
        )


def hessian_spans(columns: int) -> list[slice]:
    """Diagonal blocks of a Hessian: equal, of whole 256s, none wider than ``WIDEST_HESSIAN``."""
    count = math.ceil(columns / WIDEST_HESSIAN)
    width = columns if count == 1 else 256 * math.ceil(columns / count / 256)
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


def walk(
    config: DecoderConfig,
    read: Callable[[str], Float32],
    windows: Sequence[Sequence[int]],
    *,
    hessian: bool,
    exact: bool = False,
    work: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[dict[str, LayerStats]]:
    """All windows through one block after the other.

    Args:
        config: the model.
        read: weights by name, float32.
        windows: token ids, all of the same length.
        hessian: also the means of ``x xᵀ``.
        exact: hidden states in float32 instead of bfloat16.
        work: folder for the file that holds states beyond ``STATES_LIMIT``.
        progress: ``progress(done, total)`` in windows times blocks.

    Yields the statistics of each stored block by input name, and at last those of ``lm_head``.
    """
    import torch

    from compress.decoder import Decoder, as_tensor, normalize

    decoder = Decoder(config, read)
    rope = decoder.rope(len(windows[0]))
    dtype = torch.float32 if exact else torch.bfloat16
    states = hidden_states(decoder.embed(windows), dtype, work)
    sums: dict[str, Accumulator] = {}

    every = max(HELD_BACK, math.ceil(len(windows) * len(windows[0]) / HELD_ROWS))

    def listen(name: str, x: Tensor, position: int) -> None:
        key = input_of(config, name)
        # Linears of one input come with the same x; the first speaks for all.
        if key is None or key.rpartition(".")[2] != split_name(name)[1]:
            return
        if key not in sums:
            sums[key] = Accumulator(x.shape[1], hessian=hessian)
        sums[key].add(x, hold_back=position % every == every - 1)

    def finish() -> dict[str, LayerStats]:
        done = {key: entry.finish() for key, entry in sums.items()}
        sums.clear()
        return done

    total = len(windows) * (config.num_hidden_layers + 1)
    for index in range(config.num_hidden_layers):
        if sums and stored_block(config, index) == index:
            yield finish()
        block = decoder.block(index)
        for position in range(len(windows)):
            heard = partial(listen, position=position)
            states[position] = block(states[position].float(), rope, on_input=heard)
            progress(index * len(windows) + position + 1, total)
        del block
    yield finish()
    norm = as_tensor(read("norm.weight"))
    bias = as_tensor(read("norm.bias")) if config.has_bias("norm") else None
    for position in range(len(windows)):
        final = normalize(config, states[position].float(), norm, bias)
        listen("lm_head.weight", final, position)
        progress(total - len(windows) + position + 1, total)
    yield finish()


def hidden_states(embedded: Sequence[Tensor], dtype: Any, work: Path | None) -> Tensor:
    """The states of all windows, ``[windows, length, hidden]``, mapped to a file when large."""
    import torch

    shape = (len(embedded), *embedded[0].shape)
    size = math.prod(shape)
    if work is not None and size * dtype.itemsize > STATES_LIMIT:
        path = str(work / "states.bin")
        states = torch.from_file(path, shared=True, size=size, dtype=dtype).view(shape)
    else:
        states = torch.empty(shape, dtype=dtype)
    for position, hidden in enumerate(embedded):
        states[position] = hidden
    return states


# --- and kept ---------------------------------------------------------------------------------


def collect(
    config: DecoderConfig,
    read: Callable[[str], Float32],
    calibration: CalibrationSet,
    *,
    fingerprint: str,
    hessian: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Statistics:
    """Statistics from the cache, or from a walk whose statistics then stand in the cache.

    Args:
        config: the model.
        read: weights by name, float32.
        calibration: windows.
        fingerprint: of the checkpoint (``Checkpoint.fingerprint``).
        hessian: whether Hessians are wanted; statistics that have them serve without, too.
        progress: of the walk.
    """
    place = cache_folder()
    key = hashlib.sha256(f"{LAYOUT} {fingerprint} {calibration.digest()}".encode()).hexdigest()[:16]
    full, light = place / f"{key}-hessian", place / key
    for folder in (full,) if hessian else (light, full):
        if folder.is_dir():
            return Statistics.open(config, folder, hessian=hessian)
    final = full if hessian else light
    with tempfile.TemporaryDirectory(dir=place, prefix=f"{final.name}.partial-") as work:
        folder = Path(work) / "statistics"
        folder.mkdir()
        blocks = walk(
            config, read, calibration.windows, hessian=hessian, work=Path(work), progress=progress
        )
        for stats in blocks:
            save(folder / file_name(next(iter(stats))), stats)
        try:
            folder.rename(final)
        except OSError:  # another build was faster, with the same
            if not final.is_dir():
                raise
    if hessian:  # they serve both, so the lesser ones may go
        shutil.rmtree(light, ignore_errors=True)
    return Statistics.open(config, final, hessian=hessian)


def cache_folder() -> Path:
    """Where statistics are kept: ``PACKLIGHT_CACHE``, or below the Hub's assets.

    Raises:
        UsageError: not writable.
    """
    from huggingface_hub import cached_assets_path

    chosen = os.environ.get("PACKLIGHT_CACHE")
    try:
        if not chosen:
            return Path(cached_assets_path("packlight", namespace="calibration"))
        folder = Path(chosen) / "calibration"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except OSError as error:
        raise UsageError(
            f"cannot write to {error.filename}: {error.strerror}",
            hint="set PACKLIGHT_CACHE to a folder for statistics",
        ) from error
