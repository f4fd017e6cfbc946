"""One batch: read the jobs, plan each, skip finished ones, run the rest, write the results."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.batch import document, page
from compress.batch.engine import Engine, Work
from compress.batch.jobs import arguments, read_jobs, select
from compress.batch.output_tree import OutputTree
from compress.batch.planning import Planned, Planner
from compress.batch.state import State
from compress.batch.table import Board
from compress.batch.workers import Workers, open_workers
from compress.checkpoint.remote import write_text
from compress.console import Console
from compress.decoder.config_json import write_json
from compress.output.folder import check_disk, locked, remove
from compress.report.ci import CiFiles

__all__ = ["BatchSettings", "batch"]


@dataclass(frozen=True)
class BatchSettings:
    """Settings of ``packlight batch``: one field for each option of the same name."""

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


def batch(settings: BatchSettings, console: Console) -> int:
    """``packlight batch``: 0 when all passed, 1 when a gate failed, 2 when a job could not run.

    Raises:
        PacklightError: the jobs file is not valid, another batch writes to the same tree, the
            cluster does not answer, or the disk is full; nothing was started.
    """
    if settings.ci_files:
        settings.ci_files.check()
    file = read_jobs(settings.file)
    tree = OutputTree.at(settings.output or file.output)
    options = (settings.engine, settings.address, settings.max_memory, settings.jobs)
    with open_workers(*options) as workers:
        chosen = select(file.jobs, settings.only)
        planner = Planner(tree.folder, workers.memory, workers.cpus, settings.jobs)
        planned = [planner.plan(job) for job in chosen]
        if settings.dry_run:
            document.print_plan(planned, console, workers.memory, workers.cpus)
            return 2 if any(one.error for one in planned) else 0
        with locked(tree.folder):
            result = run_planned(planned, tree, workers, settings, console)
    document.finish(result, tree.folder, console, tree.url)
    return int(result["exit_code"])


def run_planned(
    planned: Sequence[Planned],
    tree: OutputTree,
    workers: Workers,
    settings: BatchSettings,
    console: Console,
) -> dict[str, Any]:
    """Run the jobs that are not done, and write ``batch.json`` and ``batch.html`` in any case."""
    state = State(tree.folder)
    todo = [one for one in planned if wanted(one, state, settings.retry_failed)]
    check_disk(tree.folder, sum(one.prediction.bytes for one in todo if one.prediction))
    board = Board(planned, state, console, fail_fast=settings.fail_fast)
    for one in planned:
        if one not in todo:
            board.settle(one, state.read(one.name))
    try:
        run(todo, state, workers.engine(tree), board)
    except (KeyboardInterrupt, SystemExit) as ending:
        board.interrupt()
        ending.add_note("the same command goes on with what is there")
        raise
    finally:
        result = document.batch_document(
            settings.file, planned, board, state, workers.memory, workers.cpus
        )
        write_json(tree.folder / "batch.json", result)
        (tree.folder / "batch.html").write_text(page.render(result), encoding="utf-8")
        for name in ("batch.json", "batch.html") if tree.url else ():
            write_text(tree.url, name, (tree.folder / name).read_text(encoding="utf-8"))
        reported = [job["name"] for job in result["jobs"] if job["report"]]
        reports = {name: found for name in reported if (found := state.report(name))}
        errors = {name: why for name, why in document.errors(result).items() if name not in reports}
        if settings.ci_files:
            settings.ci_files.write_all(reports, errors, document.markdown(result))
    return result


def wanted(one: Planned, state: State, retry_failed: bool) -> bool:
    """Whether to run a job now: not if it is impossible, finished, or, without ``retry_failed``,
    failed before with the same inputs.
    """
    record = state.read(one.name)
    if one.error:
        return False
    if record is None or record.fingerprint != one.fingerprint:
        return True
    failed = record.status in ("error", "killed")
    return not record.finished and (retry_failed or not failed)


def run(todo: Sequence[Planned], state: State, engine: Engine, board: Board) -> None:
    """Run jobs, and record each start and end."""
    jobs = {one.name: one for one in todo}
    leaders = first_of_models(todo)
    models = Counter(one.job.model_name for one in todo)  # remaining jobs by model
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
            if not models[one.job.model_name]:  # its baseline takes gigabytes
                shutil.rmtree(state.baselines(one.job.model_name), ignore_errors=True)


def first_of_models(todo: Sequence[Planned]) -> dict[str, str]:
    """Model → its first job: the longest, which caches most for the others (Hessians also serve
    jobs that need only importance).
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
    """The ``Work`` of a job, with ``--overwrite`` over another build's output, else ``--resume``.

    Args:
        leader: first job of its model.
        shared: whether its model has other jobs.
    """
    assert one.prediction is not None
    record = state.read(one.name)
    words = arguments(one.settings)
    if record is None or record.fingerprint != one.fingerprint:
        remove(state.partial_of(one.name))
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
