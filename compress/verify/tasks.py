"""Multiple-choice accuracy of an artifact and of the float model on the same items.

A task is a file of JSON objects, one a line; MMLU and HellaSwag fit as they are, other keys are
ignored, and the file's name without its ending names the task::

    {"question": "Water freezes at", "choices": ["0 °C.", "50 °C."], "answer": 0}

``question`` is the whole prompt for the model: ``Question:``, a list of lettered options, worked
examples and ``Answer:`` must be in it if the task needs them; no chat template is applied. Every
choice is scored as the continuation of ``question``, as in EleutherAI's lm-evaluation-harness for
``output_type: multiple_choice``:

- With ``n = len(encode(question))``, the scored tokens are ``encode(question + " " + choice)[n:]``,
  after the tokens of ``question`` alone, and a BOS where the tokenizer adds one, as in the windows
  of ``decoder.tokenizer`` (the harness needs ``add_bos_token=True`` for that). White space at the
  end of ``question`` is not counted in ``n``: it belongs to the continuation.
- A choice's log-likelihood is the sum of log p over its scored tokens. The largest is the answer
  (``acc`` there). ``accuracy_norm`` divides by the UTF-8 bytes of ``choice`` first, without the
  space (``acc_bytes`` there; ``acc_norm`` counts characters, the same for ASCII). Of equals, the
  first.

Standard errors are over items: ``sqrt(p (1 - p) / (n - 1))`` for an accuracy, and that of the mean
of paired differences for artifact - float. They do not include the choice of the task.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from compress.decoder.tokenizer import Tokenizer
from compress.errors import UsageError
from compress.files import read_corpus
from compress.verify.baseline import Float32, Float64, chunks, log_softmax
from compress.verify.quality import Estimate, cluster_mean

REQUESTS = "requests.json"  # in the baseline's folder, for the child
BATCH = 1 << 14  # tokens whose hidden states the float model holds at once
FORM = '{"question": "…", "choices": ["…", "…"], "answer": 0} on every line, answers from 0'

Logits = Callable[[Sequence[Sequence[int]]], Iterable[Float32]]
"""Sequences of tokens → float32 ``[len, vocab]`` for each, in order."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Item:
    """One question; ``where`` is ``FILE:LINE`` for messages."""

    question: str
    choices: tuple[str, ...]
    answer: int
    where: str


@dataclass(frozen=True)
class Task:
    """A named list of items."""

    name: str
    items: tuple[Item, ...]


class Request(NamedTuple):
    """Tokens of a question and one choice; those from ``start`` on are scored."""

    tokens: list[int]
    start: int


@dataclass(frozen=True)
class TaskScore:
    """An artifact's score on one task.

    Attributes:
        name, items: of the task.
        accuracy, baseline_accuracy: share of items answered right.
        difference: artifact - float, paired by item.
        accuracy_norm, baseline_accuracy_norm: with log-likelihoods per byte.
        agreement: share of items where both give the same answer, right or wrong.
    """

    name: str
    items: int
    accuracy: Estimate
    accuracy_norm: Estimate
    baseline_accuracy: Estimate
    baseline_accuracy_norm: Estimate
    difference: Estimate
    agreement: Estimate


def read_task(path: Path) -> Task:
    """A task from its file.

    Raises:
        UsageError: missing, not UTF-8, empty, or a line that is no item.
    """
    try:
        text = read_corpus(path, "utf-8-sig")
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist", hint="--task takes a .jsonl file") from error
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"{path} cannot be read: {why}") from error
    # Not splitlines(): JSON strings may hold U+2028, which is a line's end to it.
    lines = enumerate(text.split("\n"), start=1)
    items = tuple(parse_item(line, f"{path}:{number}") for number, line in lines if line.strip())
    if not items:
        raise UsageError(f"{path} has no items", hint=FORM)
    return Task(path.stem, items)


def parse_item(line: str, where: str) -> Item:
    """One line of a task's file.

    Raises:
        UsageError: no JSON object, or a key that is missing or of another type.
    """
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}", hint=FORM) from error
    if not isinstance(found, dict):
        raise UsageError(f"{where}: not a JSON object", hint=FORM)
    question, choices, answer = found.get("question"), found.get("choices"), found.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise UsageError(f"{where}: question must be a text that is not empty", hint=FORM)
    if not isinstance(choices, list) or len(choices) < 2:
        raise UsageError(f"{where}: choices must be a list of two or more", hint=FORM)
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise UsageError(f"{where}: choices must be texts that are not empty", hint=FORM)
    if type(answer) is not int or not 0 <= answer < len(choices):
        last = len(choices) - 1
        raise UsageError(f"{where}: answer must be a number from 0 to {last}", hint=FORM)
    return Item(question, tuple(choices), answer, where)


class TaskSet:
    """Tasks, their requests, and the float model's log-likelihoods.

    Attributes:
        requests: one per choice, in the order of tasks, items and choices.
        baseline: log-likelihoods of the requests; empty before ``ask_baseline``.
    """

    def __init__(self, tasks: Sequence[Task], tokenizer: Tokenizer, context: int) -> None:
        """Tokenize every choice into a request.

        Raises:
            UsageError: an item longer than ``context``, or one that leaves nothing to score.
        """
        self.tasks = tuple(tasks)
        items = [item for task in tasks for item in task.items]
        self.requests = [
            request for item in items for request in cut_item(item, tokenizer, context)
        ]
        self.baseline: list[float] = []

    @property
    def lengths(self) -> list[int]:
        """See ``lengths``."""
        return lengths(self.requests)

    def ask_baseline(self, folder: Path, logits: Logits, progress: Progress | None = None) -> None:
        """Score the float model, and write the requests into ``folder`` for the child processes."""
        self.baseline = score(self.requests, logits, progress)
        (folder / REQUESTS).write_text(json.dumps(self.requests), encoding="utf-8")

    def judge(self, log_likelihoods: Sequence[float]) -> tuple[TaskScore, ...]:
        """Scores of each task, from an artifact's and the float model's log-likelihoods."""
        both = np.array([log_likelihoods, self.baseline], np.float64).reshape(2, -1)
        found, start = [], 0
        for task in self.tasks:
            end = start + sum(len(item.choices) for item in task.items)
            found.append(judge_task(task, both[0, start:end], both[1, start:end]))
            start = end
        return tuple(found)


