"""Verification: the written file, in its real runtime, against the float model.

How a build uses it::

    limits = gates.parse(recipe.gates)                         # before any work
    store = BaselineStore.begin(work, windows)
    for artifact in artifacts:
        rounds = Rounds(stopping, extend)                      # extends the baseline when needed
        found = verify_artifact(artifact.path, artifact.format, store, rounds, context=2048)
    # found.quality, found.resources, found.generation → compress.report.describe, → gates.judge

One child process per artifact does everything (``examine``): load, prefill, decode, memory,
generation with and without the cache, then the logits of windows, in rounds: after each it asks
whether to go on (``compress.verify.stopping``). A crash of its native code does not end the build,
the model is loaded once, and memory is read before the scoring buffers exist. The scores of every
token are returned as a file in the work folder. Several artifacts may run at a time; while one is
loaded and timed, the others wait (``compress.verify.turns``). Requests that
``packlight verify --task`` wrote there (``compress.verify.tasks``) are scored last.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from compress.errors import ArtifactError, PacklightError
from compress.plan.shapes import Runtime
from compress.verify import quality, tasks
from compress.verify.agreement import Agreement, Encode, Ids, encode_all, load_texts
from compress.verify.baseline import BaselineStore, Float32
from compress.verify.child import SILENCE, Ask, Emit, Event, run_child
from compress.verify.generate import (
    COSTLY_TOKENS,
    GENERATED_TOKENS,
    PROMPT_TOKENS,
    Generation,
    check_generation,
)
from compress.verify.parity import POSITIONS, vectors
from compress.verify.quality import Quality, TokenScores
from compress.verify.resources import (
    DECODE_TOKENS,
    PREFILL_TOKENS,
    SECONDS,
    Resources,
    Speed,
    measure,
)
from compress.verify.stopping import ALL, Stopping
from compress.verify.tasks import TaskScore, TaskSet
from compress.verify.turns import turn

__all__ = ["BaselineStore", "Outcome", "Verified", "examine", "verify_artifact"]

# -P: a folder named `exporters` in the current directory must not shadow packlight's.
PROBE = (sys.executable, "-P", "-m", "exporters.probe")
EVERY = 0.1  # seconds between two progress events of a child

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Verified:
    """The measurements of one artifact.

    Attributes:
        stopped: why no more windows were scored.
        remarks: of the runtime, on what it computed.
        token_ids: of the texts in ``agreement.TEXTS_FILE``, by the tokenizer in the file; None
            without one.
        agreement: of its tokenizer with the checkpoint's; None without a tokenizer.
        parity: some of its logits (``compress.verify.parity``), of a format for apps.
    """

    quality: Quality
    resources: Resources
    generation: Generation
    tasks: tuple[TaskScore, ...] = ()
    token_ids: Ids | None = None
    agreement: Agreement | None = None
    stopped: str = ALL
    parity: Mapping[str, Any] | None = None
    remarks: tuple[str, ...] = ()


Outcome = Verified | PacklightError | None
"""Result of an artifact: its figures, why it could not be run, or None where it was not run."""


def verify_artifact(
    path: Path,
    format: str,
    baseline: BaselineStore,
    rounds: Rounds | None = None,
    *,
    context: int,
    threads: int = 0,
    scoring_threads: int = 0,
    task_set: TaskSet | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    silence: float = SILENCE,
    probe: Sequence[str] = PROBE,
) -> Verified:
    """Run one artifact in a child process and compare it with the float model.

    Args:
        path: the artifact.
        format: ``gguf``, ``onnx``, ``coreml``.
        baseline: the float model's logits.
        rounds: how many windows are scored; None: all that the baseline has.
        context: positions to make room for; windows and generation must fit.
        threads: 0 for the CPUs that the process may use.
        scoring_threads: of the windows' logits, where the runtime can change them; 0: the same.
        task_set: tasks after ``ask_baseline``, which wrote their requests to ``baseline.folder``.
        progress: called with tokens scored and in all (of windows and tasks), first with 0 when
            loading, the measurement of speed and the greedy sample are over.
        stop: ends the child when it is set.
        silence: seconds without an event after which the child is ended.
        probe: the command that opens artifacts; called with ``FORMAT PATH --baseline FOLDER
            --scores FILE --context N --threads N``.

    Raises:
        ArtifactError: the runtime refuses the artifact, crashes or hangs.
        RuntimeMissingError: there is no runtime for the format.
    """
    scores = baseline.folder / f"scores-{format}-{path.name}.npz"
    command = [*probe, format, str(path), "--baseline", str(baseline.folder)]
    command += ["--scores", str(scores), "--context", str(context), "--threads", str(threads)]
    command += ["--scoring-threads", str(scoring_threads)]
    rounds = rounds or Rounds(Stopping((), baseline.ready), lambda ready: None)
    asked = sum(task_set.lengths) if task_set else 0
    found: dict[str, Any] = {}
    what = f"{path.name} ({format})"
    with closing(run_child(command, what, silence=silence, stop=stop)) as events:
        answer: int | None = None
        with suppress(StopIteration):
            while True:
                event = events.send(answer)
                found.update(event)
                answer = rounds.next(scores) if "ask" in event else None
                if "tokens" in event and progress:
                    total = sum(map(len, baseline.windows[: rounds.wanted])) + asked
                    progress(event["tokens"], total)
    try:
        summary = quality.summarize(rounds.scores())
        speed = Speed(**found["resources"].pop("speed"))
        used = Resources(**found["resources"], speed=speed)
        sample = found["generation"]  # JSON has lists for tuples
        generation = Generation(tuple(sample.pop("prompt")), tuple(sample.pop("tokens")), **sample)
        judged = task_set.judge(found["log_likelihoods"]) if task_set else ()
    except (KeyError, OSError) as error:
        raise ArtifactError(f"{path.name} ({format}): the child gave no result: {error}") from error
    finally:
        scores.unlink(missing_ok=True)
    ids, parity = found.get("token_ids"), found.get("parity")
    remarks = tuple(found.get("remarks", ()))
    return Verified(summary, used, generation, judged, ids, None, rounds.stopped, parity, remarks)


class Rounds:
    """The rounds of one artifact: how many windows are scored next, until it is enough.

    Args:
        stopping: when it is enough.
        extend: ``extend(ready)``: makes sure that the baseline has so many windows.
        places: of the baseline's windows in the text, where they are shuffled.

    Attributes:
        wanted: windows after the round that runs.
        stopped: why it ended; empty before.
    """

    def __init__(
        self,
        stopping: Stopping,
        extend: Callable[[int], object],
        places: Sequence[int] | None = None,
    ) -> None:
        self._stopping, self._extend, self._places = stopping, extend, places
        self._parts: list[TokenScores] = []
        self.wanted, self.stopped = stopping.first(), ""

    def next(self, scores: Path) -> int:
        """Take the scores of a finished round, if there are any; windows to have next, or 0."""
        if not scores.exists():  # before the first round
            self._extend(self.wanted)
            return self.wanted
        self._parts.append(TokenScores.load(scores))
        scores.unlink()
        reason = self._stopping.reason(TokenScores.joined(self._parts))
        if reason is None:
            self.wanted = self._stopping.after(self.wanted)
            self._extend(self.wanted)
        self.stopped = reason or ""
        return 0 if reason else self.wanted

    def scores(self) -> TokenScores:
        """All scores, in the order of the text.

        Raises:
            KeyError: there are none.
        """
        if not self._parts or not self.stopped:
            raise KeyError("scores")
        scores = TokenScores.joined(self._parts)
        return scores if self._places is None else scores.in_text_order(self._places)


def examine(
    open_runtime: Callable[[], Runtime],
    baseline: BaselineStore,
    scores: Path,
    context: int,
    emit: Emit,
    ask: Ask | None = None,
    *,
    scoring_threads: int = 0,
    seconds: float = SECONDS,
    every: float = EVERY,
    parity: bool = False,
) -> None:
    """Run in the child: load an artifact, measure it, and score every token and task choice.

    Emits ``stage`` before each part, then ``resources``, ``token_ids``, ``generation`` and
    ``log_likelihoods``; ``tokens`` (scored so far) during windows and tasks; and empty events
    before that, so that a large model in a slow runtime is not taken for dead. After each round of
    windows it asks for the number to have after the next; 0 ends them.

    Args:
        open_runtime: loads the artifact.
        baseline: the float model's logits.
        scores: the file for the scores of every token.
        context: positions that the runtime has room for.
        emit: sends an event to the parent.
        ask: sends one and waits for the answer; None: one round of the windows that are ready.
        scoring_threads: of the rounds, where the runtime has ``use_threads``; 0: as opened.
        seconds: time after which no further speed measurement starts.
        every: least seconds between two progress events.
        parity: also emit ``parity``, some of the logits.
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
    with turn(baseline.folder, alone=True):
        runtime, used = measure(
            lambda: Observed(open_runtime(), lambda: events.emit({}), POSITIONS * parity),
            prompt,
            decoded,
            seconds=seconds,
        )
    try:
        if encode := getattr(runtime, "tokenize", None):  # the tokenizer is in the file
            emit({"stage": "tokenizing"})
            emit({"token_ids": encode_all(encode, texts)})
        emit({"resources": asdict(used), "stage": "generating"})
        if scoring_threads and (use_threads := getattr(runtime, "use_threads", None)):
            use_threads(scoring_threads)
        with turn(baseline.folder):
            if runtime.costly:
                generated = min(generated, COSTLY_TOKENS)
                sample_prompt = prompt[: POSITIONS + 1 - generated]
            sample = check_generation(runtime, sample_prompt, generated)
        if first := getattr(runtime, "first", None):
            emit({"parity": vectors(runtime.name, *first)})
        emit({"generation": asdict(sample), "tokens": 0, "stage": "computing logits"})
        scored = list(accumulate(map(len, baseline.windows), initial=0))
        done, wanted = 0, ask({"ask": True}) if ask else baseline.ready
        several = getattr(runtime, "at_once", None)
        step = several(max(map(len, baseline.windows))) if several else 1
        while wanted > done:
            ready, parts = BaselineStore(baseline.folder), []
            while done < wanted:
                some = range(done, min(done + step, wanted))
                with turn(baseline.folder):
                    parts.append(quality.score(runtime, ready, some))
                done = some.stop
                events.emit({"tokens": scored[done]})
            TokenScores.joined(parts).save(scores)
            wanted = ask({"ask": True}) if ask else done
        emit({"tokens": scored[done], "stage": "answering tasks"})
        scored = list(accumulate(asked, initial=scored[done]))
        answers = tasks.score(
            requests,
            lambda batch: map(runtime.logits, batch),
            lambda done, total: events.emit({"tokens": scored[done]}),
        )
        remarks = list(getattr(runtime, "remarks", ()))
        emit({"tokens": scored[-1], "log_likelihoods": answers, "remarks": remarks})
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
    """Wraps a runtime and calls ``seen()`` when it is loaded and after each ``feed``.

    Attributes:
        first: tokens of the first ``logits`` and its first ``rows`` rows; None with ``rows`` 0.
    """

    def __init__(self, runtime: Runtime, seen: Callable[[], None], rows: int = 0) -> None:
        self._runtime, self._seen, self._rows = runtime, seen, rows
        self.first: tuple[Sequence[int], Float32] | None = None
        seen()

    @property
    def name(self) -> str:
        return self._runtime.name

    @property
    def vocab_size(self) -> int:
        return self._runtime.vocab_size

    @property
    def costly(self) -> bool:
        return bool(getattr(self._runtime, "costly", False))

    @property
    def tokenize(self) -> Encode | None:
        return getattr(self._runtime, "tokenize", None)

    @property
    def remarks(self) -> Sequence[str]:
        found: Sequence[str] = getattr(self._runtime, "remarks", ())
        return found

    @property
    def use_threads(self) -> Callable[[int], None] | None:
        return getattr(self._runtime, "use_threads", None)

    @property
    def at_once(self) -> Callable[[int], int] | None:
        return getattr(self._runtime, "at_once", None)

    @property
    def logits_of(self) -> Callable[[Sequence[Sequence[int]]], Sequence[Float32]] | None:
        return getattr(self._runtime, "logits_of", None)

    def logits(self, tokens: Sequence[int]) -> Float32:
        found = self._runtime.logits(tokens)
        if self._rows and self.first is None:
            self.first = tokens, found[: self._rows].copy()
        return found

    def reset(self) -> None:
        self._runtime.reset()

    def feed(self, tokens: Sequence[int]) -> Float32:
        result = self._runtime.feed(tokens)
        self._seen()
        return result

    def close(self) -> None:
        self._runtime.close()
