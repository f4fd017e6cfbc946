"""Verification: the written file, in its real runtime, against the float model.

How a build uses it::

    limits = gates.parse(recipe.gates)                         # before any work
    store = BaselineStore.write(work, windows, decoder.stream_logits(windows))
    for artifact in artifacts:
        found = verify_artifact(artifact.path, artifact.format, store, context=2048)
    # found.quality, found.resources, found.generation → compress.report.describe, → gates.judge

One child process per artifact does everything (``examine``): load, prefill, decode, memory,
generation with and without the cache, then the logits of every window. A crash of its native code
does not end the build, the model is loaded once, and memory is read before the scoring buffers
exist. The scores of every token are returned as a file in the work folder. Requests that
``packlight verify --task`` wrote there (``compress.verify.tasks``) are scored last.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError, PacklightError
from compress.plan.shapes import Runtime
from compress.verify import quality, tasks
from compress.verify.agreement import Agreement, Encode, Ids, encode_all, load_texts
from compress.verify.baseline import BaselineStore, Float32
from compress.verify.child import SILENCE, Emit, Event, run_child
from compress.verify.generate import (
    GENERATED_TOKENS,
    PROMPT_TOKENS,
    Generation,
    check_generation,
)
from compress.verify.quality import Quality, TokenScores
from compress.verify.resources import (
    DECODE_TOKENS,
    PREFILL_TOKENS,
    SECONDS,
    Resources,
    Speed,
    measure,
)
from compress.verify.tasks import TaskScore, TaskSet

__all__ = ["BaselineStore", "Outcome", "Verified", "examine", "verify_artifact"]

# -P: a folder named `exporters` in the current directory must not shadow packlight's.
PROBE = (sys.executable, "-P", "-m", "exporters.probe")
EVERY = 0.1  # seconds between two progress events of a child

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Verified:
    """The measurements of one artifact.

    Attributes:
        token_ids: of the texts in ``agreement.TEXTS_FILE``, by the tokenizer in the file; None
            without one.
        agreement: of its tokenizer with the checkpoint's; None without a tokenizer.
    """

    quality: Quality
    resources: Resources
    generation: Generation
    tasks: tuple[TaskScore, ...] = ()
    token_ids: Ids | None = None
    agreement: Agreement | None = None


Outcome = Verified | PacklightError | None
"""Result of an artifact: its figures, why it could not be run, or None where it was not run."""


def verify_artifact(
    path: Path,
    format: str,
    baseline: BaselineStore,
    *,
    context: int,
    threads: int = 0,
    task_set: TaskSet | None = None,
    progress: Progress | None = None,
    silence: float = SILENCE,
    probe: Sequence[str] = PROBE,
) -> Verified:
    """Run one artifact in a child process and compare it with the float model.

    Args:
        path: the artifact.
        format: ``gguf``, ``onnx``, ``coreml``.
        baseline: the float model's logits.
        context: positions to make room for; windows and generation must fit.
        threads: 0 for the CPUs that the process may use.
        task_set: tasks after ``ask_baseline``, which wrote their requests to ``baseline.folder``.
        progress: called with tokens scored and in all (of windows and tasks), first with 0 when
            loading, the measurement of speed and the greedy sample are over.
        silence: seconds without an event after which the child is ended.
        probe: the command that opens artifacts; called with ``FORMAT PATH --baseline FOLDER
            --scores FILE --context N --threads N``.

    Raises:
        ArtifactError: the runtime refuses the artifact, crashes or hangs.
        RuntimeMissingError: there is no runtime for the format.
    """
    scores = baseline.folder / f"scores-{format}.npz"
    command = [*probe, format, str(path), "--baseline", str(baseline.folder)]
    command += ["--scores", str(scores), "--context", str(context), "--threads", str(threads)]
    total = sum(map(len, baseline.windows)) + (sum(task_set.lengths) if task_set else 0)
    found: dict[str, Any] = {}
    with closing(run_child(command, f"{path.name} ({format})", silence=silence)) as events:
        for event in events:
            found.update(event)
            if "tokens" in event and progress:
                progress(event["tokens"], total)
    try:
        summary = quality.summarize(TokenScores.load(scores))
        speed = Speed(**found["resources"].pop("speed"))
        used = Resources(**found["resources"], speed=speed)
        sample = found["generation"]  # JSON has lists for tuples
        generation = Generation(tuple(sample.pop("prompt")), tuple(sample.pop("tokens")), **sample)
        judged = task_set.judge(found["log_likelihoods"]) if task_set else ()
    except (KeyError, OSError) as error:
        raise ArtifactError(f"{path.name} ({format}): the child gave no result: {error}") from error
    finally:
        scores.unlink(missing_ok=True)
    return Verified(summary, used, generation, judged, found.get("token_ids"))


def examine(
    open_runtime: Callable[[], Runtime],
    baseline: BaselineStore,
    scores: Path,
    context: int,
    emit: Emit,
    *,
    seconds: float = SECONDS,
    every: float = EVERY,
) -> None:
    """Run in the child: load an artifact, measure it, and score every token and task choice.

    Emits ``stage`` before each part, then ``resources``, ``token_ids``, ``generation`` and
    ``log_likelihoods``; ``tokens`` (scored so far) during windows and tasks; and empty events
    before that, so that a large model in a slow runtime is not taken for dead.

    Args:
        open_runtime: loads the artifact.
        baseline: the float model's logits.
        scores: the file for the scores of every token.
        context: positions that the runtime has room for.
        emit: sends an event to the parent.
        seconds: time after which no further speed measurement starts.
        every: least seconds between two progress events.
    """
    requests = tasks.load_requests(baseline.folder)
    asked = tasks.lengths(requests)
    texts = load_texts(baseline.folder)
    text = [int(token) for window in baseline.windows[:4] for token in window]
    prompt = text[: max(1, min(PREFILL_TOKENS, context // 2))]
    decoded = min(DECODE_TOKENS, context - len(prompt))
    sample_prompt = prompt[: max(1, min(PROMPT_TOKENS, context // 4))]
    generated = min(GENERATED_TOKENS, context - len(sample_prompt))
    events = Throttled(emit, every)
    emit({"stage": "loading"})
    runtime, used = measure(
        lambda: Observed(open_runtime(), lambda: events.emit({})),
        prompt,
        decoded,
        seconds=seconds,
    )
    try:
        if encode := getattr(runtime, "tokenize", None):  # the tokenizer is in the file
            emit({"stage": "tokenizing"})
            emit({"token_ids": encode_all(encode, texts)})
        emit({"resources": asdict(used), "stage": "generating"})
        sample = check_generation(runtime, sample_prompt, generated)
        emit({"generation": asdict(sample), "tokens": 0, "stage": "computing logits"})
        scored = list(accumulate(map(len, baseline.windows)))
        result = quality.score(
            runtime, baseline, lambda done, total: events.emit({"tokens": scored[done - 1]})
        )
        result.save(scores)
        emit({"tokens": scored[-1], "stage": "answering tasks"})
        scored = list(accumulate(asked, initial=scored[-1]))
        answers = tasks.score(
            requests,
            lambda batch: map(runtime.logits, batch),
            lambda done, total: events.emit({"tokens": scored[done]}),
        )
        emit({"tokens": scored[-1], "log_likelihoods": answers})
    finally:
        runtime.close()


class Throttled:
    """Forwards the first event, then at most one every ``every`` seconds."""

    def __init__(self, emit: Emit, every: float) -> None:
        self._emit, self._every = emit, every
        self._last = -math.inf

    def emit(self, event: Event) -> None:
        """Forward an event, or drop it."""
        if time.monotonic() >= self._last + self._every:
            self._last = time.monotonic()
            self._emit(event)


class Observed:
    """Wraps a runtime and calls ``seen()`` when it is loaded and after each ``feed``."""

    def __init__(self, runtime: Runtime, seen: Callable[[], None]) -> None:
        self._runtime, self._seen = runtime, seen
        seen()

    @property
    def name(self) -> str:
        return self._runtime.name

    @property
    def vocab_size(self) -> int:
        return self._runtime.vocab_size

    @property
    def tokenize(self) -> Encode | None:
        return getattr(self._runtime, "tokenize", None)

    def logits(self, tokens: Sequence[int]) -> Float32:
        return self._runtime.logits(tokens)

    def reset(self) -> None:
        self._runtime.reset()

    def feed(self, tokens: Sequence[int]) -> Float32:
        result = self._runtime.feed(tokens)
        self._seen()
        return result

    def close(self) -> None:
        self._runtime.close()