def cut_item(item: Item, tokenizer: Tokenizer, context: int) -> list[Request]:
    """The requests of an item, one per choice.

    Raises:
        UsageError: longer than ``context``, or nothing to score.
    """
    head = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    before = tokenizer.encode(item.question.rstrip())
    requests = []
    for choice in item.choices:
        scored = tokenizer.encode(f"{item.question} {choice}")[len(before) :]
        request = Request([*head, *before, *scored], len(head) + len(before))
        if not before or not scored:
            raise UsageError(f"{item.where}: {choice!r} adds no tokens to the question")
        if len(request.tokens) - 1 > context:
            raise UsageError(
                f"{item.where}: {len(request.tokens) - 1} tokens, the context is {context}",
                hint="shorten its question",
            )
        requests.append(request)
    return requests


def load_requests(folder: Path) -> list[Request]:
    """Read the requests of ``ask_baseline``; empty without tasks."""
    path = folder / REQUESTS
    if not path.exists():
        return []
    return [Request(*pair) for pair in json.loads(path.read_text(encoding="utf-8"))]


def score(
    requests: Sequence[Request],
    logits: Logits,
    progress: Progress | None = None,
    *,
    batch_tokens: int = BATCH,
) -> list[float]:
    """Log-likelihood of the scored tokens of every request.

    The last token is never fed. Choices of one token (the letters of MMLU) share the same fed
    sequence, which is run once.

    Args:
        requests: any number.
        logits: called with at most ``batch_tokens`` at a time (or one sequence).
        progress: ``progress(done, total)`` in sequences.
        batch_tokens: see ``logits``.
    """
    fed = sequences(requests)
    found = [0.0] * len(requests)
    done = 0
    for batch in batches(fed, batch_tokens):
        for tokens, rows in zip(batch, logits([list(t) for t in batch]), strict=True):
            for index in fed[tokens]:
                found[index] = log_likelihood(requests[index], rows)
            done += 1
            if progress:
                progress(done, len(fed))
    return found


def sequences(requests: Sequence[Request]) -> dict[tuple[int, ...], list[int]]:
    """The distinct sequences to feed, in order → indices of the requests that they serve."""
    fed: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        fed.setdefault(tuple(request.tokens[:-1]), []).append(index)
    return fed


def lengths(requests: Sequence[Request]) -> list[int]:
    """Token counts of the sequences that ``score`` feeds, in order."""
    return [len(tokens) for tokens in sequences(requests)]


def batches(fed: Iterable[tuple[int, ...]], limit: int) -> Iterator[list[tuple[int, ...]]]:
    """Batches of sequences in order, of at most ``limit`` tokens or one sequence."""
    batch: list[tuple[int, ...]] = []
    for tokens in fed:
        if batch and sum(map(len, batch)) + len(tokens) > limit:
            yield batch
            batch = []
        batch.append(tokens)
    if batch:
        yield batch


def log_likelihood(request: Request, logits: Float32) -> float:
    """Sum of log p of a request's scored tokens; ``logits`` are of all tokens but the last."""
    rows = logits[request.start - 1 :]
    targets = np.array(request.tokens[request.start :])
    total = 0.0
    for part in chunks(len(targets), rows.shape[1]):
        log_p = log_softmax(rows[part])
        total += float(log_p[np.arange(len(log_p)), targets[part]].sum())
    return total


def judge_task(task: Task, log_likelihoods: Float64, baseline: Float64) -> TaskScore:
    """One task's score from the log-likelihoods of its choices, in order."""
    ours, ours_norm = choose(task, log_likelihoods)
    theirs, theirs_norm = choose(task, baseline)
    answers = np.array([item.answer for item in task.items])
    each = np.arange(len(answers), dtype=np.int32)  # every item counts as one window

    def share(hits: NDArray[np.bool_]) -> Estimate:
        return cluster_mean(hits.astype(np.float64), each)

    right, right_float = ours == answers, theirs == answers
    return TaskScore(
        name=task.name,
        items=len(answers),
        accuracy=share(right),
        accuracy_norm=share(ours_norm == answers),
        baseline_accuracy=share(right_float),
        baseline_accuracy_norm=share(theirs_norm == answers),
        difference=cluster_mean(right.astype(np.float64) - right_float, each),
        agreement=share((ours == theirs) & (ours >= 0)),
    )


def choose(task: Task, log_likelihoods: Float64) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The best choice of each item, by log-likelihood and by that per byte; -1 where one is NaN."""
    plain, norm, start = [], [], 0
    for item in task.items:
        values = log_likelihoods[start : start + len(item.choices)]
        start += len(item.choices)
        sizes = [len(choice.encode()) for choice in item.choices]
        nan = bool(np.isnan(values).any())  # argmax would choose NaN
        plain.append(-1 if nan else int(values.argmax()))
        norm.append(-1 if nan else int((values / sizes).argmax()))
    return np.array(plain), np.array(norm)
