"""The command line's words for pruning: ``--prune`` and ``--save-checkpoint``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from compress.checkpoint.save import save_checkpoint
from compress.console import Console
from compress.errors import UsageError
from compress.output.folder import check_output, real_path
from compress.plan.job import Job, read_license
from compress.pruning.step import RECORD
from compress.recipe import AMOUNTS

__all__ = ["check_save", "prune_option", "save_pruned"]


def prune_option(text: str) -> dict[str, Any]:
    """``depth:3``, ``ffn:10%``, ``ffn:2048``, ``heads:2``, ``auto`` → the recipe's ``prune``.

    Raises:
        UsageError: anything else.
    """
    if text == "auto":
        return {"method": "auto"}
    method, _, amount = text.partition(":")
    keys = AMOUNTS.get(method, ())
    number = amount.removesuffix("%")
    if keys and amount.endswith("%"):
        try:
            return {"method": method, "ratio": float(number) / 100}
        except ValueError:
            pass
    elif keys and number.isdecimal():
        return {"method": method, keys[1]: int(number)}
    raise UsageError(
        f"--prune {text}: write METHOD:AMOUNT",
        hint="depth:3 or depth:10% (blocks that go), ffn:2048 (width that stays), ffn:10%, "
        "heads:2 (key-value heads that stay), heads:25%; auto with a budget",
    )


def check_save(folder: Path, output: Path, job: Job) -> None:
    """Refuse a ``--save-checkpoint`` that cannot be, before any work.

    Raises:
        UsageError: nothing is pruned, or the place is taken or is inside the output.
    """
    if job.recipe.weighs or job.cuts:
        raise UsageError(
            "--save-checkpoint writes one pruned model, and here each target has its own shape",
            hint="--prune with what the plan chose, e.g. ffn:2048",
        )
    if job.cut is None:
        raise UsageError(
            "--save-checkpoint has no effect: nothing is pruned", hint="--prune depth:10%"
        )
    if real_path(folder).is_relative_to(real_path(output)):
        raise UsageError(f"{folder} is inside the output {output}", hint="name another folder")
    check_output(folder, overwrite=False)


def save_pruned(job: Job, folder: Path, console: Console) -> None:
    """Write the job's pruned weights as a checkpoint, with a card that says what was done.

    Raises:
        PacklightError: see ``compress.checkpoint.save.save_checkpoint``.
    """
    save_checkpoint(job.source, folder, card(job))
    console.detail(f"checkpoint: {folder}")


def card(job: Job) -> str:
    """``README.md`` of the checkpoint: where it is from, under which licence, what was done."""
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
        f"# Pruned: {job.checkpoint.source}\n\n"
        f"Without {what}: {after:,} of {before:,} parameters. {trained} "
        f"`config.json` has the record under `{RECORD}`:\n\n```json\n{steps}\n```\n"
    )
