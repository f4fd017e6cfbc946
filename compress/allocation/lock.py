"""``plan.json`` read back: the same grids again, nothing measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress.checkpoint.checkpoint import Stored
from compress.decoder.config import DecoderConfig
from compress.errors import UsageError
from compress.formats import Format, get_format
from compress.plan.job import Job, Replan
from compress.plan.shapes import Plan

__all__ = ["locked", "read_lock"]


def locked(path: Path, job: Job, replan: Replan) -> Job:
    """``--plan``: the job with the grids of a ``plan.json``, and what that says of its budgets.

    Raises:
        UsageError: not a plan, or one of another model.
    """
    lock = read_lock(path)
    grids = {
        plan.format: locked_choices(lock, plan, job.config, get_format(plan.format))
        for plan in job.plans
    }
    made = replan(choices={name: chosen for name, chosen in grids.items() if chosen})
    shaped = made.on(Stored(made.checkpoint, made.shape)) if made.cut else made
    plans = tuple(
        replace(
            plan,
            file_bytes=get_format(plan.format).file_bytes(plan, shaped.source),
            expected_divergence=locked_divergence(lock, plan.format),
        )
        for plan in made.plans
    )
    return replace(job, plans=plans, budgets=locked_budgets(lock))


def read_lock(path: Path) -> dict[str, Any]:
    """A ``plan.json``.

    Raises:
        UsageError: not there, or not one.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="--plan takes a plan.json") from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}", hint="--plan takes a plan.json") from error
    if not isinstance(document, dict) or document.get("schema_version") != 1:
        raise UsageError(f"{path} is not a plan of packlight", hint="--plan takes a plan.json")
    return document


def locked_choices(
    lock: Mapping[str, Any], plan: Plan, config: DecoderConfig, exporter: Format
) -> dict[str, str]:
    """Entry name → grid as the lock has them; empty where the plan has the same already.

    Args:
        lock: from ``read_lock``.
        plan: of one target, by the recipe.
        config: the float model.
        exporter: of the plan's format.

    Raises:
        UsageError: another model's, without this target, or damaged.
    """
    try:
        parameters = int(lock["model"]["parameters"])
        targets = lock["targets"]
        rows = targets.get(plan.format, {}).get("tensors")
        grids = {str(row["name"]): str(row["grid"]) for row in rows or ()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the plan is damaged: {type(error).__name__}: {error}") from error
    if parameters != config.num_parameters:
        raise UsageError(
            f"the plan is for a model of {parameters:,} parameters, "
            f"this one has {config.num_parameters:,}",
            hint="a plan belongs to one model",
        )
    if rows is None:
        raise UsageError(
            f"the plan has no {plan.format}", hint=f"it has {', '.join(targets)}: use -f"
        )
    free = {e.name: e.grid for e in plan.entries if exporter.candidates(e, plan.settings)}
    missing = sorted(set(free) - set(grids))
    # A tied head may be a tensor of its own, or not; everything else must be there.
    if missing and missing != ["lm_head.weight"]:
        raise UsageError(f"the plan says nothing of {missing[0]}", hint="it is another model's")
    found = {name: grids[name] for name in free if name in grids}
    return {} if found == free else found


def locked_divergence(lock: Mapping[str, Any], format: str) -> float | None:
    """What was expected of a target when its plan was made."""
    told = lock["targets"].get(format, {}).get("expected_kl_divergence")
    return float(told) if isinstance(told, int | float) else None


def locked_budgets(lock: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the plan was made for, by format."""
    targets = lock["targets"].items()
    return {name: target["budget"] for name, target in targets if "budget" in target}
