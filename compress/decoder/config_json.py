"""Reads JSON files and checks the values of a ``config.json``: the files are untrusted.

A missing key is a ``KeyError``, an impossible value a ``ValueError`` that says why; the caller that
reads the file turns both into one line (``DecoderConfig.from_hf``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import CheckpointError
from compress.files import read_bounded

Config = Mapping[str, Any]

LARGEST = 2**31 - 1


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: missing, not JSON, or not an object.
    """
    data = b""
    try:
        data = read_bounded(file)
        value = json.loads(data.decode("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file.name} is missing in {file.parent}",
            hint="a checkpoint folder holds config.json beside its weights",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        io = error.strerror if isinstance(error, OSError) else None
        what = f"not valid JSON, {error}" if isinstance(error, ValueError) else io or error
        raise CheckpointError(f"{file.name} cannot be read: {what}", instead(data)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file.name} is not a JSON object")
    return value


def instead(data: bytes) -> str:
    """A hint for what often is in the place of a JSON file; empty for anything else."""
    if data.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: run git lfs pull"
    page = data[:100].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml"))
    return "it is a web page: download the file itself" if page else ""


def json_or_empty(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file; empty where it is missing or damaged."""
    if not file.is_file():
        return {}
    try:
        return read_json(file)
    except CheckpointError:
        return {}


def write_json(path: Path, document: Mapping[str, Any], *, sort_keys: bool = False) -> None:
    """Write indented UTF-8 JSON with a final newline."""
    text = json.dumps(document, indent=2, sort_keys=sort_keys, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")


def whole(config: Config, key: str, default: int | None = None, *, most: int = LARGEST) -> int:
    """A whole number from 1 to ``most``; ``default`` where the key is missing or null."""
    value = config.get(key)
    if value is None:
        if default is None:
            raise KeyError(key)
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{key} is {short(value)}, not a whole number from 1 to {most}")
    return value


def number(config: Config, key: str, default: float | None = None) -> float:
    """A positive finite number; ``default`` where the key is missing or null."""
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise KeyError(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf or value > 1e30:
        raise ValueError(f"{key} is {short(value)}, not a positive number")
    return float(value)


def numbers(config: Config, key: str) -> tuple[float, ...]:
    """A list of positive finite numbers."""
    value = config[key]
    if not isinstance(value, list) or None in value:
        raise ValueError(f"{key} is {short(value)}, not a list of numbers")
    return tuple(number({key: item}, key) for item in value)


def flag(config: Config, key: str, default: bool = False) -> bool:
    """true or false; ``default`` where the key is missing or null."""
    value = config.get(key)
    if value is not None and value not in (True, False):
        raise ValueError(f"{key} is {short(value)}, not true or false")
    return default if value is None else bool(value)


def token_ids(config: Config, key: str, *, most: int = LARGEST) -> tuple[int, ...]:
    """Token ids of a key that holds one, a list, or none (null, or -1 as old Llama configs say)."""
    value = config.get(key)
    ids = []
    for token in value if isinstance(value, list) else [value]:
        if token is None:
            continue
        if not isinstance(token, int) or isinstance(token, bool) or token > LARGEST:
            raise ValueError(f"{key} is {short(value)}, not a token id")
        if token >= 0:
            ids.append(token)
    if len(ids) > most:
        raise ValueError(f"{key} is a list of {len(ids)} ids")
    return tuple(ids)


def short(value: Any) -> str:
    """``repr`` cut to one short line, for messages: the value comes from an untrusted file.

    Control characters are escaped; huge integers, which Python refuses to print, become words.
    """
    if isinstance(value, int) and abs(value) > 10**30:
        return "a huge number"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
