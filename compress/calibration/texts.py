"""Reads calibration texts and cuts them into windows of token ids."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from compress.checkpoint.checkpoint import Checkpoint
from compress.decoder.tokenizer import VOCABULARIES, Tokenizer
from compress.errors import CheckpointError, UsageError
from compress.files import read_corpus
from compress.formats import FORMATS

__all__ = ["BUILTIN", "BUILTIN_PATHS", "CalibrationSet"]

BUILTIN = "builtin"
# The built-in set mixes English prose, chat turns, source code, numbers and tables, and nineteen
# other languages: statistics of one domain (only an encyclopedia, only code) hurt the others.
# README.md in their folder describes them. UTF-8; ``.jsonl`` has one conversation per line.
FILES = ("prose.txt", "chat.jsonl", "code.txt", "numbers.txt", "languages.txt")
BUILTIN_PATHS = [Path(__file__).with_name("builtin") / name for name in FILES]


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
        """SHA-256 of the windows: identifies texts, tokenizer and sampling."""
        return hashlib.sha256(json.dumps(self.windows).encode()).hexdigest()

    def first(self, tokens: int) -> CalibrationSet:
        """The first windows, up to ``tokens`` tokens, at least one."""
        return replace(self, windows=self.windows[: max(1, tokens // len(self.windows[0]))])

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
        """Draw windows from texts: equal parts of each source, and of each file of ``builtin``.

        Args:
            sources: ``builtin``, plain text files, or ``.jsonl`` files whose lines have a ``text``
                or chat ``messages``.
            tokens: how many to draw, rounded down to whole windows, at least one.
            sequence_length: of a window, including BOS where the tokenizer adds one.
            seed: of the order of passages.

            Returns fewer windows where the texts are shorter.

            Raises:
                UsageError: a text that is missing, not readable, or shorter than one window.
        """
        streams = []
        for source in sources:
            paths = BUILTIN_PATHS if source == BUILTIN else [Path(source)]
            parts = [windows_of(path, tokenizer, sequence_length, seed) for path in paths]
            stream = take_turns(parts)
            first = next(stream, None)
            if first is None:
                raise UsageError(
                    f"{source} does not fill one window of {sequence_length} tokens",
                    hint="a longer text, or --set calibration.sequence_length=128",
                )
            streams.append(chain([first], stream))
        count = max(1, tokens // sequence_length)
        mixed = streams[0] if len(streams) == 1 else take_turns(streams)
        windows = tuple(tuple(window) for window in islice(mixed, count))
        names = tuple(s if s == BUILTIN else Path(s).name for s in sources)
        return cls(windows, names)


def take_turns(streams: Sequence[Iterator[list[int]]]) -> Iterator[list[int]]:
    """Yield one item of each stream in turn, until all are empty."""
    waiting = list(streams)
    while waiting:
        for stream in list(waiting):
            item = next(stream, None)
            if item is None:
                waiting.remove(stream)
            else:
                yield item


def windows_of(path: Path, tokenizer: Tokenizer, length: int, seed: int) -> Iterator[list[int]]:
    """Windows of one file: its passages in shuffled order, joined and cut to length.

    Tokenizes lazily. An incomplete last window is dropped.
    """
    passages = read_passages(path, tokenizer, characters=4 * length)
    random.Random(seed).shuffle(passages)
    head = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    body = length - len(head)
    pending: list[int] = []
    for passage in passages:
        ids = tokenizer.encode(passage)
        if head and ids[:1] == head:  # a chat template adds its own special tokens
            ids = ids[1:]
        pending += ids
        while len(pending) >= body:
            yield [*head, *pending[:body]]
            pending = pending[body:]


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint without a tokenizer, before a build that needs texts.

    Raises:
        CheckpointError: no tokenizer.
    """
    if not checkpoint.has_tokenizer:
        without = [f"-f {row.name}" for row in FORMATS.values() if not row.tokenizer_inside]
        raise CheckpointError(
            f"no tokenizer in {checkpoint.path}: texts to calibrate and verify on cannot be read",
            hint=f"one of {', '.join(VOCABULARIES)}; or -r int4-fast --no-verify, which reads no "
            f"text, with {' or '.join(without)}",
        )


def read_words(path: Path, missing: str, empty: str) -> str:
    """Read a user's text file.

    Args:
        path: UTF-8.
        missing, empty: hints for a missing or empty file.

    Raises:
        UsageError: missing, not UTF-8, or empty.
    """
    try:
        text = read_corpus(path)
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist", hint=missing) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text, see byte {error.start}") from error
    if not text.strip():
        raise UsageError(f"{path} is empty", hint=empty)
    return text


def read_passages(path: Path, tokenizer: Tokenizer, characters: int) -> list[str]:
    """Split a plain text into passages of whole lines, each at least ``characters`` long; or read
    the lines of a JSONL file as passages.

    Raises:
        UsageError: missing, not UTF-8, empty, or a line without ``text`` and ``messages``.
    """
    text = read_words(
        path,
        "calibration texts are .txt or .jsonl files, or builtin",
        "a few hundred KB of the model's kind of text",
    )
    if path.suffix == ".jsonl":
        rows = enumerate(text.split("\n"), start=1)  # not splitlines: JSON may hold a U+2028
        chats = tokenizer if tokenizer.has_chat_template else None
        return [read_row(f"{path} line {n}", row, chats) for n, row in rows if row.strip()]
    passages, piece, size = [], [], 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= characters:
            passages.append("".join(piece))
            piece, size = [], 0
    return [*passages, "".join(piece)]


def read_row(where: str, row: str, tokenizer: Tokenizer | None) -> str:
    """The text of one JSONL line; a chat is rendered with the tokenizer's template, if any.

    Raises:
        UsageError: not an object with ``text`` or ``messages``.
        CheckpointError: the template refuses the chat.
    """
    try:
        record = json.loads(row)
        if "messages" not in record:
            return checked(record["text"])
        messages = [
            {"role": checked(turn["role"]), "content": checked(turn["content"])}
            for turn in record["messages"]
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{where} is not a calibration text",
            hint='one JSON object a line: {"text": "..."} or {"messages": [{"role": "user", '
            '"content": "..."}]}',
        ) from error
    if tokenizer is not None:
        try:
            return tokenizer.render_chat(messages, add_generation_prompt=False)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error.message}", error.hint) from error
    return "".join(f"{turn['role'].capitalize()}: {turn['content']}\n" for turn in messages)


def checked(value: Any) -> str:
    """The value if it is a string; anything else (null, a list of parts) is a TypeError."""
    if not isinstance(value, str):
        raise TypeError(value)
    return value
