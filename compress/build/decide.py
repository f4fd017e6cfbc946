"""What a build is to do, decided from options, headers and small files, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.allocation.chosen import Chosen, locked_plan
from compress.allocation.ladder import Replan, check_budget, replanner
from compress.allocation.sweep import check_sweep
from compress.calibration.step import Importance
from compress.checkpoint.checkpoint import Checkpoint
from compress.console import Console
from compress.plan.job import GetExporter, Job, baseline_bytes, looks_at_inputs, model_name
from compress.machine import use_threads
from compress.plan.memory import check_memory
from compress.output.folder import baseline_folder, check_disk, check_output
from compress.pruning.options import check_save
from compress.recipe import Recipe, load
from compress.verify.scorer import Scorer, check_tokenizer, read_text, text_name
from compress.build.settings import BuildSettings, check_options, command_line, recipe_overrides
from compress.verify import gates
from compress.verify.against import Previous

__all__ = ["Decision", "clear_the_way", "decide", "first_choice"]


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
    """Read options, recipe and headers, and plan; the memory of this process is bounded from here.

    Raises:
        PacklightError: whatever makes the build impossible, as far as they tell.
    """
    check_options(settings)
    use_threads(settings.threads)
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
    kept = settings.keep_baseline or baseline_folder(output)
    scorer = Scorer(job, decision.text, settings.threads, console, kept=kept)
    if decision.previous:
        decision.previous.check_text(text_name(settings.eval_text), scorer.windows)
    return scorer
