"""Checks the files of a tokenizer before the library ``tokenizers`` loads them, which trusts them.

It lays out memory for every id up to the largest, its replacements can double a text forty times,
and it prints unknown keys of tokens as they are.
"""

from __future__ import annotations

import base64
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.decoder.config_json import json_or_empty, read_json, short
from compress.errors import CheckpointError
from compress.files import is_inside

MOST_IDS = 1 << 24  # real vocabularies have up to a million
MOST_GROWTH = 1 << 10  # bytes of text for one given byte; real tokenizers up to about a hundred
TOKEN_KEYS = {
    "__type", "content", "id", "lstrip", "normalized", "rstrip", "single_word", "special",
}  # fmt: skip
TOKEN_LISTS = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
# Settings that transformers' classes open as files, relative to the current folder, such as
# vocab_file; and those of such a name that nothing opens.
PATHS = re.compile(r".*(file|path|spm|vocab|inputs|kwargs).*")
NO_PATHS = ("special_tokens_map_file", "name_or_path")


def check_files(folder: Path) -> bool:
    """Check the vocabulary's ids, the steps before it, and the files that settings name.

    Returns:
        Whether a token has keys that the library would print.

    Raises:
        CheckpointError: no JSON, an id beyond ``MOST_IDS``, steps that make more of a text than
            ``MOST_GROWTH``, merges that are left out at random, or a file outside the folder.
    """
    name = "tokenizer.json" if (folder / "tokenizer.json").exists() else "vocab.json"
    document = read_json(folder / name) if (folder / name).exists() else {}
    model = document if name == "vocab.json" else document.get("model")
    vocabulary = model.get("vocab", model) if isinstance(model, dict) else None
    added = document.get("added_tokens")
    tokens = added if isinstance(added, list) else []
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [token.get("id") for token in tokens if isinstance(token, dict)]
    largest = max((index for index in ids if isinstance(index, int)), default=0)
    if largest >= MOST_IDS:
        raise CheckpointError(
            f"{name} has a token with the id {min(largest, 1 << 64):,}: damaged?",
            hint="ids count from 0; the largest that packlight reads is 16,777,215",
        )
    grows = math.prod(growth(document.get(key)) for key in ("normalizer", "pre_tokenizer"))
    if grows > MOST_GROWTH:
        raise CheckpointError(
            f"{name} replaces text by longer text so often that {MOST_GROWTH:,} bytes and more "
            "become of one"
        )
    dropout = model.get("dropout") if isinstance(model, dict) and name != "vocab.json" else None
    if dropout:
        raise CheckpointError(
            f"{name} leaves out merges at random (dropout {short(dropout)}): no text has the same "
            "ids twice",
            hint="that is for training: set dropout to null",
        )
    settings = json_or_empty(folder / "tokenizer_config.json")
    for key, value in settings.items():
        if not PATHS.fullmatch(key) or key in NO_PATHS:
            continue
        inside = value.values() if isinstance(value, dict) else value
        for path in inside if isinstance(value, dict | list) else [value]:
            if not isinstance(path, str) or "\0" in path or not os.path.exists(path):
                continue
            if not is_inside(os.path.realpath(folder), path):
                raise CheckpointError(
                    f"tokenizer_config.json: {short(key)} is {short(path)}, a file outside of the "
                    "checkpoint",
                    hint="it would be read and published; remove the key",
                )
    others = [settings, json_or_empty(folder / "special_tokens_map.json")]
    given = [tokens, *(found for other in others for found in stated(other))]
    return any(map(has_odd_token, given))


def stated(settings: Mapping[str, Any]) -> Iterator[Any]:
    """The tokens in ``tokenizer_config.json`` or ``special_tokens_map.json``: texts, objects, or
    lists and maps of them."""
    for key, value in settings.items():
        if key.endswith("_token"):
            yield [value]
        elif key in TOKEN_LISTS:
            yield list(value.values()) if isinstance(value, dict) else value


def has_odd_token(value: Any) -> bool:
    """Whether a list of tokens has an object with keys that the library does not know."""
    tokens = value if isinstance(value, list) else []
    return any(isinstance(token, dict) and not token.keys() <= TOKEN_KEYS for token in tokens)


def growth(step: Any) -> int:
    """The most bytes that a normalizer or pre-tokenizer makes of one byte, about."""
    if not isinstance(step, Mapping):
        return 1
    steps = step.get("normalizers") or step.get("pretokenizers")
    if isinstance(steps, list):
        return math.prod(map(growth, steps))
    kind, pattern = step.get("type"), step.get("pattern")
    size, content = 0, step.get("prepend" if kind == "Prepend" else "content")
    if isinstance(content, str):
        size = len(content.encode("utf-8", "replace"))
    if kind == "Replace" and isinstance(pattern, Mapping) and (given := pattern.get("String")):
        return max(1, -(-size // len(str(given).encode("utf-8", "replace"))))
    if kind in ("Prepend", "Replace"):  # a regular expression may match between any two bytes
        return 1 + size
    if kind == "Precompiled":
        try:
            table = base64.b64decode(str(step.get("precompiled_charsmap")))
        except ValueError:
            return 1
        texts = table[4 + int.from_bytes(table[:4], "little") :]
        return max(1, *map(len, texts.split(b"\0")))
    return 2 if kind == "ByteLevel" else 1


@contextmanager
def silence() -> Iterator[None]:
    """Discard what is written to standard output, also by libraries that are not Python."""
    sys.stdout.flush()
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)
