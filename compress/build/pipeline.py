"""One build: decide, write, verify, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress.build.decide import (
    BuildSettings,
    Decision,
    check_places,
    decide,
    digest_of,
    identity_of,
    inputs_of,
    lock_of,
)
from compress.build.write import write_artifacts
from compress.console import Console
from compress.decoder.config_json import write_json
from compress.errors import PacklightError
from compress.files import check_unchanged, stamps
from compress.formats import get_format
from compress.machine import bounded
from compress.output.checksums import NAME, folder_digests, read_checksums, write_checksums
from compress.output.folder import Resume, work_folder
from compress.output.lock import PROVENANCE, provenance
from compress.plan.document import Lock, plan_document
from compress.plan.job import Job, looks_at_inputs, read_license
from compress.plan.shapes import Artifact
from compress.report.describe import Baseline, build_report, model_facts
from compress.report.pages import model_card, render
from compress.report.report import Report
from compress.verify import Outcome, Verified, gates
from compress.verify.scorer import BUILTIN_TEXT, Scorer

if TYPE_CHECKING:
    from compress.allocation.step import Budgeted
    from compress.calibration.step import CalibrationStep


@dataclass(frozen=True)
class Built:
    """The result of a build.

    Attributes:
        report: as written to ``report.json``.
        folder: the output folder.
    """

    report: Report
    folder: Path


def build(settings: BuildSettings, console: Console) -> Built:
    """Write and verify the artifacts of a recipe; one that its runtime cannot run is kept, and the
    others are verified.

    Raises:
        PacklightError: the build failed; the output folder is not made or changed.
    """
    with bounded(settings.threads, settings.max_memory):
        console.begin("plan")
        decision = decide(settings, console)
        asked = digest_of(decision)
        if settings.resume and not settings.overwrite and (done := finished(decision, asked)):
            console.say(f"{decision.output} is finished; nothing was left to do")
            if settings.ci_files:
                settings.ci_files.write(done)
            return Built(done, decision.output)
        scorer = check_places(decision, console)
        opened = {**decision.job.checkpoint.opened, **stamps(inputs_of(decision))}
        lock = lock_of(decision, console)
        afresh = settings.overwrite or bool(settings.source)  # the demo is quick to rebuild
        resume = Resume(identity_of(decision.job, settings), settings.resume, afresh)
        overwrite = settings.overwrite
        with work_folder(decision.output, resume, overwrite=overwrite) as folder:
            ready = choose(decision, console, keep=settings.resume)
            job = ready.job
            artifacts = write_artifacts(job, ready.calibration, folder, console)
            write_json(folder / "plan.json", plan_document(job, lock).to_dict())
            (folder / "recipe.yaml").write_text(job.recipe.to_yaml(), encoding="utf-8")
            verified: list[Outcome] = [None] * len(artifacts)
            if scorer:
                verified = scorer.verify(artifacts, folder, keep_going=True)
            for artifact, outcome in zip(artifacts, verified, strict=True):
                if (row := get_format(artifact.format)).app:
                    parity = outcome.parity if isinstance(outcome, Verified) else None
                    row.write_app_files(artifact, job, parity)
            console.begin("write the report")  # and checksums of all that was written
            text = settings.eval_text
            report = make_report(job, artifacts, verified, scorer, decision.limits, folder, text)
            report.asked = asked
            report.notes += ready.notes
            if any(get_format(artifact.format).app for artifact in artifacts):
                from compress.report.devices import add_devices

                add_devices(report, artifacts, job)
            if ready.calibration:
                report.notes += ready.calibration.notes()
            if decision.previous:
                decision.previous.apply(report, console)
            check_unchanged(opened)
            write_report(report, job, lock, folder)
            if settings.save_checkpoint:  # last: a build that fails or is interrupted leaves none
                from compress.output.pruned_checkpoint import save_pruned

                save_pruned(job, settings.save_checkpoint, console)
        if settings.ci_files:
            settings.ci_files.write(report)
        return Built(report, decision.output)


def finished(decision: Decision, asked: str) -> Report | None:
    """The output's report where a build with this digest wrote it and all its files are there."""
    folder = decision.output
    try:
        report = Report.load(folder / "report.json")
        names = read_checksums(folder / NAME)
    except PacklightError:
        return None
    whole = all((folder / name).is_file() for name in names)
    return report if report.asked == asked and whole else None


