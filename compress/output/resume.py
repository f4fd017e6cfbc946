"""Which build it is that left a work folder: everything that decides over the artifacts' bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.build.settings import BuildSettings
from compress.calibration.step import texts_of
from compress.output.folder import Resume
from compress.output.lock import versions
from compress.plan.job import Job, looks_at_inputs

__all__ = ["identity", "resuming"]


def resuming(job: Job, settings: BuildSettings) -> Resume:
    """What a build's work folder must know; arguments and errors as ``identity``."""
    afresh = settings.overwrite or bool(settings.source)  # the demo takes less than to ask
    return Resume(identity(job, settings), settings.resume, afresh)


def identity(job: Job, settings: BuildSettings) -> dict[str, Any]:
    """What two builds must share for one to go on with what the other left.

    Verification has no part in it: what a build left for want of memory there can be continued
    with ``--no-verify``. Neither have threads (``compress.steady``).

    Args:
        job: as it is before grids are chosen and weights changed; those follow from it.
        settings: what the command was asked for.

    Raises:
        CheckpointError: files of the checkpoint that cannot be read.
    """
    recipe = {key: value for key, value in job.recipe.document.items() if key != "verify"}
    looks = looks_at_inputs(job.recipe) or bool(settings.sweep or settings.plan)
    texts = texts_of(job.recipe) if looks and not settings.imatrix else []
    document = {
        "versions": versions(),
        "model": job.checkpoint.source,
        "checkpoint": job.checkpoint.fingerprint(),
        "tokenizer": digest(job.checkpoint.tokenizer_files()),
        "recipe": recipe,
        "texts": digest(texts),
        "context": settings.context,
        "sweep": settings.sweep,
        "plan": digest([settings.plan] if settings.plan else []),
        "imatrix": digest([settings.imatrix] if settings.imatrix else []),
    }
    plain: dict[str, Any] = json.loads(json.dumps(document))
    return plain


def digest(files: Sequence[Path]) -> str | None:
    """SHA-256 of some files; None for none."""
    found = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest() if files else None
