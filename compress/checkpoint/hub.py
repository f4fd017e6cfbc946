"""Checkpoints of the Hugging Face Hub, through huggingface_hub: ``HF_*`` variables are honoured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from compress.decoder.config_json import read_json
from compress.decoder.families import find_family
from compress.errors import CheckpointError, DiskFullError, is_disk_full, one_line

# What a build needs, and nothing of the other formats that live beside it in a repository
# (consolidated.safetensors, onnx/, original/, GGUF files). The small files come first: a model
# that packlight does not build is refused before its gigabytes are fetched.
SMALL_FILES = ("*.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE*")
CHAT_TEMPLATES = ("additional_chat_templates/*.jinja",)  # the one folder that is looked into
SAFETENSORS = ("model.safetensors", "model-*.safetensors")
PICKLES = ("pytorch_model.bin", "pytorch_model-*.bin")


def download(
    repo_id: str, *, revision: str | None, token: str | None, cache_dir: str | None
) -> Path:
    """Fetch what a build needs of a Hub repository, or find it in the cache.

    Returns:
        The snapshot's folder, which is named after the commit.

    Raises:
        CheckpointError: the Hub or the cache does not have it; the reason in one line.
        UnsupportedModelError: its ``config.json`` names a model that packlight does not build.
        DiskFullError: no room for it.
    """
    from huggingface_hub import snapshot_download

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
        find_family(read_json(path / "config.json"))
        fetch(CHAT_TEMPLATES)
        path = fetch(SMALL_FILES, SAFETENSORS)
        if not list(path.glob("*.safetensors")):
            path = fetch(SMALL_FILES, PICKLES)
        return path
    # huggingface_hub's errors are OSErrors; a name that cannot be a repository is a ValueError.
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and is_disk_full(error):
            raise DiskFullError(f"no room left to fetch {repo_id}") from error
        why, hint = _explain(error, revision)
        raise CheckpointError(f"cannot fetch {repo_id}: {why}", hint=hint) from error


def _explain(error: Exception, revision: str | None) -> tuple[str, str]:
    """Why a download failed, and what to do about it."""
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