@dataclass(frozen=True)
class Ready:
    """A job ready to be written: pruned where the recipe says so, and with the final grids.

    Attributes:
        job: with the weights and the grids of every target.
        budgeted: the grids chosen for a budget.
        calibration: of the job; None where nothing uses calibration texts.
        notes: lines of the report on what was pruned.
    """

    job: Job
    budgeted: tuple[Budgeted, ...]
    calibration: CalibrationStep | None
    notes: tuple[str, ...]


def rehearse(settings: BuildSettings, console: Console) -> tuple[Decision, Ready | None]:
    """``--dry-run``: everything up to the plan with its bytes; with a budget, sensitivities are
    measured and cached."""
    with bounded(settings.threads, settings.max_memory):
        console.begin("plan")
        decision = decide(settings, console)
        if settings.locked:
            lock_of(decision, console)
        ready = choose(decision, console, keep=False) if decision.measures else None
        console.end()
        return decision, ready


def choose(decision: Decision, console: Console, *, keep: bool) -> Ready:
    """Prune the weights that all targets share, and choose grids for a budget by measurement.

    Args:
        keep: keep the calibration walk's results on disk where it ends by an exception.
    """
    job, importance, threads = decision.job, decision.importance, decision.settings.threads
    notes: tuple[str, ...] = ()
    calibration: CalibrationStep | None = None
    budgeted: tuple[Budgeted, ...] = ()
    if decision.measures or importance.save or looks_at_inputs(job.recipe):
        from compress.calibration.step import CalibrationStep

        calibration = CalibrationStep(job, importance, console, threads, keep=keep)
        if not importance.imatrix:
            _ = calibration.texts  # invalid texts are refused before the work
    if calibration and job.cut is not None:
        from compress.pruning.step import prune

        pruned = prune(job, job.cut, calibration.texts, console, threads)
        job, notes = job.on(pruned.source), pruned.notes
        calibration = calibration.on(job)
    if calibration and decision.measures:
        from compress.allocation.explain import describe
        from compress.allocation.step import within_budget

        job, budgeted = within_budget(calibration, decision.replan)
        job = replace(job, budgets={b.target.plan.format: describe(b) for b in budgeted})
        calibration = calibration.on(job)
    if calibration and importance.save and not decision.settings.dry_run:
        calibration.save_imatrix()
    return Ready(job, budgeted, calibration, notes)


def write_report(report: Report, job: Job, lock: Lock, folder: Path) -> None:
    """Write the report as JSON, HTML and model card, then SHA-256 sums of the whole folder."""
    report.save(folder / "report.json")
    (folder / "report.html").write_text(render(report), encoding="utf-8")
    (folder / "README.md").write_text(model_card(report), encoding="utf-8")
    digests = folder_digests(folder)
    if stated := provenance(job, lock, digests):
        write_json(folder / PROVENANCE, stated)
    write_checksums(folder, digests)


def make_report(
    job: Job,
    artifacts: Sequence[Artifact],
    verified: Sequence[Outcome],
    scorer: Scorer | None,
    limits: Sequence[gates.Limit],
    folder: Path,
    eval_text: Path | None,
) -> Report:
    """The report of a build or verification, with its gates evaluated."""
    config, notes = job.config, list(job.checkpoint.warnings)
    if config.max_context < config.max_position_embeddings:
        why = ": beyond them its rope changes to other factors." if not config.rope_switch else "."
        notes.append(
            f"Artifacts hold up to {config.max_context} positions of the model's "
            f"{config.max_position_embeddings}{why}"
        )
    if job.checkpoint.remote:
        notes.append(job.checkpoint.remote.describe_traffic())
    dtypes = sorted({info.dtype for info in job.checkpoint.tensors.values()})
    baseline = Baseline(
        bytes=job.checkpoint.nbytes,
        dtype=", ".join(dtypes),
        runtime=scorer.runtime if scorer else "",
        text=eval_text.name if eval_text else BUILTIN_TEXT,
        speed=scorer.speed if scorer else None,
    )
    return build_report(
        model=model_facts(
            job.config,
            job.checkpoint.source,
            job.checkpoint.revision or None,
            read_license(job.checkpoint),
            job.checkpoint.adapters,
        ),
        recipe=job.recipe.to_dict(),
        command=job.command,
        context=job.context,
        baseline=baseline,
        artifacts=list(zip(artifacts, verified, strict=True)),
        limits=limits,
        folder=folder,
        decode=scorer.tokenizer.decode if scorer else None,
        budget_bytes=job.recipe.budget_bytes,
        notes=[*notes, *(scorer.notes if scorer else ())],
    )
