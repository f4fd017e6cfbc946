"""``--save-checkpoint``: writes the pruned model as a Hugging Face checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from compress.checkpoint.save import checkpoint_bytes, write_checkpoint
from compress.checkpoint.sources import Source
from compress.console import Console
from compress.errors import UsageError
from compress.files import check_place, check_unchanged
from compress.output.folder import check_disk, check_output, work_folder
from compress.plan.job import Job, read_license
from compress.pruning.step import RECORD
from compress.report.words import sentence

__all__ = ["check_save", "save_checkpoint", "save_pruned"]


def save_checkpoint(source: Source, folder: Path, card: str = "") -> None:
    """Write the weights of ``source`` as a checkpoint, in the dtypes of its checkpoint.

    Args:
        source: of any config.
        folder: to make, atomically.
        card: text of ``README.md``; none where empty.

        Raises:
            OutputExistsError, UsageError: the folder exists, or cannot be made.
        DiskFullError: before or while writing.
    """
    check_output(folder, overwrite=False)
    check_disk(folder, checkpoint_bytes(source))
    with work_folder(folder) as partial:
        write_checkpoint(source, partial)
        check_unchanged(source.checkpoint.opened)
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")


def check_save(folder: Path, output: Path, job: Job) -> None:
    """Refuse an impossible ``--save-checkpoint`` before any work.

    Raises:
        UsageError: nothing is pruned, or the folder exists or is inside the output.
    """
    if job.cut is None:
        raise UsageError(
            "--save-checkpoint has no effect: nothing is pruned", hint="--prune depth:10%"
        )
    check_place("--save-checkpoint", folder, output, folder=True)
    check_output(folder, overwrite=False)


def save_pruned(job: Job, folder: Path, console: Console) -> None:
    """Write the job's pruned weights as a checkpoint, with a card that describes the pruning.

    Raises:
        PacklightError: see ``save_checkpoint``.
    """
    save_checkpoint(job.source, folder, card(job))
    console.detail(f"checkpoint: {folder}")


def card(job: Job) -> str:
    """``README.md`` of the checkpoint: its base model, licence and pruning."""
    head: dict[str, Any] = {"base_model": job.checkpoint.source}
    if license_name := read_license(job.checkpoint):
        head["license"] = license_name
    head |= {"pipeline_tag": "text-generation", "tags": ["pruned", "packlight"]}
    before, after = job.config.num_parameters, job.shape.num_parameters
    what = job.cut.describe() if job.cut else ""
    healing = job.cut.healing if job.cut else None
    trained = (
        f"Its blocks were healed one by one ({healing.describe()}) to give what they gave before; "
        "the whole was not trained afterwards."
        if healing
        else "Not trained afterwards."
    )
    steps = json.dumps(job.source.config.raw[RECORD], indent=2)
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"
        f"# Pruned: {sentence(job.checkpoint.source)}\n\n"
        f"Without {what}: {after:,} of {before:,} parameters. {trained} "
        f"`config.json` has the record under `{RECORD}`:\n\n```json\n{steps}\n```\n"
    )
