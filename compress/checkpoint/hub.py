"""Downloads checkpoints from the Hugging Face Hub; huggingface_hub's ``HF_*`` variables apply."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from logging import ERROR
from pathlib import Path
from urllib.parse import unquote

from compress.checkpoint.not_a_checkpoint import explain_folder, read_config
from compress.decoder.config_json import json_or_empty
from compress.decoder.families import find_family
from compress.errors import (
    CheckpointError,
    DiskFullError,
    PacklightError,
    UsageError,
    is_disk_full,
    one_line,
    without_secrets,
)
from compress.machine import change_setting

# The files that a build needs, without other formats in the same repository
# (consolidated.safetensors, onnx/, original/, GGUF files). Small files come first: a model that
# packlight does not support is refused before its gigabytes are downloaded.
SMALL_FILES = (
    "*.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "README.md", "LICENSE*",
    "NOTICE*",
)  # fmt: skip
# The only subfolder that is read.
CHAT_TEMPLATES = ("additional_chat_templates/*.jinja",)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that exists is used


def download(
    repo_id: str,
    *,
    revision: str | None,
    token: str | None,
    cache_dir: str | None,
    weights: bool = True,
) -> Path:
    """Download the files of a Hub repository that a build needs, or find them in the cache.

    Args:
        repo_id, revision, token, cache_dir: as for huggingface_hub.
        weights: False: the small files only.

    Returns:
        The snapshot's folder, which is named after the commit.

    Raises:
        CheckpointError: neither the Hub nor the cache has it; the reason in one line.
        UnsupportedModelError: its ``config.json`` names a model that packlight does not support.
        DiskFullError: the disk is full.
    """
    from huggingface_hub import snapshot_download

    no_warnings()

    def fetch(*patterns: Sequence[str]) -> Path:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            allow_patterns=[pattern for group in patterns for pattern in group],
            ignore_patterns=None if patterns == (CHAT_TEMPLATES,) else ["*/*"],
        )
        return Path(folder)

    try:
        path = fetch(SMALL_FILES)
        if not (path / "config.json").is_file():
            read_config(path, repo_id, list_files(repo_id, path.name, token))
        find_family(read_config(path, repo_id))
        fetch(CHAT_TEMPLATES)
        if not weights:
            return path
        for single in WEIGHTS:
            names = weight_files(path, single)
            path = fetch(SMALL_FILES, list(map(glob.escape, names)))
            if any((path / name).is_file() for name in names):
                return path
        none = CheckpointError(f"{repo_id} has no weights", hint=f"one of {', '.join(WEIGHTS)}")
        raise explain_folder(path, none, repo_id, list_files(repo_id, path.name, token))
    # huggingface_hub's errors are OSErrors; a name that cannot be a repository is a ValueError.
    except (OSError, ValueError) as error:
        raise failure(repo_id, error, revision) from error


def list_files(repo_id: str, revision: str, token: str | None) -> list[str]:
    """Names of a repository's top-level files; empty without a connection."""
    from huggingface_hub import HfApi

    try:
        found = HfApi().model_info(repo_id, revision=revision, token=token).siblings or []
    except (OSError, ValueError):
        return []
    return [file.rfilename for file in found if "/" not in file.rfilename]


def download_adapter(
    repo_id: str,
    names: Sequence[str],
    *,
    revision: str | None,
    token: str | None,
    cache_dir: str | None,
) -> Path:
    """Download those of the named files that a Hub repository has; the first is required.

    Returns:
        The snapshot's folder, which is named after the commit.

    Raises:
        CheckpointError: the first file is missing; or as for ``download``.
        DiskFullError: the disk is full.
    """
    from huggingface_hub import snapshot_download

    no_warnings()
    try:
        for count in range(1, len(names) + 1):  # config.json first: it may be refused
            folder = snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                allow_patterns=list(names[:count]),
            )
            if not (Path(folder) / names[0]).is_file():
                raise CheckpointError(
                    f"{repo_id} has no {names[0]}", hint="a model, or not an adapter of PEFT?"
                )
        return Path(folder)
    except (OSError, ValueError) as error:
        raise failure(repo_id, error, revision) from error


def no_warnings() -> None:
    """huggingface_hub warns of patterns that no file has, which is what they are for here."""
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity, logging.set_verbosity
    change_setting("huggingface_hub's verbosity", *verbosity, ERROR)


def failure(repo_id: str, error: Exception, revision: str | None) -> PacklightError:
    """The error to raise for a failed download."""
    if isinstance(error, OSError) and is_disk_full(error):
        return DiskFullError(f"no room left to fetch {repo_id}")
    why, hint = _explain(error, revision)
    return CheckpointError(f"cannot fetch {repo_id}: {why}", hint=hint)


def page_of(name: str) -> tuple[str, str] | None:
    """The repository and revision (or ``""``) of a Hub page's URL.

    Returns:
        None for a URL that is not on the Hub: huggingface.co, hf.co or ``HF_ENDPOINT``.

    Raises:
        UsageError: a page of the Hub that is not a model's.
    """
    if match := re.fullmatch(r"hf://(?:models/)?([^/@]+/[^/@]+)(?:@([^/@]+))?/?", name):
        return match[1], match[2] or ""
    mirror = re.sub("^https?://", "", os.environ.get("HF_ENDPOINT", "")).rstrip("/")
    hosts = "|".join(map(re.escape, filter(None, ("huggingface.co", "hf.co", mirror))))
    match = re.match(
        rf"(?:(?:https?|ssh|git)://)?(?:[^/@\s]*@)?(?:www\.)?(?:{hosts})[/:]([^?#]*)", name
    )
    if match is None:
        return None
    path = unquote(match[1])
    owner, model, *rest = [*path.strip("/").split("/"), ""]
    if not model or owner in ("datasets", "spaces", "collections", "papers", "docs", "blog"):
        said = without_secrets(name)
        raise UsageError(f"{said} is not the page of a model", hint="give a Hub id: OWNER/MODEL")
    revision = rest[1] if len(rest) > 1 and rest[0] in ("tree", "blob", "resolve", "raw") else ""
    if revision == "refs":  # refs/pr/1
        revision = "/".join(rest[1:4])
    return f"{owner}/{model.removesuffix('.git')}", revision


def weight_files(folder: Path, single: str) -> list[str]:
    """Possible names of weight files: the single file, and those in its index.

    Args:
        folder: with the small files.
        single: a row of ``WEIGHTS``.
    """
    named = json_or_empty(folder / f"{single}.index.json").get("weight_map")
    shards = set(map(str, named.values())) if isinstance(named, dict) else set()
    # Plain names only: ``Checkpoint`` refuses others.
    return [single, *sorted(name for name in shards if Path(name).name == name)]


def _explain(error: Exception, revision: str | None) -> tuple[str, str]:
    """Why a download failed, and a hint."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")
        why = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else "no connection"
        return why, "give a local folder instead"
    if isinstance(error, errors.GatedRepoError):
        return "its licence must be accepted first", "accept it on the Hub, then give --token"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the Hub has no such model, or it is private", "check the name and --token"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}", "check --revision"
    return one_line(error), "check the name, --revision and --token (or HF_TOKEN)"


def check_hub_id(text: str) -> str:
    """The option's text.

    Raises:
        UsageError: not a model's name on the Hub.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text, re.ASCII) or len(text) > 96:
        raise UsageError(
            f"--hub-id {text!r} is not the name of a model on the Hub",
            hint="as in huggingface.co/microsoft/Phi-3-mini-4k-instruct: "
            "--hub-id microsoft/Phi-3-mini-4k-instruct",
        )
    return text
