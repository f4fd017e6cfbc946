"""Whether an artifact tokenizes as the checkpoint does: the same texts through both, exactly.

A language model is given tokens, so verification feeds it token ids; whoever uses the artifact has
it make them of a text. Where the tokenizer is inside the file, its runtime is asked; else
transformers, with the tokenizer's files beside the artifact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.decoder.tokenizer import Tokenizer, has_tokenizer

TEXTS_FILE = "texts.json"  # in the folder of the float model's answers, for the child

Encode = Callable[[str, bool], Sequence[int]]
"""Token ids of a text, without or with what the tokenizer puts around it."""

Ids = Sequence[Sequence[int]]
"""Of each text, without and with what the tokenizer puts around it."""


@dataclass(frozen=True)
class Difference:
    """One text that the artifact tokenizes otherwise.

    Attributes:
        text: given to both.
        add_special: whether with what the tokenizer puts around a text.
        expected: ids by Hugging Face, of the checkpoint.
        found: ids by the artifact.
    """

    text: str
    add_special: bool
    expected: tuple[int, ...]
    found: tuple[int, ...]


@dataclass(frozen=True)
class Agreement:
    """How many texts have the same ids.

    Attributes:
        texts: compared.
        differing: with other ids, without or with BOS and EOS.
        first: of those.
    """

    texts: int
    differing: int
    first: Difference | None

    @property
    def share(self) -> float:
        """Of texts with the same ids."""
        return 1 - self.differing / self.texts


def encode_all(encode: Encode, texts: Sequence[str]) -> Ids:
    """``encode(text, add_special)`` of each text, without and with special tokens around it."""
    return [list(encode(text, special)) for text in texts for special in (False, True)]


def compare(texts: Sequence[str], expected: Ids, found: Ids) -> Agreement:
    """Hold two results of ``encode_all`` against each other."""
    cases = [(text, special) for text in texts for special in (False, True)]
    differing = [
        Difference(*case, tuple(ours), tuple(theirs))
        for case, ours, theirs in zip(cases, expected, found, strict=True)
        if list(ours) != list(theirs)
    ]
    count = len({difference.text for difference in differing})
    return Agreement(len(texts), count, differing[0] if differing else None)


def save_texts(folder: Path, texts: Sequence[str]) -> None:
    """For the child process."""
    (folder / TEXTS_FILE).write_text(json.dumps(list(texts)), encoding="utf-8")


def load_texts(folder: Path) -> list[str]:
    """What ``save_texts`` left, or none."""
    path = folder / TEXTS_FILE
    found: list[str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return found


def tokenizer_beside(artifact: Path, rows: int | None) -> Tokenizer | None:
    """The tokenizer in an artifact's folder or the one around it.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    folder = next((f for f in (artifact, artifact.parent) if has_tokenizer(f)), None)
    return Tokenizer(folder, rows) if folder else None
