"""What a build is to do, decided from options, headers and small files, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.allocation.chosen import Chosen, locked_plan
from compress.allocation.ladder import Replan, check_budget, replanner
from compress.allocation.lock import read_lock
from compress.allocation.sweep import check_sweep
from compress.calibration.step import Importance, texts_of
from compress.checkpoint.checkpoint import Checkpoint
from compress.console import Console
from compress.plan.job import GetExporter, Job, baseline_bytes, looks_at_inputs, model_name
from compress.plan.document import plan_document
from compress.plan.memory import check_memory
from compress.output.folder import Resume, baseline_folder, check_disk, check_output
from compress.output.lock import check_lock, identity, lock_document
from compress.output.pruned_checkpoint import check_save
from compress.recipe import Recipe, load
from compress.verify.scorer import Scorer, check_tokenizer, read_text, text_name
from compress.build.settings import BuildSettings, check_options, command_line, recipe_overrides
from compress.verify import gates
from compress.verify.against import Previous

__all__ = [
    "Decision",
    "clear_the_way",
    "decide",
    "first_choice",
    "identity_of",
    "lock_of",
    "resume_of",
]


@dataclass(frozen=True)
class Decision:
    """What a build is to do.

    Attributes:
        settings: what it was asked for.
        chosen: the job by its recipe or by a plan file, the float model unpruned; where the build
            ``measures``, its grids are chosen later.
        replan: the job by other grids or another recipe.
        importance: the options that go around the recipe's calibration.
        limits: the recipe's gates.
        previous: the report that nothing may get worse than; None where there is none.
        text: to score on.
        output: the folder to make.
        measures: whether grids are chosen by measurement, for a budget or for a sweep.
    """

    settings: BuildSettings
    chosen: Chosen
    replan: Replan
    importance: Importance
    limits: Sequence[gates.Limit]
    previous: Previous | None
    text: str
    output: Path
    measures: bool

    @property
    def job(self) -> Job:
        """The job as it is before grids are measured and weights changed."""
        return self.chosen.job

    @property
    def recipe(self) -> Recipe:
        """What to reach."""
        return self.job.recipe


def decide(settings: BuildSettings, get_exporter: GetExporter, console: Console) -> Decision:
    """Read options, recipe and headers, and plan.

    Raises:
        PacklightError: whatever makes the build impossible, as far as they tell.
    """
    check_options(settings)
    recipe = load(settings.recipe, recipe_overrides(settings), settings.formats)
    importance = Importance(settings.imatrix, settings.save_imatrix)
    measures = not settings.plan and bool(recipe.budget or settings.sweep)
    # A plan may prune, which looks at inputs whatever the solver.
    looks = measures or settings.plan is not None
    importance.check(recipe, settings.calibration, measures=looks)
    limits = gates.parse(recipe.gates)
    previous = Previous.read(settings.against, settings.max_regression, runs=settings.verify)
    text = read_text(settings.eval_text)
    checkpoint = open_checkpoint(settings, console)
    output = settings.output or Path(f"{model_name(checkpoint.source)}-{recipe.name}")
    command = command_line(checkpoint, settings, output)
    replan = replanner(checkpoint, recipe, get_exporter, settings.context, command)
    chosen = first_choice(settings, get_exporter, replan)
    check_memory(
        chosen.job,
        get_exporter,
        console,
        limit=settings.max_memory,
        verify=settings.verify,
        measures=measures,
    )
    return Decision(settings, chosen, replan, importance, limits, previous, text, output, measures)


def open_checkpoint(settings: BuildSettings, console: Console) -> Checkpoint:
    """The float model's headers, under the name that reports call it."""
    checkpoint = Checkpoint.open(settings.model, **settings.hub)
    if settings.source:
        checkpoint.source = settings.source
    for line in checkpoint.warnings:
        console.warning(line)
    return checkpoint


def first_choice(settings: BuildSettings, get_exporter: GetExporter, replan: Replan) -> Chosen:
    """The grids that a plan file has, or the recipe's; a budget or a sweep that cannot be met is
    refused.
    """
    job = replan()
    if settings.plan:
        return locked_plan(settings.plan, job, get_exporter, replan)
    if settings.sweep:
        check_sweep(settings.sweep, job, get_exporter)
        return Chosen(job)
    return Chosen(job, at_most=check_budget(job, get_exporter, replan))


def clear_the_way(decision: Decision, console: Console) -> Scorer | None:
    """Every refusal that the place of the output and the texts are good for, before the work.

    Returns:
        What scores the artifacts, or None where nobody wants it.

    Raises:
        PacklightError: the output is taken or its disk too small, there is no tokenizer, or the
            text is too short or not that of the earlier report.
    """
    settings, job, output = decision.settings, decision.job, decision.output
    check_output(output, overwrite=settings.overwrite)
    settings.ci_files.check(output)
    if settings.save_checkpoint:
        check_save(settings.save_checkpoint, output, job)
    needed = decision.chosen.predicted_bytes + (baseline_bytes(job) if settings.verify else 0)
    check_disk(output, needed)
    if settings.verify or (looks_at_inputs(decision.recipe) and not settings.imatrix):
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
    looks = looks_at_inputs(job.recipe) or bool(settings.sweep or settings.plan)
    return identity(
        job,
        texts=texts_of(job.recipe) if looks and not settings.imatrix else [],
        options={"context": settings.context, "sweep": settings.sweep},
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
        now = {**plan_document(job, decision.chosen.budgets), "lock": lock}
        check_lock(settings.plan.name, read_lock(settings.plan), now)
    return lock
