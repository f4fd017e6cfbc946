"""The checkpoint's tokenizer, as Hugging Face loads it, and the windows that verification scores.

Loaded offline and without remote code. ``transformers`` is imported when a tokenizer is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from compress.decoder.chat import ChatTemplate
from compress.errors import CheckpointError, UsageError, one_line
from compress.machine import change_setting

Messages = Sequence[Mapping[str, str]]
"""A chat: ``[{"role": "user", "content": "..."}, ...]``."""


class Tokenizer:
    """Text ↔ token ids.

    Attributes:
        hf: the transformers tokenizer underneath.
    """

    def __init__(self, path: str | Path) -> None:
        """Load the tokenizer of a checkpoint folder.

        Raises:
            CheckpointError: no tokenizer files, damaged ones, or one that needs remote code.
        """
        from transformers import AutoTokenizer
        from transformers.utils import logging

        # Its warnings are advice to programmers, of no use to a command line.
        verbosity = logging.get_verbosity, logging.set_verbosity
        change_setting("transformers' verbosity", *verbosity, logging.ERROR)
        folder = Path(path)
        if not has_tokenizer(folder):
            raise CheckpointError(
                f"no tokenizer in {folder}",
                hint=f"expected one of {', '.join(VOCABULARIES)}",
            )
        try:
            self.hf: Any = AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # tokenizers raises bare Exception for damaged files
            if "trust_remote_code" in str(error):
                raise CheckpointError(
                    "the tokenizer needs the checkpoint's own code, which packlight never executes"
                ) from error
            raise CheckpointError(f"the tokenizer cannot be loaded: {one_line(error)}") from error

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids. ``add_special``: with what the tokenizer puts around a text (often BOS).

        Special tokens written out in the text (``<|end|>``) become their ids either way.
        """
        # verbose=False: no warning about texts longer than the model's context.
        return list(self.hf.encode(text, add_special_tokens=add_special, verbose=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens included, without clean-up of spaces."""
        text: str = self.hf.decode(list(tokens), clean_up_tokenization_spaces=False)
        return text

    def to_json(self) -> str:
        """The text of ``tokenizer.json``, also where the folder has only older files.

        Raises:
            CheckpointError: transformers has no fast form of this tokenizer.
        """
        backend = getattr(self.hf, "backend_tokenizer", None)
        if backend is None:
            raise CheckpointError("the tokenizer cannot be written as tokenizer.json")
        text: str = backend.to_str(pretty=True)
        return text

    @property
    def bos_id(self) -> int | None:
        """The beginning-of-sequence id, whether or not the tokenizer adds it by itself."""
        token: int | None = self.hf.bos_token_id
        return token

    @cached_property
    def adds_bos(self) -> bool:
        """Whether ``encode(..., add_special=True)`` starts with ``bos_id``."""
        return self.bos_id is not None and self.encode("a", add_special=True)[0] == self.bos_id

    @property
    def has_chat_template(self) -> bool:
        """Whether ``render_chat`` can work: base models have no template."""
        return bool(self.hf.chat_template)

    def render_chat(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """The chat as the model was trained to see it, ready for ``encode(text)``.

        The template writes its own BOS where the model wants one. One that asks for the date gets
        that of ``chat_server.DATE``: a build has the same bytes tomorrow.

        Raises:
            CheckpointError: no chat template, or one that fails on these messages.
        """
        if not self.hf.chat_template:
            raise CheckpointError("the tokenizer has no chat template")
        return self._chat_template.render(messages, add_generation_prompt=add_generation_prompt)

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        try:
            template = self.hf.get_chat_template()
        except Exception as error:  # several, none of them the default one
            raise CheckpointError(f"no chat template to use: {one_line(error)}") from error
        if not isinstance(template, str):
            raise CheckpointError("the chat template is not a text")
        return ChatTemplate(template, self.hf.special_tokens_map)


MARGIN = 64  # tokens before a cut that the cut may have changed

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint folder has a vocabulary at all."""
    return any((folder / name).exists() for name in VOCABULARIES)


def eval_windows(text: str, tokenizer: Tokenizer, length: int, count: int) -> list[list[int]]:
    """The first ``count`` windows of a text, each exactly ``length`` ids long.

    The text is encoded without special tokens and cut into contiguous, non-overlapping pieces; an
    incomplete last piece is dropped. If the tokenizer puts a BOS before a text, then so does every
    window, and a piece is ``length - 1`` ids of the text; otherwise a piece is ``length`` ids.
    Scoring starts at the second id of a window, so every piece with BOS is scored whole. Fewer
    windows come back when the text is shorter than ``count`` of them.

    Raises:
        UsageError: the text does not fill one window, or ``length`` or ``count`` is too small.
    """
    if length < 2 or count < 1:
        raise UsageError(f"cannot score {count} window(s) of {length} token(s)")
    head = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    body = length - len(head)
    # A text of gigabytes is not encoded to the end: no tokenizer takes 16 characters a token on
    # average. The last tokens before the cut may be others than in the whole text: not used.
    start = text[: 16 * (body * count + MARGIN)]
    tokens = tokenizer.encode(start)
    if len(start) < len(text) and len(tokens) < body * count + MARGIN:
        tokens = tokenizer.encode(text)
    if len(tokens) < body:
        raise UsageError(
            f"the evaluation text has {len(tokens)} tokens, a window needs {body}",
            hint="a longer --eval-text, or shorter windows (verify.sequence_length)",
        )
    starts = range(0, len(tokens) - body + 1, body)[:count]
    return [[*head, *tokens[start : start + body]] for start in starts]
