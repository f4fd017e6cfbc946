"""Decides what a build has to do, from options, headers and small files, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from compress.build.settings import BuildSettings, check_options, command_line, resolved_recipe
from compress.calibration.step import Importance, texts_of
from compress.checkpoint.checkpoint import Checkpoint
from compress.console import Console
from compress.output.folder import Resume, baseline_folder, check_disk, check_output
from compress.output.lock import check_lock, identity, lock_document
from compress.plan.document import plan_document
from compress.plan.job import Job, Replan, baseline_bytes, looks_at_inputs, model_name, prepare
from compress.plan.memory import check_memory
from compress.pruning.transforms import transforms_of
from compress.recipe import Recipe
from compress.verify import gates
from compress.report.against import Previous
from compress.verify.scorer import Scorer, check_tokenizer, read_text, text_name

__all__ = [
    "Decision",
    "check_places",
    "decide",
    "first_choice",
    "identity_of",
    "lock_of",
    "replanner",
    "resume_of",
]


@dataclass(frozen=True)
class Decision:
    """What a build is to do.

    Attributes:
        settings: what it was asked for.
        job: by its recipe or by a plan file, the float model unpruned; where the build
            ``measures``, its grids are chosen later.
        replan: the job by other grids or another recipe.
        importance: the options that go around the recipe's calibration.
        limits: the recipe's gates.
        previous: the report that nothing may get worse than; None where there is none.
        text: to score on.
        output: the folder to make.
        measures: whether grids are chosen by measurement, for a budget.
    """

    settings: BuildSettings
    job: Job
    replan: Replan
    importance: Importance
    limits: Sequence[gates.Limit]
    previous: Previous | None
    text: str
    output: Path
    measures: bool


def decide(settings: BuildSettings, console: Console) -> Decision:
    """Read options, recipe and headers, and plan.

    Raises:
        PacklightError: the build is impossible, as far as these show.
    """
    check_options(settings)
    recipe = resolved_recipe(settings)
    measures = not settings.plan and bool(recipe.budget)
    importance = Importance(settings.imatrix, settings.save_imatrix)
    if importance != Importance() or settings.calibration or looks_at_inputs(recipe):
        importance.check(recipe, settings.calibration, measures=measures)
    limits = gates.parse(recipe.gates)
    previous = None
    if settings.against or settings.max_regression:
        previous = Previous.read(settings.against, settings.max_regression, runs=settings.verify)
    text = read_text(settings.eval_text) if settings.verify or settings.eval_text else ""
    checkpoint = Checkpoint.open(settings.model, **settings.hub)
    if settings.source:  # the name that reports call it by
        checkpoint.source = settings.source
    for line in checkpoint.warnings:
        console.warning(line)
    output = settings.output or Path(f"{model_name(checkpoint.source)}-{recipe.name}")
    replan = replanner(checkpoint, recipe, settings, command_line(checkpoint, settings, output))
    job = first_choice(settings, replan)
    check_memory(job, console, limit=settings.max_memory, verify=settings.verify, measures=measures)
    return Decision(settings, job, replan, importance, limits, previous, text, output, measures)


def replanner(
    checkpoint: Checkpoint, recipe: Recipe, settings: BuildSettings, command: str = ""
) -> Replan:
    """``compress.plan.job.prepare`` with what all jobs of one command share."""
    transforms = transforms_of(recipe)
    return partial(
        prepare,
        checkpoint,
        recipe=recipe,
        context=settings.context,
        command=command,
        transforms=transforms,
    )


def first_choice(settings: BuildSettings, replan: Replan) -> Job:
    """The grids that a plan file has, or the recipe's; a budget that cannot be met is refused."""
    job = replan()
    if settings.plan:
        from compress.allocation.lock import locked

        return locked(settings.plan, job, replan)
    if job.recipe.budget:
        from compress.allocation.feasible import check_budget

        return replace(job, at_most=check_budget(job, replan))
    return job


def check_places(decision: Decision, console: Console) -> Scorer | None:
    """Every refusal that the place of the output and the texts are good for, before the work.

    Returns:
        What scores the artifacts, or None without verification.

    Raises:
        PacklightError: the output is taken or its disk too small, there is no tokenizer, or the
            text is too short or not that of the earlier report.
    """
    settings, job, output = decision.settings, decision.job, decision.output
    check_output(output, overwrite=settings.overwrite)
    if settings.ci_files:
        settings.ci_files.check(output)
    if settings.save_checkpoint:
        from compress.output.pruned_checkpoint import check_save

        check_save(settings.save_checkpoint, output, job)
    needed = sum(map(job.bytes_of, job.plans))
    check_disk(output, needed + (baseline_bytes(job) if settings.verify else 0))
    if settings.verify or (looks_at_inputs(job.recipe) and not settings.imatrix):
        check_tokenizer(job.checkpoint)
    if not settings.verify:
        return None
    cache = settings.keep_baseline or baseline_folder(output)
    scorer = Scorer(job, decision.text, settings.threads, console, cache=cache)
    if decision.previous:
        decision.previous.check_text(text_name(settings.eval_text), scorer.windows)
    return scorer


def resume_of(decision: Decision) -> Resume:
    """What the build's work folder must know to be continued.

    Raises:
        CheckpointError: files of the checkpoint that cannot be read.
    """
    settings = decision.settings
    afresh = settings.overwrite or bool(settings.source)  # the demo takes less than to ask
    return Resume(identity_of(decision.job, settings), settings.resume, afresh)


def identity_of(job: Job, settings: BuildSettings) -> dict[str, Any]:
    """Everything that decides over the artifacts' bytes, as ``compress.output.lock.identity``."""
    looks = looks_at_inputs(job.recipe) or settings.plan is not None
    return identity(
        job,
        texts=texts_of(job.recipe) if looks and not settings.imatrix else [],
        options={"context": settings.context},
        files={"plan": settings.plan, "imatrix": settings.imatrix},
    )


def lock_of(decision: Decision, console: Console) -> dict[str, Any]:
    """``plan.json``'s ``lock``: hashes of what the build is made from; with ``--locked``, held
    against its plan.

    Raises:
        UsageError: see ``compress.output.lock.check_lock``.
    """
    settings, job, imatrix = decision.settings, decision.job, decision.importance.imatrix
    inputs = texts_of(job.recipe) if looks_at_inputs(job.recipe) else []
    with console.progress("hash the checkpoint") as update:
        lock = lock_document(
            job.checkpoint,
            [imatrix] if imatrix else inputs,
            thorough=settings.provenance or settings.locked,
            progress=update,
        )
    if settings.locked and settings.plan:
        from compress.allocation.lock import read_lock

        now = {**plan_document(job), "lock": lock}
        check_lock(settings.plan.name, read_lock(settings.plan), now)
    return lock
