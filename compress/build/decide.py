"""The settings of a build and the decision made from them: options, shard headers and small files
are read, no weights.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from compress.calibration.step import Importance, texts_of
from compress.calibration.texts import check_tokenizer
from compress.checkpoint.checkpoint import Checkpoint
from compress.checkpoint.hub import check_hub_id
from compress.console import Console
from compress.errors import UsageError, without_secrets
from compress.files import check_place
from compress.formats import FORMATS, get_format
from compress.output.folder import baseline_folder, check_disk, check_output
from compress.output.lock import check_lock, files_digest, lock_document, versions
from compress.plan.document import Lock, PlanDocument, plan_document
from compress.plan.job import (
    FEWER_FROM,
    Job,
    Replan,
    baseline_bytes,
    looks_at_inputs,
    model_name,
    prepare,
)
from compress.plan.memory import check_memory
from compress.plan.transform import Transforms
from compress.pruning.options import prune_option
from compress.recipe import Recipe, load, needs_of
from compress.report.against import Previous
from compress.report.ci import CiFiles
from compress.verify import gates
from compress.verify.gates import parse_option
from compress.verify.scorer import Scorer, read_text, text_name

__all__ = [
    "BuildSettings", "Decision", "VerifySettings", "check_places", "command_line", "decide",
    "digest_of", "identity_of", "inputs_of", "lock_of", "plan_of", "prepare_job",
    "resolved_recipe",
]  # fmt: skip


@dataclass(frozen=True)
class BuildSettings:
    """Settings of ``packlight build``: one field for each option of the same name.

    ``source`` overrides the model's name (the bundled demo); ``hub`` has ``revision``, ``token``,
    ``cache_dir`` and ``fetch``. ``made``: a recipe that a program made, instead of ``recipe``,
    which is then the name of the file that the build writes it to.
    """

    model: str
    output: Path | None = None
    adapters: Sequence[str] = ()
    recipe: str = "phone-4bit"
    overrides: Sequence[str] = ()
    formats: Sequence[str] = ()
    eval_text: Path | None = None
    gates: Sequence[str] = ()
    against: Path | None = None
    max_regression: Sequence[str] = ()
    calibration: Sequence[Path] = ()
    seed: int | None = None
    imatrix: Path | None = None
    save_imatrix: Path | None = None
    budget: str = ""
    budget_memory: str = ""
    device: str = ""
    plan: Path | None = None
    locked: bool = False
    provenance: bool = False
    prune: str = ""
    save_checkpoint: Path | None = None
    allow_dense: bool = False
    force: bool = False
    context: int | None = None
    threads: int = 0
    max_memory: int | None = None
    dry_run: bool = False
    overwrite: bool = False
    resume: bool = False
    verify: bool = True
    keep_baseline: Path | None = None
    ci_files: CiFiles | None = None
    hub_id: str = ""
    source: str = ""
    made: Recipe | None = None
    hub: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class VerifySettings:
    """Settings of ``packlight verify``: one field for each option of the same name."""

    artifact: Path
    baseline: str
    adapters: Sequence[str] = ()
    eval_text: Path | None = None
    tasks: Sequence[Path] = ()
    gates: Sequence[str] = ()
    against: Path | None = None
    max_regression: Sequence[str] = ()
    windows: int = 0
    sequence_length: int = 512
    threads: int = 0
    max_memory: int | None = None
    ci_files: CiFiles | None = None
    hub: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalSettings:
    """Settings of ``packlight eval``: one field for each option of the same name."""

    artifacts: Sequence[Path]
    baseline: str
    tasks: Sequence[str]
    adapters: Sequence[str] = ()
    num_fewshot: int | None = None
    limit: float | None = None
    apply_chat_template: bool = False
    confirm_run_unsafe_code: bool = False
    gates: Sequence[str] = ()
    context: int | None = None
    output: Path | None = None
    threads: int = 0
    max_memory: int | None = None
    ci_files: CiFiles | None = None
    hub: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What a build will do, decided before any weight is read.

    Attributes:
        settings: of the build.
        job: from its recipe or a plan file, for the unpruned float model; where ``measures`` is
            true, its grids are chosen later.
        replan: makes the job again with other grids or another recipe.
        importance: the options that bypass the recipe's calibration (imatrix files).
        limits: the recipe's gates; empty without verification.
        previous: the earlier report that the new one is compared with (``--against``), or None.
        text: the evaluation text.
        output: the output folder.
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
    """Read options, recipe and shard headers, and make the plan of each target.

    Raises:
        PacklightError: the build is impossible, as far as these files show.
    """
    recipe = resolved_recipe(settings)
    measures = not settings.plan and bool(recipe.budget)
    importance = Importance(settings.imatrix, settings.save_imatrix)
    if importance != Importance() or settings.calibration or looks_at_inputs(recipe):
        importance.check(recipe, settings.calibration, measures=measures)
    limits = gates.parse(recipe.gates) if settings.verify or settings.dry_run else []
    unread = not settings.verify and (settings.eval_text or settings.keep_baseline)
    asked = settings.dry_run or settings.allow_dense or settings.seed is not None
    if unread or asked or settings.hub_id:
        for line in idle_options(settings, recipe):
            console.warning(line)
    previous = None
    if settings.against or settings.max_regression:
        previous = Previous.read(settings.against, settings.max_regression, runs=settings.verify)
    text = read_text(settings.eval_text) if settings.verify or settings.eval_text else ""
    checkpoint = Checkpoint.open(
        settings.model,
        adapters=settings.adapters,
        headers=settings.dry_run and not measures,
        **settings.hub,
    )
    if settings.source:  # its name in reports
        checkpoint.source = settings.source
    if settings.hub_id:
        checkpoint.hub_id = check_hub_id(settings.hub_id)
    for line in (opening := list(checkpoint.warnings)):
        console.warning(line)
    names = [checkpoint.source, *(adapter.source for adapter in checkpoint.adapters), recipe.name]
    reads = (settings.verify or looks_at_inputs(recipe)) and not settings.dry_run
    if reads and checkpoint.has_tokenizer:
        _ = checkpoint.tokenizer  # loaded here, so that no child process loads it again
    elif checkpoint.has_tokenizer and not settings.dry_run:
        with ThreadPoolExecutor(1) as pool:  # that process loads it; meanwhile, this one the rest
            pool.submit(lambda: checkpoint.tokenizer_facts)
            for name in recipe.targets:
                _ = get_format(name).Writer
            import compress.grids.lanes  # noqa: F401 -- and numba
    output = settings.output or Path("-".join(map(model_name, names)))
    command = command_line(checkpoint, settings, output)
    job, replan = prepare_job(checkpoint, recipe, settings, command)
    for line in checkpoint.warnings[len(opening) :]:  # from the headers' tensors
        console.warning(line)
    check_memory(job, console, limit=settings.max_memory, verify=settings.verify, measures=measures)
    return Decision(settings, job, replan, importance, limits, previous, text, output, measures)


def prepare_job(
    checkpoint: Checkpoint, recipe: Recipe, settings: BuildSettings, command: str = ""
) -> tuple[Job, Replan]:
    """The job of a build, with the grids of a plan file or of the recipe.

    Args:
        checkpoint: opened.
        recipe: validated.
        settings: of the build.
        command: the command line that repeats the build.

    Returns:
        The job; and ``compress.plan.job.prepare`` with this command's arguments bound.

    Raises:
        UsageError: a budget that cannot be met; palettes without calibration; ``Plan.doubt``.
    """
    transforms: Transforms = {}
    if recipe.folds or any("sparsity" in target for target in recipe.targets.values()):
        from compress.pruning.transforms import transforms_of

        transforms = transforms_of(recipe)
    replan: Replan = partial(
        prepare, checkpoint, recipe=recipe, context=settings.context, command=command,
        transforms=transforms,
    )  # fmt: skip
    job = replan()
    if settings.plan:
        from compress.allocation.lock import locked

        job = locked(settings.plan, job, replan)
    elif recipe.budget:
        from compress.allocation.feasible import check_budget

        job = replace(job, at_most=check_budget(job, replan))
    if needs_of(recipe.solver) is None:
        palettes = any("lut" in entry.grid for plan in job.plans for entry in plan.entries)
        if palettes and not settings.force:
            from compress.plan.rounding import check_palettes

            check_palettes(job)
        if job.config.num_parameters >= FEWER_FROM:
            from compress.plan.rounding import warn_of_rounding

            warn_of_rounding(job)
    for plan in job.plans:
        if plan.doubt and not settings.force:
            raise UsageError(f"{plan.format}: {plan.doubt}", hint="--force builds it anyway")
    return job, replan


def check_places(decision: Decision, console: Console) -> Scorer | None:
    """Check the output folder, its disk and the evaluation text before any work.

    Returns:
        The scorer of the artifacts, or None without verification.

    Raises:
        PacklightError: the output exists or its disk is too full, there is no tokenizer, or the
            text is too short or not that of the earlier report.
    """
    settings, job, output = decision.settings, decision.job, decision.output
    check_output(output, overwrite=settings.overwrite)
    if settings.ci_files:
        settings.ci_files.check(output)
    if settings.save_imatrix:
        check_place("--save-imatrix", settings.save_imatrix, output, begins=b"GGUF")
    if settings.keep_baseline:
        check_place("--keep-baseline", settings.keep_baseline, output, folder=True)
    if settings.save_checkpoint:
        from compress.output.pruned_checkpoint import check_save

        check_save(settings.save_checkpoint, output, job)
    needed = sum(map(job.bytes_of, job.plans))
    check_disk(output, needed + (baseline_bytes(job) if settings.verify else 0))
    if settings.verify or (looks_at_inputs(job.recipe) and not settings.imatrix):
        check_tokenizer(job.checkpoint)
    if not settings.verify:
        return None
    for plan in job.plans:
        if FORMATS[plan.format].extra:
            FORMATS[plan.format].check_runtime()
    cache = settings.keep_baseline or baseline_folder(output)
    scorer = Scorer(
        job,
        decision.text,
        settings.threads,
        console,
        cache=cache,
        limits=decision.limits,
        shared=not settings.keep_baseline,
    )
    if decision.previous:
        name, every = text_name(settings.eval_text), scorer.stopping.exact
        scorer.repeat(decision.previous.check_text(name, scorer.windows, all_windows=every))
    return scorer


def identity_of(job: Job, settings: BuildSettings) -> dict[str, Any]:
    """All settings that determine the artifacts' bytes; ``--resume`` continues a build only where
    they are equal.

    Verification is not included: a build that ran out of memory there can be continued with
    ``--no-verify``. Neither are threads (``compress.machine``): sums do not depend on them.

    Args:
        job: before grids are chosen and weights changed, which follow from it.
        settings: of the build.

    Raises:
        CheckpointError: files of the checkpoint that cannot be read.
    """
    looks = looks_at_inputs(job.recipe) or settings.plan is not None
    document = {
        "versions": versions(),
        "model": job.checkpoint.source,
        "checkpoint": job.checkpoint.fingerprint(),
        "tokenizer": files_digest(job.checkpoint.tokenizer_files()),
        "recipe": {key: value for key, value in job.recipe.to_dict().items() if key != "verify"},
        "texts": files_digest(texts_of(job.recipe)) if looks and not settings.imatrix else None,
        "context": settings.context,
        **({"hub_id": settings.hub_id} if settings.hub_id else {}),
        "plan": files_digest([settings.plan]) if settings.plan else None,
        "imatrix": files_digest([settings.imatrix]) if settings.imatrix else None,
    }
    plain: dict[str, Any] = json.loads(json.dumps(document))
    return plain


def digest_of(decision: Decision) -> str:
    """SHA-256 of the settings that determine the artifacts' bytes, their verification and gates."""
    settings = decision.settings
    asked = [
        identity_of(decision.job, settings), decision.job.command, decision.job.recipe.to_dict(),
        settings.verify, sorted(settings.max_regression), str(settings.save_checkpoint),
        *(files_digest([path]) if path else "" for path in (settings.eval_text, settings.against)),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def inputs_of(decision: Decision) -> list[Path]:
    """Input files other than the checkpoint: calibration texts, imatrix files and the like."""
    if imatrix := decision.importance.imatrix:
        return [imatrix]
    return texts_of(decision.job.recipe) if looks_at_inputs(decision.job.recipe) else []


def lock_of(decision: Decision, console: Console) -> Lock:
    """``plan.json``'s ``lock``: hashes of a build's inputs; with ``--locked`` they are compared
    with the lock of the given plan.

    Raises:
        UsageError: see ``compress.output.lock.check_lock``.
    """
    settings, job = decision.settings, decision.job
    with console.progress("hash the checkpoint") as update:
        lock = lock_document(
            job.checkpoint,
            inputs_of(decision),
            thorough=settings.provenance or settings.locked,
            progress=update,
        )
    if settings.locked and settings.plan:
        before = PlanDocument.load(settings.plan)
        check_lock(settings.plan.name, before, plan_document(job, lock))
    return lock


# --- options --------------------------------------------------------------------------------

# Folders of absolute paths in an override, which name this machine.
FOLDERS = re.compile(r"(?<![^\s=,\[\"'])/(?:[^/\s,\]\"']+/)+")


def idle_options(settings: BuildSettings, recipe: Recipe) -> list[str]:
    """A line for each option that has no effect in this build."""
    options: dict[str, dict[str, object]] = {
        "--no-verify runs nothing": {
            "--eval-text": not settings.verify and settings.eval_text,
            "--keep-baseline": not settings.verify and settings.keep_baseline,
        },
        "--dry-run writes nothing": {
            "--overwrite": settings.dry_run and settings.overwrite,
            "--resume": settings.dry_run and settings.resume,
            "--provenance": settings.dry_run and settings.provenance,
            "--save-imatrix": settings.dry_run and settings.save_imatrix,
            "--save-checkpoint": settings.dry_run and settings.save_checkpoint,
            "--junit and --summary": settings.dry_run and settings.ci_files,
        },
        "nothing here looks at calibration texts": {
            "--seed": settings.seed is not None
            and not (looks_at_inputs(recipe) or settings.save_imatrix),
        },
        "no target is for an app": {
            "--hub-id": settings.hub_id
            and not any(get_format(name).app for name in recipe.targets),
        },
        "no target has sparsity": {
            "--allow-dense": settings.allow_dense
            and not any("sparsity" in target for target in recipe.targets.values()),
        },
    }
    return [
        f"{option} has no effect: {why}"
        for why, given in options.items()
        for option, idle in given.items()
        if idle
    ]


def plan_of(output: Path | None) -> Path:
    """The ``plan.json`` of the output folder, for ``--locked`` without ``--plan``.

    Raises:
        UsageError: there is none.
    """
    plan = output / "plan.json" if output else None
    if plan is None or not plan.is_file():
        missing = f": {plan} is not there" if plan else ""
        raise UsageError(
            f"--locked needs a plan{missing}", hint="--plan plan.json of an earlier build"
        )
    return plan


def resolved_recipe(settings: BuildSettings) -> Recipe:
    """The recipe after ``--set`` overrides, options that set one of its keys, and ``--format``.

    Raises:
        UsageError: two ways to choose grids.
        RecipeError: see ``compress.recipe.load``.
    """
    overrides = list(settings.overrides)
    if settings.prune:  # before --set, so that --set prune.heal adds to it
        overrides.insert(0, f"prune={json.dumps(prune_option(settings.prune))}")
    if settings.calibration:
        overrides.append(f"calibration.texts={json.dumps(list(map(str, settings.calibration)))}")
    if settings.seed is not None:
        overrides.append(f"calibration.seed={settings.seed}")
    for key, option in (("weights", "budget"), ("memory", "budget_memory"), ("device", "device")):
        if value := getattr(settings, option):
            if settings.plan is not None:
                raise UsageError("a budget and --plan exclude each other")
            overrides.append(f"budget.{key}={value}")
    if settings.allow_dense:
        overrides.append("allow_dense=true")
    for name, limit in map(parse_option, settings.gates):
        overrides.append(f"verify.gates.{name}={json.dumps(limit)}")
    return load(settings.made or settings.recipe, overrides, settings.formats)


def command_line(checkpoint: Checkpoint, settings: BuildSettings, output: Path) -> str:
    """The command line that repeats the build, for the report; local paths become names."""
    if settings.source == "packlight-demo":
        return "packlight demo"
    words = ["packlight", "build", checkpoint.source, "-r", Path(settings.recipe).name]
    if revision := settings.hub.get("revision"):
        words += ["--revision", revision]
    for adapter in checkpoint.adapters:
        words += ["--adapter", adapter.label]
    for name in settings.formats:
        words += ["-f", name]
    for override in settings.overrides:
        words += ["--set", FOLDERS.sub("", override)]
    if settings.eval_text:
        words += ["--eval-text", settings.eval_text.name]
    for gate in settings.gates:
        words += ["--gate", gate]
    for path in settings.calibration:
        words += ["--calibration", path.name]
    for option in ("budget", "budget_memory", "device"):
        if value := getattr(settings, option):
            words += [f"--{option.replace('_', '-')}", value]
    if settings.plan:
        words += ["--plan", settings.plan.name]
    if settings.locked:
        words.append("--locked")
    if settings.imatrix:
        words += ["--imatrix", settings.imatrix.name]
    if settings.seed is not None:
        words += ["--seed", str(settings.seed)]
    if settings.prune:
        words += ["--prune", settings.prune]
    if settings.allow_dense:
        words.append("--allow-dense")
    if settings.force:
        words.append("--force")
    if settings.context:
        words += ["--context", str(settings.context)]
    if settings.hub_id:
        words += ["--hub-id", settings.hub_id]
    return shlex.join([without_secrets(word) for word in (*words, "-o", output.name)])
