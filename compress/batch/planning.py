"""Plans the jobs of a batch before any is started.

Each job is planned as by ``packlight build --dry-run``, from headers and recipes only. Jobs of a
model that cannot be built are not started; the model is planned again in every batch, so that no
retry option is needed when its files have changed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from compress.batch.jobs import BatchJob
from compress.batch.predict import Prediction, predict, share_threads
from compress.batch.state import fingerprint
from compress.build.decide import (
    BuildSettings,
    identity_of,
    prepare_job,
    resolved_recipe,
)
from compress.checkpoint.checkpoint import Checkpoint
from compress.console import format_bytes
from compress.errors import PacklightError, UsageError, one_line
from compress.output.lock import files_digest
from compress.plan.memory import smallest_memory
from compress.verify import gates

__all__ = ["Planned", "Planner"]


@dataclass(frozen=True)
class Planned:
    """A planned job.

    Attributes:
        job: of the file.
        settings: of its build.
        prediction: None where it cannot run.
        fingerprint: of everything that determines its result; empty where it cannot run.
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


class Planner:
    """Plans jobs; opens each model (and downloads a Hub id) once for all its jobs."""

    def __init__(self, output: Path, memory: int, cpus: int, jobs: int) -> None:
        self._output = output
        self._memory, self._cpus, self._jobs = memory, cpus, jobs
        self._opened: dict[tuple[str, ...], Checkpoint | PacklightError] = {}

    def plan(self, job: BatchJob) -> Planned:
        """Plan a job; errors are returned as part of it."""
        settings = job.settings(self._output / job.name)
        try:
            return self._plan(job, settings)
        except PacklightError as error:
            return Planned(job, settings, error=error.message, hint=error.hint)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            return Planned(job, settings, error=f"{where}{error.strerror or error}")
        except Exception as error:  # an unexpected error must not stop the other jobs
            if os.environ.get("PACKLIGHT_DEBUG"):
                raise
            return Planned(job, settings, error=f"{type(error).__name__}: {one_line(error)}")

    def _plan(self, job: BatchJob, settings: BuildSettings) -> Planned:
        checkpoint = self._open(job)
        if checkpoint.revision:  # all jobs of a model see the same commit
            settings = replace(settings, hub={**settings.hub, "revision": checkpoint.revision})
        recipe = resolved_recipe(settings)
        gates.parse(recipe.gates)
        prepared, _ = prepare_job(checkpoint, recipe, settings)
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
        inputs = {**identity_of(prepared, settings), **verification}
        return Planned(job, settings, found, fingerprint(inputs))

    def _open(self, job: BatchJob) -> Checkpoint:
        adapters = job.options.adapter or ()
        key = (job.model, job.revision, job.hub["fetch"], *adapters)
        if key not in self._opened:
            try:
                opened: Checkpoint | PacklightError = Checkpoint.open(
                    job.model, adapters=adapters, **job.hub
                )
            except PacklightError as error:
                opened = error
            self._opened[key] = opened
        found = self._opened[key]
        if isinstance(found, PacklightError):
            raise found
        return found


def check_enough(given: int, smallest: int) -> None:
    """Check a job's ``memory``, which becomes its ``--max-memory``, against the least value.

    Raises:
        UsageError: it is less.
    """
    if given < smallest:
        raise UsageError(
            f"memory: {format_bytes(given)} is too little for this model",
            hint=f"memory: {-(-smallest // 10**6)}MB is the smallest that works",
        )
