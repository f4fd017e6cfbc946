"""The story of one build: open, plan, write, verify, report; and of one verification alone.

What knows formats comes in as an argument, the ``Shipyard``: the workshop knows none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.allocation.chosen import Chosen, choose_grids, locked_plan
from compress.allocation.ladder import check_budget
from compress.allocation.sweep import check_sweep, curve_rows
from compress.arch import DecoderConfig
from compress.calibration_step import CalibrationStep, Importance
from compress.checkpoint import Checkpoint
from compress.checksums import folder_digests, write_checksums
from compress.config_json import write_json
from compress.console import Console
from compress.errors import UsageError
from compress.job import (
    DEFAULT_CONTEXT,
    Job,
    adopt,
    baseline_bytes,
    describe_model,
    find_artifacts,
    looks_at_inputs,
    model_name,
    prepare,
    read_license,
)
from compress.machine import use_threads
from compress.memory import check_memory
from compress.model import Artifact, Shipyard
from compress.origin import lock_build
from compress.output import baseline_folder, check_disk, check_output, work_folder
from compress.plan_file import print_plan
from compress.provenance import NAME as PROVENANCE
from compress.provenance import statement
from compress.pruning.options import check_save, save_pruned
from compress.pruning.step import prune, prune_targets
from compress.recipe import Recipe, load
from compress.report import Baseline, build_report, model_facts
from compress.resume import resuming
from compress.scorer import Scorer, check_tokenizer, forecast, read_text, text_name
from compress.settings import (
    BuildSettings,
    VerifySettings,
    check_options,
    command_line,
    recipe_overrides,
)
from compress.sources import Stored
from compress.summary import finish
from compress.verify import Outcome, gates
from compress.verify.against import Previous
from compress.verify.tasks import read_task
from compress.writing import write_artifacts


def build(settings: BuildSettings, shipyard: Shipyard, console: Console) -> int:
    """``packlight build``: 0 when every gate passed, 1 when one failed, 2 when an artifact could
    not be run (which keeps it and the others).

    Raises:
        PacklightError: it could not be done; nothing was left behind.
    """
    console.begin("plan")
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
    checkpoint = Checkpoint.open(settings.model, **settings.hub)
    if settings.source:
        checkpoint.source = settings.source
    for line in checkpoint.warnings:
        console.warning(line)
    output = settings.output or Path(f"{model_name(checkpoint.source)}-{recipe.name}")
    command = command_line(checkpoint, settings, output)
    get_exporter = shipyard.get_exporter

    def prepared(
        choices: Mapping[str, Mapping[str, str]] | None = None, recipe: Recipe = recipe
    ) -> Job:
        return prepare(
            checkpoint,
            recipe,
            get_exporter,
            context=settings.context,
            command=command,
            choices=choices,
        )

    job = prepared()
    chosen = Chosen(job)
    if settings.plan:
        chosen = locked_plan(settings.plan, job, get_exporter, prepared)
        job = chosen.job
    elif settings.sweep:
        check_sweep(settings.sweep, job, get_exporter)
    else:
        check_budget(job, get_exporter, prepared)

    def choose(calibration: CalibrationStep) -> Chosen:
        return choose_grids(settings.sweep, calibration, get_exporter, prepared)

    check_memory(
        job,
        get_exporter,
        console,
        limit=settings.max_memory,
        verify=settings.verify,
        measures=measures,
    )
    if settings.dry_run:
        if settings.locked:
            lock_build(job, chosen, importance, settings, console)
        if measures:
            pruned = prune(job, console, settings.threads)
            job = job.on(pruned.source) if pruned else job
            chosen = choose(CalibrationStep(job, importance, shipyard, console, settings.threads))
        console.end()
        print_plan(chosen.job, console, chosen.budgets)
        chosen.print(console)
        if settings.verify:
            console.data(forecast(job, chosen.job.plans, settings.threads)[1])
        return 0
    check_output(output, overwrite=settings.overwrite)
    settings.ci_files.check(output)
    if settings.save_checkpoint:
        check_save(settings.save_checkpoint, output, job)
    check_disk(output, job.predicted_bytes + (baseline_bytes(job) if settings.verify else 0))
    # Before the work: a text that is too short, or no tokenizer, is told now.
    if settings.verify or (looks_at_inputs(recipe) and not settings.imatrix):
        check_tokenizer(checkpoint)
    kept = settings.keep_baseline or baseline_folder(output)
    scorer = Scorer(job, text, settings.threads, console, kept=kept) if settings.verify else None
    if previous and scorer:
        previous.check_text(text_name(settings.eval_text), scorer.windows)
    lock = lock_build(job, chosen, importance, settings, console)
    with work_folder(output, resuming(job, settings)) as folder:
        check_output(output, overwrite=settings.overwrite)  # another build may just have ended
        pruned = prune(job, console, settings.threads)
        if pruned is not None:
            job = job.on(pruned.source)
        calibration = CalibrationStep(
            job, importance, shipyard, console, settings.threads, keep=settings.resume
        )
        if measures:
            chosen = choose(calibration)
            job = chosen.job
        job, pruned_notes = prune_targets(job, console, settings.threads)
        calibration = calibration.on(job)
        calibration.save_imatrix()
        artifacts = write_artifacts(calibration, shipyard, folder, console)
        for name, document in chosen.documents(job).items():
            write_json(folder / name, {**document, "lock": lock})
        (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        verified: list[Outcome] = [None] * len(artifacts)
        if scorer:
            verified = scorer.verify(artifacts, shipyard, folder, keep_going=True)
        console.begin("write the report")  # and checksums of all that was written
        report = make_report(job, artifacts, verified, scorer, limits, folder, settings.eval_text)
        if chosen.curve:
            report["curve"] = curve_rows(chosen.curve, report["artifacts"])
        report["notes"] += [*(pruned.notes if pruned else ()), *pruned_notes, *calibration.notes()]
        if previous:
            previous.apply(report, console)
        write_json(folder / "report.json", report)
        shipyard.write_pages(report, folder)
        digests = folder_digests(folder)
        if stated := statement(job, lock, digests):
            write_json(folder / PROVENANCE, stated)
        write_checksums(folder, digests)
        if settings.save_checkpoint:  # last: a build that fails or is interrupted leaves none
            save_pruned(job, settings.save_checkpoint, console)
    settings.ci_files.write(report)
    return finish(report, output, console)


def verify(settings: VerifySettings, shipyard: Shipyard, console: Console) -> int:
    """``packlight verify``: 0 when every gate passed, 1 when one failed, 2 when one of several
    artifacts could not be run; writes nothing.
    """
    console.begin("read headers")
    settings.ci_files.check(settings.artifact)
    use_threads(settings.threads)
    wanted = dict(gates.parse_option(gate) for gate in settings.gates)
    previous = Previous.read(settings.against, settings.max_regression)
    text = read_text(settings.eval_text)
    tasks = [read_task(path) for path in settings.tasks]
    found = find_artifacts(settings.artifact)
    if not found:
        raise UsageError(
            f"{settings.artifact} is not an artifact",
            hint="a .gguf or .onnx file, an ONNX folder, a .mlpackage, or the folder of a build",
        )
    checkpoint = Checkpoint.open(settings.baseline, **settings.hub)
    config = describe_model(checkpoint)
    artifacts = [adopt(name, path, config, shipyard.get_exporter, console) for name, path in found]
    recipe = Recipe(
        name="verify",
        targets={artifact.format: {} for artifact in artifacts},
        solver="rtn",
        windows=settings.windows,
        sequence_length=settings.sequence_length,
        gates=wanted,
        document={"name": "verify", "gates": wanted},
    )
    plans = tuple(artifact.plan for artifact in artifacts)
    context = min(DEFAULT_CONTEXT, config.max_context)
    job = Job(Stored(checkpoint, config), config, recipe, plans, context)
    check_memory(job, None, console, limit=settings.max_memory, verify=True)
    scorer = Scorer(job, text, settings.threads, console, tasks)
    if previous:
        previous.check_text(text_name(settings.eval_text), scorer.windows)
    verified = scorer.verify(artifacts, shipyard, None, keep_going=len(artifacts) > 1)
    folder = settings.artifact if settings.artifact.is_dir() else settings.artifact.parent
    folder = folder.parent if folder.suffix == ".mlpackage" else folder
    limits = gates.parse(wanted)
    report = make_report(job, artifacts, verified, scorer, limits, folder, settings.eval_text)
    if previous:
        previous.apply(report, console)
    settings.ci_files.write(report)
    return finish(report, None, console)


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
