"""The story of one batch: read the jobs, plan each, leave out what was done, run the rest, tell.

Planning is what ``packlight build --dry-run`` does, for every job, here: headers and recipes only.
A model that cannot be built is found out now, and its jobs are not started; it is looked at again
in every batch, so that there is nothing to retry until its files have changed.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.batch import document, page
from compress.batch.engine import Engine, Work
from compress.batch.ground import Ground, Tree, stand_on
from compress.batch.jobs import BatchJob, arguments, read_jobs, select
from compress.batch.predict import Prediction, predict, share_threads
from compress.batch.state import State, fingerprint
from compress.batch.table import Board
from compress.build.decide import first_choice, identity_of, replanner
from compress.build.settings import BuildSettings, check_options, resolved_recipe
from compress.checkpoint.checkpoint import Checkpoint
from compress.checkpoint.remote import write_text
from compress.console import Console, format_bytes
from compress.decoder.config_json import write_json
from compress.errors import PacklightError, UsageError, one_line
from compress.output.folder import check_disk, locked
from compress.output.lock import files_digest
from compress.plan.memory import smallest_memory
from compress.report.ci import CiFiles
from compress.verify import gates

__all__ = ["BatchSettings", "Planned", "batch"]


@dataclass(frozen=True)
class BatchSettings:
    """What ``packlight batch`` was asked for; the options of the same names."""

    file: Path
    output: str = ""
    only: Sequence[str] = ()
    retry_failed: bool = False
    fail_fast: bool = False
    max_memory: int | None = None
    jobs: int = 0
    engine: str = "local"
    address: str = ""
    dry_run: bool = False
    ci_files: CiFiles | None = None


@dataclass(frozen=True)
class Planned:
    """A job, and what is known of it before it runs.

    Attributes:
        job: of the file.
        settings: what its build is asked for.
        prediction: None where it cannot run.
        fingerprint: of all that decides over its result; empty where it cannot run.
        error, hint: why it cannot run.
    """

    job: BatchJob
    settings: BuildSettings
    prediction: Prediction | None = None
    fingerprint: str = ""
    error: str = ""
    hint: str = ""

    @property
    def name(self) -> str:
        return self.job.name


def batch(settings: BatchSettings, console: Console) -> int:
    """``packlight batch``: 0 when all passed, 1 when a gate failed, 2 when a job could not run.

    Raises:
        PacklightError: the jobs file is not valid, another batch writes to the same tree, no
            cluster answers, or there is no room on the disk; nothing was started.
    """
    if settings.ci_files:
        settings.ci_files.check()
    file = read_jobs(settings.file)
    tree = Tree.at(settings.output or file.output)
    options = (settings.engine, settings.address, settings.max_memory, settings.jobs)
    with stand_on(*options) as ground:
        chosen = select(file.jobs, settings.only)
        planner = Planner(tree.folder, ground.memory, ground.cpus, settings.jobs)
        planned = [planner.plan(job) for job in chosen]
        if settings.dry_run:
            document.print_plan(planned, console, ground.memory, ground.cpus)
            return 2 if any(one.error for one in planned) else 0
        with locked(tree.folder):
            told = run_planned(planned, tree, ground, settings, console)
    document.finish(told, tree.folder, console, tree.url)
    return int(told["exit_code"])


def run_planned(
    planned: Sequence[Planned],
    tree: Tree,
    ground: Ground,
    settings: BatchSettings,
    console: Console,
) -> dict[str, Any]:
    """Run what is wanted, and write ``batch.json`` and ``batch.html``, however it ends."""
    state = State(tree.folder)
    todo = [one for one in planned if wanted(one, state, settings.retry_failed)]
    check_disk(tree.folder, sum(one.prediction.bytes for one in todo if one.prediction))
    board = Board(planned, state, console, fail_fast=settings.fail_fast)
    for one in planned:
        if one not in todo:
            board.settle(one, state.read(one.name))
    try:
        run(todo, state, ground.engine(tree), board)
    except (KeyboardInterrupt, SystemExit) as ending:
        board.interrupt()
        ending.add_note("the same command goes on with what is there")
        raise
    finally:
        told = document.batch_document(
            settings.file, planned, board, state, ground.memory, ground.cpus
        )
        write_json(tree.folder / "batch.json", told)
        (tree.folder / "batch.html").write_text(page.render(told), encoding="utf-8")
        for name in ("batch.json", "batch.html") if tree.url else ():
            write_text(tree.url, name, (tree.folder / name).read_text(encoding="utf-8"))
        found = {job["name"]: state.report(job["name"]) for job in told["jobs"] if job["report"]}
        reports = {name: report for name, report in found.items() if report}
        errors = {name: why for name, why in document.errors(told).items() if name not in reports}
        if settings.ci_files:
            settings.ci_files.write_all(reports, errors, document.markdown(told))
    return told


def wanted(one: Planned, state: State, retry_failed: bool) -> bool:
    """Whether a job is to be run now: not if it cannot be, was finished, or failed before with the
    same inputs, unless failures are to be retried.
    """
    record = state.read(one.name)
    if one.error:
        return False
    if record is None or record.fingerprint != one.fingerprint:
        return True
    failed = record.status in ("error", "killed")
    return not record.finished and (retry_failed or not failed)


def run(todo: Sequence[Planned], state: State, engine: Engine, board: Board) -> None:
    """Run jobs, and keep a record of each start and end."""
    jobs = {one.name: one for one in todo}
    leaders = first_of_models(todo)
    models = Counter(one.job.model_name for one in todo)  # jobs that are to come
    works = [
        make_work(one, state, leaders[model], shared=models[model] > 1)
        for one in todo
        for model in [one.job.model_name]
    ]
    with board, closing(engine.run(works, board)) as outcomes:
        for outcome in outcomes:
            one = jobs[outcome.name]
            board.settle(one, state.end(one.name, one.fingerprint, outcome), fresh=True)
            models[one.job.model_name] -= 1
            if not models[one.job.model_name]:  # gigabytes that nobody will ask for again
                shutil.rmtree(state.baselines(one.job.model_name), ignore_errors=True)


def first_of_models(todo: Sequence[Planned]) -> dict[str, str]:
    """Model → its job that goes first: the longest, which leaves most in the cache for the others:
    second moments serve those who need less.
    """
    firsts: dict[str, Planned] = {}
    for one in todo:
        first = firsts.setdefault(one.job.model_name, one)
        if seconds_of(one) > seconds_of(first):
            firsts[one.job.model_name] = one
    return {model: one.name for model, one in firsts.items()}


def seconds_of(one: Planned) -> float:
    return one.prediction.seconds if one.prediction else 0.0


def make_work(one: Planned, state: State, leader: str, *, shared: bool) -> Work:
    """The command of a job. What another build left is cleared away, what this one did, continued.

    Args:
        leader: of the jobs of its model.
        shared: whether there are other jobs of its model.
    """
    assert one.prediction is not None
    record = state.read(one.name)
    words = arguments(one.settings)
    if record is None or record.fingerprint != one.fingerprint:
        shutil.rmtree(state.partial_of(one.name), ignore_errors=True)
    if state.stamp(one.name):
        words.append("--overwrite")
    progress = state.file(one.name, "progress")
    progress.parent.mkdir(parents=True, exist_ok=True)
    progress.unlink(missing_ok=True)
    state.folder_of(one.name).parent.mkdir(parents=True, exist_ok=True)
    if one.settings.verify and shared:
        words += ["--keep-baseline", str(state.baselines(one.job.model_name))]
    words += ["--resume", "--threads", str(one.prediction.threads)]
    words += ["--max-memory", str(one.prediction.memory)]
    words += ["--progress-file", str(progress)]
    return Work(
        name=one.name,
        arguments=tuple(words),
        log=state.file(one.name, "log"),
        memory=one.prediction.memory,
        threads=one.prediction.threads,
        seconds=one.prediction.seconds,
        after="" if leader == one.name else leader,
    )


class Planner:
    """Plans jobs; a model is opened (and a Hub id fetched) once for all its jobs."""

    def __init__(self, output: Path, memory: int, cpus: int, jobs: int) -> None:
        self._output = output
        self._memory, self._cpus, self._jobs = memory, cpus, jobs
        self._opened: dict[tuple[str, str], Checkpoint | PacklightError] = {}

    def plan(self, job: BatchJob) -> Planned:
        """What is known of a job; errors are part of it."""
        settings = job.settings(self._output / job.name)
        try:
            return self._plan(job, settings)
        except PacklightError as error:
            return Planned(job, settings, error=error.message, hint=error.hint)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            return Planned(job, settings, error=f"{where}{error.strerror or error}")
        except Exception as error:  # a checkpoint that nobody thought of must not stop the others
            if os.environ.get("PACKLIGHT_DEBUG"):
                raise
            return Planned(job, settings, error=f"{type(error).__name__}: {one_line(error)}")

    def _plan(self, job: BatchJob, settings: BuildSettings) -> Planned:
        check_options(settings)
        checkpoint = self._open(job)
        if checkpoint.revision:  # all jobs of a model see the same commit
            settings = replace(settings, hub={**settings.hub, "revision": checkpoint.revision})
        recipe = resolved_recipe(settings)
        gates.parse(recipe.gates)
        replan = replanner(checkpoint, recipe, settings)
        prepared = first_choice(settings, replan)
        threads = share_threads(prepared.config, settings.threads, self._cpus, self._jobs)
        settings = replace(settings, threads=threads)
        found = predict(prepared, verify=settings.verify, threads=threads)
        if job.memory is not None:
            check_enough(job.memory, smallest_memory(prepared, verify=settings.verify))
            found = replace(found, memory=job.memory)
        if found.memory > self._memory:
            raise UsageError(
                f"needs {format_bytes(found.memory)} of memory, the batch has "
                f"{format_bytes(self._memory)}",
                hint="a larger --max-memory; or memory: SIZE in its options, if you know better",
            )
        text = [settings.eval_text] if settings.eval_text else []
        verification = {
            "verify": recipe.to_dict()["verify"] if settings.verify else None,
            "text": files_digest(text),
        }
        told = {**identity_of(prepared, settings), **verification}
        return Planned(job, settings, found, fingerprint(told))

    def _open(self, job: BatchJob) -> Checkpoint:
        key = (job.model, job.revision)
        if key not in self._opened:
            try:
                opened: Checkpoint | PacklightError = Checkpoint.open(
                    job.model, revision=job.revision or None
                )
            except PacklightError as error:
                opened = error
            self._opened[key] = opened
        found = self._opened[key]
        if isinstance(found, PacklightError):
            raise found
        return found


def check_enough(given: int, smallest: int) -> None:
    """``memory`` of a job becomes its ``--max-memory``, which has a least value.

    Raises:
        UsageError: it is less.
    """
    if given < smallest:
        raise UsageError(
            f"memory: {format_bytes(given)} is too little for this model",
            hint=f"memory: {-(-smallest // 10**6)}MB is the smallest that works",
        )
