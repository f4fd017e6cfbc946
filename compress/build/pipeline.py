"""The story of one build: open, plan, write, verify, report; and of one verification alone.

What knows formats comes in as an argument, the ``Shipyard``: the workshop knows none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.allocation.chosen import Chosen, choose_grids
from compress.allocation.sweep import curve_rows
from compress.decoder.config import DecoderConfig
from compress.calibration.step import CalibrationStep
from compress.checkpoint.checkpoint import Checkpoint
from compress.output.checksums import folder_digests, write_checksums
from compress.decoder.config_json import write_json
from compress.console import Console
from compress.build.decide import Decision, clear_the_way, decide
from compress.errors import UsageError
from compress.plan.job import DEFAULT_CONTEXT, Job, adopt, describe_model, find_artifacts, read_license
from compress.machine import use_threads
from compress.plan.memory import check_memory
from compress.plan.shapes import Artifact, Shipyard
from compress.output.lock import lock_build
from compress.output.folder import check_output, work_folder
from compress.plan.document import print_plan
from compress.output.provenance import NAME as PROVENANCE
from compress.output.provenance import statement
from compress.pruning.options import save_pruned
from compress.pruning.step import prune, prune_targets
from compress.recipe import Recipe
from compress.report.report import Baseline, build_report, model_facts
from compress.output.resume import resuming
from compress.verify.scorer import Scorer, forecast, read_text, text_name
from compress.build.settings import BuildSettings, VerifySettings
from compress.checkpoint.sources import Stored
from compress.report.summary import finish
from compress.verify import Outcome, gates
from compress.verify.against import Previous
from compress.verify.tasks import read_task
from compress.build.write import write_artifacts


def build(settings: BuildSettings, shipyard: Shipyard, console: Console) -> int:
    """``packlight build``: 0 when every gate passed, 1 when one failed, 2 when an artifact could
    not be run (which keeps it and the others).

    Raises:
        PacklightError: it could not be done; nothing was left behind.
    """
    console.begin("plan")
    decision = decide(settings, shipyard.get_exporter, console)
    if settings.dry_run:
        rehearse(decision, shipyard, console)
        return 0
    scorer = clear_the_way(decision, console)
    lock = lock_of(decision, console)
    with work_folder(decision.output, resuming(decision.job, settings)) as folder:
        check_output(decision.output, overwrite=settings.overwrite)  # another may just have ended
        ready = make_ready(decision, shipyard, console)
        artifacts = write_artifacts(ready.calibration, shipyard, folder, console)
        write_plans(ready, lock, decision.recipe, folder)
        verified: list[Outcome] = [None] * len(artifacts)
        if scorer:
            verified = scorer.verify(artifacts, shipyard, folder, keep_going=True)
        console.begin("write the report")  # and checksums of all that was written
        report = tell(decision, ready, artifacts, verified, scorer, folder)
        if decision.previous:
            decision.previous.apply(report, console)
        write_report(report, ready.job, lock, shipyard, folder)
        if settings.save_checkpoint:  # last: a build that fails or is interrupted leaves none
            save_pruned(ready.job, settings.save_checkpoint, console)
    settings.ci_files.write(report)
    return finish(report, decision.output, console)


def rehearse(decision: Decision, shipyard: Shipyard, console: Console) -> None:
    """``--dry-run``: the plan with its bytes; measured for a budget, and kept in the cache only."""
    settings, job, chosen = decision.settings, decision.job, decision.chosen
    if settings.locked:
        lock_of(decision, console)
    if decision.measures:
        chosen = prune_and_choose(decision, shipyard, console, keep=False).chosen
    console.end()
    print_plan(chosen.job, console, chosen.budgets)
    chosen.print(console)
    if settings.verify:
        console.data(forecast(job, chosen.job.plans, settings.threads)[1])


def lock_of(decision: Decision, console: Console) -> dict[str, Any]:
    """What the build is made from, held against its plan with ``--locked``."""
    return lock_build(
        decision.job, decision.chosen, decision.importance, decision.settings, console
    )


@dataclass(frozen=True)
class Ready:
    """What artifacts are written from.

    Attributes:
        job: with the weights and the grids of every target.
        chosen: the grids, and what is told of them.
        calibration: of the job.
        notes: what pruning did, for the report.
    """

    job: Job
    chosen: Chosen
    calibration: CalibrationStep
    notes: tuple[str, ...]


def prune_and_choose(
    decision: Decision, shipyard: Shipyard, console: Console, *, keep: bool
) -> Ready:
    """Prune what all targets share, and choose grids where that takes measuring.

    Args:
        keep: leave what a walk has found where it ends by an exception.
    """
    job, chosen, threads = decision.job, decision.chosen, decision.settings.threads
    pruned = prune(job, console, threads)
    if pruned is not None:
        job = job.on(pruned.source)
    calibration = CalibrationStep(job, decision.importance, shipyard, console, threads, keep=keep)
    if decision.measures:
        sweep, get_exporter = decision.settings.sweep, shipyard.get_exporter
        chosen = choose_grids(sweep, calibration, get_exporter, decision.replan)
        job = chosen.job
    return Ready(job, chosen, calibration, pruned.notes if pruned else ())


def make_ready(decision: Decision, shipyard: Shipyard, console: Console) -> Ready:
    """All that comes before writing: weights, grids, and statistics when they are asked for."""
    settings = decision.settings
    shared = prune_and_choose(decision, shipyard, console, keep=settings.resume)
    job, notes = prune_targets(shared.job, console, settings.threads)
    calibration = shared.calibration.on(job)
    calibration.save_imatrix()
    return Ready(job, shared.chosen, calibration, (*shared.notes, *notes))


def write_plans(ready: Ready, lock: Mapping[str, Any], recipe: Recipe, folder: Path) -> None:
    """``plan.json``, or one for every budget of a sweep, and ``recipe.yaml``."""
    for name, document in ready.chosen.documents(ready.job).items():
        write_json(folder / name, {**document, "lock": lock})
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")


def tell(
    decision: Decision,
    ready: Ready,
    artifacts: Sequence[Artifact],
    verified: Sequence[Outcome],
    scorer: Scorer | None,
    folder: Path,
) -> dict[str, Any]:
    """``report.json`` of a build, before it is compared with an earlier one."""
    text = decision.settings.eval_text
    report = make_report(ready.job, artifacts, verified, scorer, decision.limits, folder, text)
    if ready.chosen.curve:
        report["curve"] = curve_rows(ready.chosen.curve, report["artifacts"])
    report["notes"] += [*ready.notes, *ready.calibration.notes()]
    return report


def write_report(
    report: dict[str, Any],
    job: Job,
    lock: Mapping[str, Any],
    shipyard: Shipyard,
    folder: Path,
) -> None:
    """The report as JSON and as pages; then the digests of everything in the folder."""
    write_json(folder / "report.json", report)
    shipyard.write_pages(report, folder)
    digests = folder_digests(folder)
    if stated := statement(job, lock, digests):
        write_json(folder / PROVENANCE, stated)
    write_checksums(folder, digests)


def verify(settings: VerifySettings, shipyard: Shipyard, console: Console) -> int:
    """``packlight verify``: 0 when every gate passed, 1 when one failed, 2 when one of several
    artifacts could not be run; writes nothing.
    """
    console.begin("read headers")
    settings.ci_files.check(settings.artifact)
    use_threads(settings.threads)
    recipe = verification_recipe(settings)
    limits = gates.parse(recipe.gates)
    previous = Previous.read(settings.against, settings.max_regression)
    text = read_text(settings.eval_text)
    tasks = [read_task(path) for path in settings.tasks]
    job, artifacts = adopt_all(settings, recipe, shipyard, console)
    check_memory(job, None, console, limit=settings.max_memory, verify=True)
    scorer = Scorer(job, text, settings.threads, console, tasks)
    if previous:
        previous.check_text(text_name(settings.eval_text), scorer.windows)
    verified = scorer.verify(artifacts, shipyard, None, keep_going=len(artifacts) > 1)
    folder = folder_of(settings.artifact)
    report = make_report(job, artifacts, verified, scorer, limits, folder, settings.eval_text)
    if previous:
        previous.apply(report, console)
    settings.ci_files.write(report)
    return finish(report, None, console)


def verification_recipe(settings: VerifySettings) -> Recipe:
    """What artifacts are held against; which they are is not known yet."""
    wanted = dict(gates.parse_option(gate) for gate in settings.gates)
    return Recipe(
        name="verify",
        targets={},
        solver="rtn",
        windows=settings.windows,
        sequence_length=settings.sequence_length,
        gates=wanted,
        document={"name": "verify", "gates": wanted},
    )


def adopt_all(
    settings: VerifySettings, recipe: Recipe, shipyard: Shipyard, console: Console
) -> tuple[Job, list[Artifact]]:
    """The artifacts that are there, and the job that they would have been made by.

    Raises:
        UsageError: there are none, or one is not of the float model.
    """
    found = find_artifacts(settings.artifact)
    if not found:
        raise UsageError(
            f"{settings.artifact} is not an artifact",
            hint="a .gguf or .onnx file, an ONNX folder, a .mlpackage, or the folder of a build",
        )
    checkpoint = Checkpoint.open(settings.baseline, **settings.hub)
    config = describe_model(checkpoint)
    artifacts = [adopt(name, path, config, shipyard.get_exporter, console) for name, path in found]
    recipe = replace(recipe, targets={artifact.format: {} for artifact in artifacts})
    plans = tuple(artifact.plan for artifact in artifacts)
    context = min(DEFAULT_CONTEXT, config.max_context)
    return Job(Stored(checkpoint, config), config, recipe, plans, context), artifacts


def folder_of(artifact: Path) -> Path:
    """What an artifact's path in a report is relative to; the package's own folder hides it."""
    folder = artifact if artifact.is_dir() else artifact.parent
    return folder.parent if folder.suffix == ".mlpackage" else folder


def make_report(
    job: Job,
    artifacts: Sequence[Artifact],
    verified: Sequence[Outcome],
    scorer: Scorer | None,
    limits: Sequence[gates.Limit],
    folder: Path,
    eval_text: Path | None,
) -> dict[str, Any]:
    """``report.json`` as plain data."""
    dtypes = sorted({info.dtype for info in job.checkpoint.tensors.values()})
    baseline = Baseline(
        bytes=job.checkpoint.nbytes,
        dtype=", ".join(dtypes),
        runtime=scorer.runtime if scorer else "",
        text=text_name(eval_text),
        speed=scorer.speed if scorer else None,
    )
    return build_report(
        model=model_facts(
            job.config,
            job.checkpoint.source,
            job.checkpoint.revision or None,
            read_license(job.checkpoint),
        ),
        recipe=job.recipe.document,
        command=job.command,
        context=job.context,
        baseline=baseline,
        artifacts=list(zip(artifacts, verified, strict=True)),
        limits=limits,
        folder=folder,
        decode=scorer.tokenizer.decode if scorer else None,
        budget_bytes=job.recipe.budget_bytes,
        notes=[*baseline_notes(job.config), *(scorer.notes if scorer else ())],
    )


def baseline_notes(config: DecoderConfig) -> list[str]:
    """What a reader must know about the whole comparison."""
    if config.max_context < config.max_position_embeddings:
        return [
            f"Artifacts hold up to {config.max_context} positions of the model's "
            f"{config.max_position_embeddings}: beyond them its rope changes to other factors."
        ]
    return []
