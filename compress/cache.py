"""Where work is kept that another build would do again."""

from __future__ import annotations

import os
from pathlib import Path

from compress.errors import UsageError


def cache_folder(kind: str = "calibration") -> Path:
    """The folder of one kind of work: in ``PACKLIGHT_CACHE``, or below the Hub's assets.

    Raises:
        UsageError: not writable.
    """
    from huggingface_hub import cached_assets_path

    chosen = os.environ.get("PACKLIGHT_CACHE")
    try:
        if not chosen:
            return Path(cached_assets_path("packlight", namespace=kind))
        folder = Path(chosen) / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except OSError as error:
        raise UsageError(
            f"cannot write to {error.filename}: {error.strerror}",
            hint="set PACKLIGHT_CACHE to a folder for such work",
        ) from error
