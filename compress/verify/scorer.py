"""Scores artifacts on a text: the float model once, then every artifact in its runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING

from compress import __version__
from compress.calibration.texts import read_words
from compress.checkpoint.checkpoint import Stored
from compress.console import Console, Update, format_bytes
from compress.decoder.tokenizer_texts import texts_for
from compress.errors import ArtifactError, CheckpointError, RuntimeMissingError, UsageError
from compress.files import cache_folder, check_unchanged, scratch_folder
from compress.machine import available_memory, resident_memory
from compress.plan.job import (
    GENERATED_ROOM,
    Job,
    baseline_bytes,
    choose_threads,
    scores_all,
    window_count,
    window_length,
)
from compress.plan.memory import embedding_bytes
from compress.plan.shapes import Artifact, Plan
from compress.verify import Outcome, Rounds, Verified, verify_artifact
from compress.verify.agreement import (
    Agreement,
    Ids,
    compare,
    encode_all,
    save_texts,
    tokenizer_beside,
)
from compress.verify.baseline import BaselineCache, BaselineStore
from compress.verify.gates import Limit
from compress.verify.resources import DECODE_TOKENS, PREFILL_TOKENS, Speed, measure_speed
from compress.verify.stopping import Stopping, shuffled
from compress.verify.tasks import Task, TaskSet
from compress.verify.turns import turn

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


ARTIFACT_MEMORY = 600_000_000  # bytes of a process that runs one, beside twice its file
TOGETHER = 4_000_000_000  # bytes of all processes that run at a time, at most
CACHE_LIMIT = 2_000_000_000  # bytes of all baselines that are kept without being asked for
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
        limits: Sequence[Limit] = (),
        shared: bool = True,
    ) -> None:
        """Cut the text into windows, and the tasks into requests.

        Args:
            cache: folder of cached baselines, or None.
            shared: rather keep the baseline of a model that is not small in ``cache_folder``, for
                any build of it, at most ``CACHE_LIMIT`` bytes of all models.
            limits: the gates; with them, windows are scored until their verdict stands.

        Raises:
            UsageError: the text gives one window where more are wanted, or a question is too long.
            CheckpointError: no tokenizer.
        """
        from compress.decoder.tokenizer import eval_windows

        self._job, self._console, self._cache, self._limit = job, console, cache, 0
        large = not scores_all(job.config, 0)
        if shared and large and not tasks and baseline_bytes(job) <= CACHE_LIMIT:
            with suppress(UsageError):  # a cache that cannot be written
                self._cache, self._limit = cache_folder("baselines"), CACHE_LIMIT
        self._threads = choose_threads(threads, job.config)
        self.length = window_length(job.config, job.plans, job.recipe.sequence_length)
        self.tokenizer = job.checkpoint.tokenizer
        self._texts = texts_for(self.tokenizer)
        count = window_count(job.config, job.recipe.windows)
        self.windows = eval_windows(text, self.tokenizer, self.length, count)
        self.stopping = Stopping(
            tuple(limits), len(self.windows), scores_all(job.config, job.recipe.windows)
        )
        self._counts: Mapping[str, int] = {}
        self._places: list[int] | None = None
        if not self.stopping.exact:
            self.windows, self._places = shuffled(self.windows)
        room = window_length(job.config, job.plans, job.context)
        self.task_set = TaskSet(tasks, self.tokenizer, room)
        self.speed: Speed | None = None
        self.runtime = ""
        self.notes: list[str] = []
        self._extending, self._stop = Lock(), Event()
        self._entry: BaselineCache | None = None
        if len(self.windows) < min(2, count):
            raise UsageError(
                f"the text gives 1 window of {self.length} tokens, at least 2 are needed",
                hint="a longer --eval-text, or shorter windows (verify.sequence_length)",
            )

    def repeat(self, counts: Mapping[str, int]) -> None:
        """Score so many windows of each format, whatever they show; a comparison needs the same."""
        self._counts = counts

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
        with scratch_folder(folder) as scratch:
            store = self._begin(scratch)
            save_texts(scratch, self._texts)
            together = self._together(artifacts)
            names = [f"{a.format} {a.type_name}" for a in artifacts]
            found: list[Outcome] = []
            # Several at a time: each computes on its share of the threads, where none waits
            # for another, and what runs on one thread anyway (imports, loading) overlaps.
            for first in range(0, len(artifacts), together):
                some = artifacts[first : first + together]
                label = ", ".join(names[first : first + together])
                with self._console.progress(f"verify {label}", "tokens") as update:
                    found += self._run(some, store, update, keep_going)
            check_unchanged(self._job.checkpoint.opened)
            if self._store.ready > self._cached:
                self._keep()
        return found

    def _run(
        self, artifacts: Sequence[Artifact], store: BaselineStore, update: Update, keep_going: bool
    ) -> list[Outcome]:
        """Score some artifacts at a time; an error of one, or an interrupt, ends the others."""

        def outcome(index: int) -> Outcome:
            try:
                return self._score(artifacts[index], store, partial(each, index), len(artifacts))
            except (ArtifactError, RuntimeMissingError) as error:
                if not keep_going:
                    raise
                return error

        each = summed(update, len(artifacts))
        self._stop.clear()
        if len(artifacts) == 1:
            return [outcome(0)]
        with ThreadPoolExecutor(len(artifacts)) as pool:
            jobs = [pool.submit(copy_context().run, outcome, i) for i in range(len(artifacts))]
            try:
                wait(jobs, return_when=FIRST_EXCEPTION)
                failed = [job for job in jobs if job.done() and job.exception()]
                return [job.result() for job in failed or jobs]
            except BaseException:
                self._stop.set()
                raise

    def _together(self, artifacts: Sequence[Artifact]) -> int:
        """How many artifacts run at a time: all, or one where they would need much memory."""
        needed = sum(ARTIFACT_MEMORY + 2 * artifact.nbytes for artifact in artifacts)
        return len(artifacts) if needed < min(available_memory(), TOGETHER) else 1

    def _score(
        self, artifact: Artifact, store: BaselineStore, update: Update, together: int
    ) -> Verified:
        """Score one artifact; the time left is estimated from its first window."""
        plan, context = artifact.plan, max(self._job.context, self.length + GENERATED_ROOM)
        context = min(context, plan.max_context or context)
        stopping = self.stopping
        if counted := self._counts.get(artifact.format):
            stopping = replace(stopping, most=counted, exact=True)
        verified = verify_artifact(
            artifact.path,
            artifact.format,
            store,
            Rounds(stopping, self._extend, self._places),
            context=context,
            threads=self._threads,
            scoring_threads=max(1, self._threads // together) if together > 1 else 0,
            task_set=self.task_set,
            progress=update,
            stop=self._stop,
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

    def _begin(self, folder: Path) -> BaselineStore:
        """The baseline of the first round's windows, from the cache or computed."""
        from compress.decoder.decoder import Decoder

        job = self._job
        stored = Stored(job.checkpoint, job.config)
        decoder = Decoder(job.config, stored.read, threads=self._threads)
        self.runtime, self._decoder = decoder.name, decoder
        self._entry = self._baseline_cache(stored.fingerprint())
        first = max([self.stopping.first(), *self._counts.values()])
        if self._entry:
            self._console.begin("look for the float model's answers")  # or wait for another build
        with self._entry.found(folder) if self._entry else nullcontext() as found:
            if found:
                self._store, self.speed = found
                if self._limit:
                    self.notes.append(
                        "The float model's answers are those of an earlier verification, from the "
                        "cache."
                    )
            else:
                self._store = self._answers(decoder, folder, first)
                self.speed = self._measure_speed(stored)
                check_unchanged(job.checkpoint.opened)
                self._keep()
        self._cached = self._store.ready
        if self.speed is None:
            self.notes.append(
                f"The float model's speed was not measured: its weights take "
                f"{format_bytes(4 * job.config.num_parameters)} in memory, more than "
                f"{format_bytes(FLOAT_MEMORY)} or than there was room for."
            )
        return self._store

    def _keep(self) -> None:
        """Save the baseline in the cache; where nobody asked for that, a full disk is no error."""
        with suppress(OSError) if self._limit else nullcontext():
            if self._entry:
                self._entry.save(self._store, self.speed)

    def _answers(self, decoder: Decoder, folder: Path, first: int) -> BaselineStore:
        """Run the float model on the first windows and tasks; writes the baseline."""
        store = BaselineStore.begin(folder, self.windows)
        with self._console.progress("score the float model", "steps") as update:
            logits = decoder.stream_logits(self.windows[:first], progress=update)
            store = store.extend(logits, first)
        if self.task_set.tasks:
            with self._console.progress("ask the float model", "sequences") as update:
                self.task_set.ask_baseline(folder, decoder.stream_logits, update)
        return store

    def _extend(self, ready: int) -> None:
        """Run the float model on further windows, for the first artifact that wants them."""
        with self._extending:
            store = self._store
            if ready > store.ready:
                with turn(store.folder):
                    windows = self.windows[store.ready : ready]
                    logits = self._decoder.stream_logits(windows, progress=self._check_stop)
                    self._store = store.extend(logits, ready)

    def _check_stop(self, done: int, total: int) -> None:
        if self._stop.is_set():
            raise ArtifactError("ended with the others")

    def _measure_speed(self, stored: Stored) -> Speed | None:
        """The float model's speed, for the report's ratio; None where it is too large."""
        from compress.decoder.decoder import Decoder

        config = self._job.config
        needed = 4 * config.num_parameters + embedding_bytes(config)
        if needed > min(available_memory(), FLOAT_MEMORY - resident_memory()):
            return None
        with self._console.progress("time the float model", ""):
            resident = Decoder(config, stored.read, threads=self._threads, resident=True)
            prompt = self.windows[0][: min(PREFILL_TOKENS, self.length // 2)]
            decoded = min(DECODE_TOKENS, self.length // 4)
            speed = measure_speed(resident, prompt, decoded, seconds=10)
            resident.close()
        return speed

    def _baseline_cache(self, fingerprint: str) -> BaselineCache | None:
        """The cache entry of the baseline; None with tasks, which also need other logits."""
        if not self._cache or self.task_set.tasks:
            return None
        asked = f"{self.runtime}, {self._threads} threads, packlight {__version__}"
        entry = BaselineCache.of(self._cache, fingerprint, self.windows, asked)
        return replace(entry, limit=self._limit)


def summed(update: Update, count: int) -> Callable[[int, int, int], None]:
    """``update(done, total)`` of ``count`` children that run at a time, from that of each."""
    each = [(0, 0)] * count
    lock = Lock()

    def update_one(index: int, done: int, total: int) -> None:
        with lock:
            each[index] = done, total
            update(sum(done for done, _ in each), sum(total for _, total in each))

    return update_one
