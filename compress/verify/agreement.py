"""Compares an artifact's tokenizer with the checkpoint's: the ids of the same texts must be equal.

Verification feeds token ids, but users of the artifact give it text. Where the tokenizer is inside
the file, the runtime tokenizes; else transformers does, with the tokenizer files beside the
artifact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.decoder.tokenizer import Tokenizer, has_tokenizer

TEXTS_FILE = "texts.json"  # in the baseline's folder, for the child

Encode = Callable[[str, bool], Sequence[int]]
"""``encode(text, add_special)`` → token ids, without or with special tokens such as BOS."""

Ids = Sequence[Sequence[int]]
"""Token ids of each text, without and with special tokens such as BOS."""


@dataclass(frozen=True)
class Difference:
    """One text that the artifact tokenizes differently.

    Attributes:
        text: given to both.
        add_special: whether with special tokens such as BOS.
        expected: ids of the checkpoint's tokenizer in transformers.
        found: ids of the artifact's tokenizer.
    """

    text: str
    add_special: bool
    expected: tuple[int, ...]
    found: tuple[int, ...]


@dataclass(frozen=True)
class Agreement:
    """The number of texts with the same ids in both tokenizers.

    Attributes:
        texts: texts compared.
        differing: texts with other ids, without or with special tokens.
        first: the first of those.
    """

    texts: int
    differing: int
    first: Difference | None

    @property
    def share(self) -> float:
        """The share of texts with the same ids."""
        return 1 - self.differing / self.texts


def encode_all(encode: Encode, texts: Sequence[str]) -> Ids:
    """``encode(text, add_special)`` of each text, without and with special tokens around it."""
    return [list(encode(text, special)) for text in texts for special in (False, True)]


def compare(texts: Sequence[str], expected: Ids, found: Ids) -> Agreement:
    """Compare two results of ``encode_all``."""
    cases = [(text, special) for text in texts for special in (False, True)]
    differing = [
        Difference(*case, tuple(ours), tuple(theirs))
        for case, ours, theirs in zip(cases, expected, found, strict=True)
        if list(ours) != list(theirs)
    ]
    count = len({difference.text for difference in differing})
    return Agreement(len(texts), count, differing[0] if differing else None)


def save_texts(folder: Path, texts: Sequence[str]) -> None:
    """Write the texts for the child process."""
    (folder / TEXTS_FILE).write_text(json.dumps(list(texts)), encoding="utf-8")


def load_texts(folder: Path) -> list[str]:
    """The texts of ``save_texts``; empty where there are none."""
    path = folder / TEXTS_FILE
    found: list[str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return found


def tokenizer_beside(artifact: Path, rows: int | None) -> Tokenizer | None:
    """The tokenizer in an artifact's folder, in its ``tokenizer`` folder or in its parent folder.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    places = (artifact, artifact / "tokenizer", artifact.parent)
    folder = next((place for place in places if has_tokenizer(place)), None)
    return Tokenizer(folder, rows) if folder else None
