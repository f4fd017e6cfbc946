"""Verification: the written file, in its real runtime, against the float model.

How a build uses it::

    limits = gates.parse(recipe.gates)                         # before any work
    store = BaselineStore.write(work, windows, decoder.stream_logits(windows))
    for artifact in artifacts:
        found = verify_artifact(shipyard.probe, artifact.path, artifact.format, store, context=2048)
    # found.quality, found.resources, found.generation → compress.report.report, → gates.judge

One child process per artifact does everything (``examine``): load, prefill, decode, memory,
generation with and without the cache, then the logits of every window (``compress.verify.agenda``
has it run by run, and so has whoever waits for it). Its native code may crash
without taking the build along, the model is loaded once, and its memory is read before the scoring
buffers exist. What is large (scores of every token) comes back as a file in the work folder. Where
``packlight verify --task`` left requests there (``compress.verify.tasks``), they are scored last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError, PacklightError
from compress.plan.shapes import Runtime
from compress.verify import quality, resources, tasks
from compress.verify.agenda import REPEATS, SECONDS, Agenda
from compress.verify.baseline import BaselineStore, Float32
from compress.verify.child import SILENCE, Emit, run_child
from compress.verify.generate import Generation, check_generation
from compress.verify.quality import Quality, TokenScores
from compress.verify.resources import Resources, Speed
from compress.verify.tasks import TaskScore, TaskSet

__all__ = ["BaselineStore", "Outcome", "Verified", "examine", "verify_artifact"]

EVERY = 0.1  # seconds between two signs of life

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Verified:
    """What was found out about one artifact."""

    quality: Quality
    resources: Resources
    generation: Generation
    tasks: tuple[TaskScore, ...] = ()


Outcome = Verified | PacklightError | None
"""What became of an artifact: its figures, why it could not be run, or None where nobody tried."""


def verify_artifact(
    probe: Sequence[str],
    path: Path,
    format: str,
    baseline: BaselineStore,
    *,
    context: int,
    threads: int = 0,
    task_set: TaskSet | None = None,
    progress: Progress | None = None,
    silence: float = SILENCE,
) -> Verified:
    """Run one artifact in a child process and compare it with the float model.

    Args:
        probe: the command that opens artifacts (``exporters.SHIPYARD.probe``); it is given
            ``FORMAT PATH --baseline FOLDER --scores FILE --context N --threads N``.
        path: the artifact.
        format: ``gguf``, ``onnx``, ``coreml``.
        baseline: the float model's logits.
        context: positions to make room for; windows and generation must fit.
        threads: 0 for the CPUs that the process may use.
        task_set: with the float model's answers, which left the requests in ``baseline.folder``.
        progress: called with tokens done and in all, when it is loaded and then as they are run
            (``Agenda.tokens``; speed is measured for a time, and what is left out is in no total).
        silence: seconds without news after which the child is ended.

    Raises:
        ArtifactError: the runtime refuses the artifact, crashes or hangs.
        RuntimeMissingError: there is no runtime for the format.
    """
    scores = baseline.folder / f"scores-{format}.npz"
    command = [*probe, format, str(path), "--baseline", str(baseline.folder)]
    command += ["--scores", str(scores), "--context", str(context), "--threads", str(threads)]
    agenda = Agenda.of(
        [len(window) for window in baseline.windows], context, task_set.lengths if task_set else ()
    )
    found: dict[str, Any] = {"left_out": 0}
    with closing(run_child(command, f"{path.name} ({format})", silence=silence)) as events:
        for event in events:
            found.update(event)
            if "tokens" in event and progress:
                progress(event["tokens"], agenda.tokens - found["left_out"])
    try:
        summary = quality.summarize(TokenScores.load(scores))
        speed = Speed(**found["resources"].pop("speed"))
        used = Resources(**found["resources"], speed=speed)
        told = found["generation"]  # JSON has lists for tuples
        generation = Generation(tuple(told.pop("prompt")), tuple(told.pop("tokens")), **told)
        judged = task_set.judge(found["log_likelihoods"]) if task_set else ()
    except (KeyError, OSError) as error:
        raise ArtifactError(f"{path.name} ({format}): the child gave no result: {error}") from error
    finally:
        scores.unlink(missing_ok=True)
    return Verified(summary, used, generation, judged)


def examine(
    open_runtime: Callable[[], Runtime],
    baseline: BaselineStore,
    scores: Path,
    context: int,
    emit: Emit,
) -> None:
    """The child's work, from loading to the scores of every token, and of every choice of tasks.

    Emits ``stage`` before each part, ``resources``, ``generation`` and ``log_likelihoods``;
    ``tokens`` (run so far) in between, so that a large model in a slow runtime is not taken for
    dead, and once ``left_out`` (tokens that there was no time for when speed was measured).
    """
    requests = tasks.load_requests(baseline.folder)
    agenda = Agenda.of(
        [len(window) for window in baseline.windows], context, tasks.lengths(requests)
    )
    text = [int(token) for window in baseline.windows[:4] for token in window]
    prompt, count = text[: agenda.prompt], Count(emit)
    emit({"stage": "loading"})
    runtime, used = resources.measure(
        lambda: Audible(open_runtime(), count),
        prompt,
        agenda.decoded,
        repeats=REPEATS,
        seconds=SECONDS,
    )
    try:
        left_out = sum(run.tokens for run in agenda.speed_runs) - count.tokens
        emit({"resources": asdict(used), "tokens": count.tokens, "left_out": left_out})
        emit({"stage": "generating"})
        sample = check_generation(runtime, prompt[: agenda.sample_prompt], agenda.generated)
        count.add(agenda.sample_runs[-1].tokens)
        emit({"generation": asdict(sample), "tokens": count.tokens, "stage": "computing logits"})
        result = quality.score(
            runtime, baseline, lambda done, total: count.add(agenda.windows[done - 1])
        )
        result.save(scores)
        emit({"tokens": count.tokens, "stage": "answering tasks"})
        answers = tasks.score(
            requests,
            lambda batch: map(runtime.logits, batch),
            lambda done, total: count.add(agenda.asked[done - 1]),
        )
        emit({"tokens": count.tokens, "log_likelihoods": answers})
    finally:
        runtime.close()


class Count:
    """Tokens that were run; told at first, and then once in ``EVERY`` seconds at most."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._said = -EVERY
        self.tokens = 0

    def add(self, tokens: int) -> None:
        """So many more."""
        self.tokens += tokens
        if time.monotonic() > self._said + EVERY:
            self._said = time.monotonic()
            self._emit({"tokens": self.tokens})


class Audible:
    """A runtime that counts what it is fed."""

    def __init__(self, runtime: Runtime, count: Count) -> None:
        self._runtime = runtime
        self._count = count
        count.add(0)  # it is loaded

    @property
    def name(self) -> str:
        return self._runtime.name

    @property
    def vocab_size(self) -> int:
        return self._runtime.vocab_size

    def logits(self, tokens: Sequence[int]) -> Float32:
        return self._runtime.logits(tokens)  # counted by who asked for them, when all is done

    def reset(self) -> None:
        self._runtime.reset()

    def feed(self, tokens: Sequence[int]) -> Float32:
        result = self._runtime.feed(tokens)
        self._count.add(len(tokens))
        return result

    def close(self) -> None:
        self._runtime.close()
