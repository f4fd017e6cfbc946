"""``--plan``: reads the grids of a ``plan.json``; nothing is measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from compress.checkpoint.checkpoint import Stored
from compress.decoder.config import DecoderConfig
from compress.errors import UsageError
from compress.formats import Format, get_format
from compress.plan.document import PlanDocument
from compress.plan.job import Job, Replan
from compress.plan.shapes import Plan

__all__ = ["locked"]


def locked(path: Path, job: Job, replan: Replan) -> Job:
    """``--plan``: the job with the grids and budgets of a ``plan.json``.

    Raises:
        UsageError: not a plan, or one of another model.
    """
    document = PlanDocument.load(path)
    grids = {
        plan.format: locked_choices(document, plan, job.config, get_format(plan.format))
        for plan in job.plans
    }
    made = replan(choices={name: chosen for name, chosen in grids.items() if chosen})
    shaped = made.on(Stored(made.checkpoint, made.shape)) if made.cut else made
    plans = tuple(
        replace(
            plan,
            file_bytes=get_format(plan.format).file_bytes(plan, shaped.source),
            expected_divergence=document.targets[plan.format].expected_kl_divergence,
        )
        for plan in made.plans
    )
    budgets = {name: target.budget for name, target in document.targets.items() if target.budget}
    return replace(job, plans=plans, budgets=budgets)


def locked_choices(
    document: PlanDocument, plan: Plan, config: DecoderConfig, exporter: Format
) -> dict[str, str]:
    """Entry name → grid from a ``plan.json``; empty where the plan has the same grids already.

    Args:
        document: the ``plan.json``.
        plan: of one target, from the recipe.
        config: the float model.
        exporter: of the plan's format.

    Raises:
        UsageError: another model's, or without this target.
    """
    parameters, target = document.model.parameters, document.targets.get(plan.format)
    if parameters != config.num_parameters:
        raise UsageError(
            f"the plan is for a model of {parameters:,} parameters, "
            f"this one has {config.num_parameters:,}",
            hint="a plan belongs to one model",
        )
    if target is None:
        there = ", ".join(document.targets)
        raise UsageError(f"the plan has no {plan.format}", hint=f"it has {there}: use -f")
    grids = {tensor.name: tensor.grid for tensor in target.tensors}
    free = {e.name: e.grid for e in plan.entries if exporter.candidates(e, plan.settings)}
    missing = sorted(set(free) - set(grids))
    # A tied head may or may not be a separate tensor; every other tensor must be in the plan.
    if missing and missing != ["lm_head.weight"]:
        raise UsageError(f"the plan says nothing of {missing[0]}", hint="it is another model's")
    found = {name: grids[name] for name in free if name in grids}
    return {} if found == free else found
