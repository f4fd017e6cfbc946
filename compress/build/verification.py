"""``packlight verify``: compares existing artifacts with their float model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compress.build.decide import EvalSettings, VerifySettings
from compress.build.pipeline import make_report
from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.console import Console
from compress.errors import UsageError
from compress.files import check_unchanged
from compress.formats import FORMATS, get_format
from compress.machine import bounded
from compress.plan.job import DEFAULT_CONTEXT, Job, adopt, describe_model, find_artifacts
from compress.plan.memory import check_memory
from compress.plan.shapes import Artifact
from compress.recipe import Recipe
from compress.report.against import Previous
from compress.report.report import Report
from compress.verify import gates
from compress.verify.scorer import Scorer, read_text, text_name
from compress.verify.tasks import read_task

__all__ = ["verify"]


def verify(settings: VerifySettings, console: Console) -> Report:
    """Run existing artifacts and compare them with the float model; writes nothing.

    Returns:
        The report; of several artifacts, some may have failed to run.
    """
    with bounded(settings.threads, settings.max_memory):
        console.begin("read headers")
        if settings.ci_files:
            settings.ci_files.check(settings.artifact)
        recipe = verification_recipe(settings)
        limits = gates.parse(recipe.gates)
        previous = None
        if settings.against or settings.max_regression:
            previous = Previous.read(settings.against, settings.max_regression)
        text = read_text(settings.eval_text)
        tasks = [read_task(path) for path in settings.tasks]
        job, artifacts = adopt_all([settings.artifact], settings, recipe, console)
        check_memory(job, console, limit=settings.max_memory, verify=True, writes=False)
        scorer = Scorer(job, text, settings.threads, console, tasks, limits=limits)
        if previous:
            name, every = text_name(settings.eval_text), scorer.stopping.exact
            scorer.repeat(previous.check_text(name, scorer.windows, all_windows=every))
        verified = scorer.verify(artifacts, None, keep_going=len(artifacts) > 1)
        check_unchanged(job.checkpoint.opened)
        artifact = settings.artifact
        folder = artifact if artifact.is_dir() else artifact.parent
        report = make_report(job, artifacts, verified, scorer, limits, folder, settings.eval_text)
        if previous:
            previous.apply(report, console)
        if settings.ci_files:
            settings.ci_files.write(report)
        return report


def verification_recipe(settings: VerifySettings) -> Recipe:
    """A recipe with the gates and windows of a verification; it has no targets yet."""
    wanted = dict(gates.parse_option(gate) for gate in settings.gates)
    return Recipe.verification(wanted, settings.windows, settings.sequence_length)


def adopt_all(
    paths: Sequence[Path], settings: VerifySettings | EvalSettings, recipe: Recipe, console: Console
) -> tuple[Job, list[Artifact]]:
    """Existing artifacts, and a job as if they had been built from the given float model.

    Args:
        paths: an artifact or the folder of a build each.
        settings: with the float model.
        recipe: of the job, without targets.
        console: gets warnings.

    Raises:
        UsageError: a path has none, or one is not of the float model.
    """
    found: list[tuple[str, Path]] = []
    for path in paths:
        if not (here := find_artifacts(path)):
            places = [*(row.place for row in FORMATS.values()), "or the folder of a build"]
            raise UsageError(f"{path} is not an artifact", hint=", ".join(places))
        found += here
    checkpoint = Checkpoint.open(settings.baseline, adapters=settings.adapters, **settings.hub)
    for line in checkpoint.warnings if settings.adapters else ():
        console.warning(line)
    config = describe_model(checkpoint)
    if config.ropes[0].original_context:  # an artifact may have been built for more positions
        contexts = [get_format(name).inspect(path)["context"] for name, path in found]
        config = describe_model(checkpoint, max(contexts))
    for line in checkpoint.warnings:
        console.warning(line)
    artifacts = [adopt(name, path, config, console) for name, path in found]
    recipe = recipe.model_copy(update={"targets": {found.format: {} for found in artifacts}})
    plans = tuple(artifact.plan for artifact in artifacts)
    context = min(DEFAULT_CONTEXT, config.max_context)
    return Job(Stored(checkpoint, config), config, recipe, plans, context), artifacts
