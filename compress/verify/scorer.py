"""Scores artifacts on a text: the float model once, then every artifact in its runtime."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress.calibration.texts import read_words
from compress.checkpoint.checkpoint import Stored
from compress.console import Console, format_bytes
from compress.decoder.tokenizer_texts import texts_for
from compress.errors import ArtifactError, CheckpointError, RuntimeMissingError, UsageError
from compress.files import check_unchanged, scratch_folder
from compress.machine import available_memory, resident_memory
from compress.plan.job import GENERATED_ROOM, Job, choose_threads, window_count, window_length
from compress.plan.memory import embedding_bytes
from compress.plan.shapes import Artifact, Plan
from compress.verify import Outcome, Verified, verify_artifact
from compress.verify.agreement import (
    Agreement,
    Ids,
    compare,
    encode_all,
    save_texts,
    tokenizer_beside,
)
from compress.verify.baseline import BaselineCache, BaselineStore
from compress.verify.resources import Speed, measure_speed
from compress.verify.tasks import Task, TaskSet

if TYPE_CHECKING:
    from compress.decoder.decoder import Decoder

__all__ = ["Scorer", "describe_verification", "read_text", "text_name"]


def read_text(path: Path | None) -> str:
    """The evaluation text: the user's, or the built-in held-out text.

    Raises:
        UsageError: missing, not UTF-8, or empty.
    """
    from compress.demo import heldout_path

    empty = "a few hundred KB of plain text are right"
    return read_words(path or heldout_path(), "--eval-text takes a text file", empty)


def text_name(path: Path | None) -> str:
    """The name of an evaluation text in reports."""
    return path.name if path else BUILTIN_TEXT


def describe_verification(job: Job, plans: Sequence[Plan]) -> str:
    """``verify the float model, gguf Q4_K_M on 16 windows of 512 tokens``.

    Args:
        job: with the float model and the recipe's windows.
        plans: of the artifacts.
    """
    windows = window_count(job.config, job.recipe.windows)
    length = window_length(job.config, job.plans, job.recipe.sequence_length)
    formats = ", ".join(f"{plan.format} {plan.type_name}" for plan in plans)
    return f"verify the float model, {formats} on {windows} windows of {length} tokens"


BUILTIN_TEXT = "built-in"  # name of the held-out text in reports
FLOAT_MEMORY = 2_500_000_000  # bytes of the process beyond which the float model is not timed


class Scorer:
    """Scores artifacts on one text against the float model, which is computed once.

    Attributes:
        speed: of the float model with its weights in memory; None when they would not fit.
        runtime: name of the float model's runtime.
        notes: lines for the report.
    """

    def __init__(
        self,
        job: Job,
        text: str,
        threads: int,
        console: Console,
        tasks: Sequence[Task] = (),
        cache: Path | None = None,
    ) -> None:
        """Cut the text into windows, and the tasks into requests.

        Args:
            cache: folder of cached baselines, or None.

        Raises:
            UsageError: the text gives fewer than two windows, or a question is too long.
            CheckpointError: no tokenizer.
        """
        from compress.decoder.tokenizer import eval_windows

        self._job, self._console, self._cache = job, console, cache
        self._threads = choose_threads(threads, job.config)
        self.length = window_length(job.config, job.plans, job.recipe.sequence_length)
        self.tokenizer = job.checkpoint.tokenizer
        self._texts = texts_for(self.tokenizer)
        count = window_count(job.config, job.recipe.windows)
        self.windows = eval_windows(text, self.tokenizer, self.length, count)
        room = window_length(job.config, job.plans, job.context)
        self.task_set = TaskSet(tasks, self.tokenizer, room)
        self.speed: Speed | None = None
        self.runtime = ""
        self.notes: list[str] = []
        if len(self.windows) < 2:
            raise UsageError(
                f"the text gives 1 window of {self.length} tokens, at least 2 are needed",
                hint="a longer --eval-text, or shorter windows (verify.sequence_length)",
            )

    def verify(
        self,
        artifacts: Sequence[Artifact],
        folder: Path | None,
        *,
        keep_going: bool,
    ) -> list[Outcome]:
        """Score the float model, then every artifact in its runtime, each in a child process.

        Args:
            artifacts: to run.
            folder: for the baseline meanwhile; None: in ``TMPDIR``.
            keep_going: run the other artifacts where one cannot be run.

        Raises:
            PacklightError: the float model cannot be computed; without ``keep_going`` also an
                artifact that cannot be run.
        """
        found: list[Outcome] = []
        with scratch_folder(folder) as scratch:
            store = self._score_baseline(scratch)
            save_texts(scratch, self._texts)
            for artifact in artifacts:
                try:
                    found.append(self._score(artifact, store))
                except (ArtifactError, RuntimeMissingError) as error:
                    if not keep_going:
                        raise
                    found.append(error)
        return found

    def _score(self, artifact: Artifact, store: BaselineStore) -> Verified:
        """Score one artifact; the time left is estimated from its first window."""
        plan, context = artifact.plan, max(self._job.context, self.length + GENERATED_ROOM)
        context = min(context, plan.max_context or context)
        label = f"verify {artifact.format} {artifact.type_name}"
        with self._console.progress(label, "tokens") as update:
            verified = verify_artifact(
                artifact.path,
                artifact.format,
                store,
                context=context,
                threads=self._threads,
                task_set=self.task_set,
                progress=update,
            )
        return replace(verified, agreement=self._agreement(artifact.path, verified.token_ids))

    def _agreement(self, path: Path, found: Ids | None) -> Agreement | None:
        """Compare an artifact's tokenizer, by its ids or its files, with the checkpoint's."""
        rows = self._job.config.vocab_size
        try:
            beside = None if found else tokenizer_beside(path, rows)
        except CheckpointError as error:
            raise ArtifactError(f"the tokenizer beside {path.name}: {error.message}") from error
        found = encode_all(beside.encode, self._texts) if beside else found
        if not found:
            return None
        return compare(self._texts, encode_all(self.tokenizer.encode, self._texts), found)

    def _score_baseline(self, folder: Path) -> BaselineStore:
        from compress.decoder.decoder import Decoder

        job = self._job
        stored = Stored(job.checkpoint, job.config)
        decoder = Decoder(job.config, stored.read, threads=self._threads)
        self.runtime = decoder.name
        cache = self._baseline_cache(stored.fingerprint())
        if cache:
            self._console.begin("look for the float model's answers")  # or wait for another build
        with cache.found(folder) if cache else nullcontext() as found:
            if found:
                store, self.speed = found
            else:
                store = self._answers(decoder, folder)
                self.speed = self._measure_speed(stored)
                check_unchanged(job.checkpoint.opened)
                if cache:
                    cache.save(folder, self.speed)
        if self.speed is None:
            self.notes.append(
                f"The float model's speed was not measured: its weights take "
                f"{format_bytes(4 * job.config.num_parameters)} in memory, more than "
                f"{format_bytes(FLOAT_MEMORY)} or than there was room for."
            )
        return store

    def _answers(self, decoder: Decoder, folder: Path) -> BaselineStore:
        """Run the float model on the windows and tasks; writes the baseline into ``folder``."""
        with self._console.progress("score the float model", "steps") as update:
            logits = decoder.stream_logits(self.windows, progress=update)
            store = BaselineStore.write(folder, self.windows, logits)
        if self.task_set.tasks:
            with self._console.progress("ask the float model", "sequences") as update:
                self.task_set.ask_baseline(folder, decoder.stream_logits, update)
        return store

    def _measure_speed(self, stored: Stored) -> Speed | None:
        """The float model's speed, for the report's ratio; None where it is too large."""
        from compress.decoder.decoder import Decoder

        config = self._job.config
        needed = 4 * config.num_parameters + embedding_bytes(config)
        if needed > min(available_memory(), FLOAT_MEMORY - resident_memory()):
            return None
        with self._console.progress("time the float model", ""):
            resident = Decoder(config, stored.read, threads=self._threads, resident=True)
            prompt = self.windows[0][: self.length // 2]
            speed = measure_speed(resident, prompt, min(32, self.length // 4), seconds=10)
            resident.close()
        return speed

    def _baseline_cache(self, fingerprint: str) -> BaselineCache | None:
        """The cache entry of the baseline; None with tasks, which also need other logits."""
        if not self._cache or self.task_set.tasks:
            return None
        asked = f"{self.runtime}, {self._threads} threads"
        return BaselineCache.of(self._cache, fingerprint, self.windows, asked)
