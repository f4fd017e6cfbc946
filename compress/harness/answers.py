"""What a runtime answers: log-likelihoods of continuations, and greedy generation.

Sequences are taken in the order of their tokens, so that neighbours begin alike. Their common
beginning stays in the KV cache where the runtime can cut it (``RewindingRuntime``), and equal
sequences are run once: four letters as answers to one question cost one run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from compress.errors import ArtifactError
from compress.plan.shapes import RewindingRuntime, Runtime
from compress.verify.baseline import Float32, log_softmax
from compress.verify.tasks import BATCH, Request, sequences

if TYPE_CHECKING:
    from compress.decoder.decoder import Decoder

NUMBERS = 1 << 24  # logits in memory at a time, 64 MiB

Answer = tuple[float, bool]
"""The log-likelihood of a continuation, and whether greedy decoding would give it."""
Progress = Callable[[int, int], None]
Ask = tuple[tuple[int, ...], int]
"""Tokens to run, and the first position whose logits are needed."""
Rows = Callable[[Sequence[Ask]], Iterable[Iterable[Float32]]]
"""Asks → pieces of their logits, float32 ``[positions, vocab]`` each, in order."""


class Prompt(NamedTuple):
    """Tokens to continue by at most ``most`` new ones, until one of ``stops`` is in their text."""

    tokens: list[int]
    most: int
    stops: list[str]


class Cursor:
    """The cached sequence of a runtime; moves to sequences that share its beginning."""

    def __init__(self, runtime: Runtime) -> None:
        runtime.reset()
        self._runtime = runtime
        self._cached: list[int] = []
        self._cuts = hasattr(runtime, "rewind")

    def rows(self, asks: Sequence[Ask]) -> Iterator[Iterator[Float32]]:
        """See ``Rows``."""
        for tokens, first in asks:
            yield self._pieces(tokens, first)

    def _pieces(self, tokens: Sequence[int], first: int) -> Iterator[Float32]:
        if not self._cuts:
            yield self._runtime.logits(tokens)[first:]
            return
        runtime = cast(RewindingRuntime, self._runtime)
        if (held := self._move(tokens, first)) < first:
            self._feed(tokens[held:first])
        step = max(1, NUMBERS // runtime.vocab_size)
        for start in range(first, len(tokens), step):
            piece = tokens[start : start + step]
            logits = runtime.extend(piece)
            self._cached += piece
            yield logits

    def last(self, tokens: Sequence[int]) -> Float32:
        """Logits after the last of ``tokens``, float32 ``[vocab]``."""
        return self._feed(tokens[self._move(tokens, len(tokens) - 1) :])

    def next(self, token: int) -> Float32:
        """Logits after one more token, float32 ``[vocab]``."""
        return self._feed([token])

    def _feed(self, tokens: Sequence[int]) -> Float32:
        logits = self._runtime.feed(tokens)
        self._cached += tokens
        return logits

    def _move(self, tokens: Sequence[int], most: int) -> int:
        """Keep what the cache shares with ``tokens``, at most ``most`` positions; returns them."""
        pairs = zip(self._cached, tokens[:most], strict=False)
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        held = min(len(self._cached), most) if common is None else common
        if held < len(self._cached):
            if self._cuts:
                held = cast(RewindingRuntime, self._runtime).rewind(held)
            else:
                self._runtime.reset()
                held = 0
            del self._cached[held:]
        return held


def streamed(decoder: Decoder) -> Rows:
    """``Rows`` of a float model whose weights do not stay in memory: each is read once for a batch
    of at most ``BATCH`` tokens."""

    def rows(asks: Sequence[Ask]) -> Iterator[list[Float32]]:
        batch: list[Ask] = []
        for index, ask in enumerate(asks):
            batch.append(ask)
            following = len(asks[index + 1][0]) if index + 1 < len(asks) else BATCH
            if sum(len(tokens) for tokens, _ in batch) + following > BATCH:
                found = decoder.stream_logits([list(tokens) for tokens, _ in batch])
                for (_, first), logits in zip(batch, found, strict=True):
                    yield [logits[first:]]
                batch = []

    return rows


def score(
    requests: Sequence[Request], rows: Rows, progress: Progress | None = None
) -> list[Answer]:
    """Log-likelihood of the scored tokens of every request, and whether they are the likeliest.

    Args:
        requests: any number.
        rows: of a runtime.
        progress: ``progress(done, total)`` in sequences.

    Raises:
        ArtifactError: logits that are not finite.
    """
    fed = sorted(sequences(requests).items())
    asks = [(tokens, min(requests[i].start for i in served) - 1) for tokens, served in fed]
    totals, greedy = [0.0] * len(requests), [True] * len(requests)
    answered = zip(asks, fed, rows(asks), strict=True)
    for done, ((_, position), (_, served), pieces) in enumerate(answered, start=1):
        for logits in pieces:
            log_p, likeliest = log_softmax(logits), logits.argmax(axis=1)
            for index in served:
                request = requests[index]
                skipped = max(request.start - 1 - position, 0)
                targets = np.array(request.tokens[position + 1 :][skipped : len(logits)], np.int64)
                each = np.arange(skipped, skipped + len(targets))
                totals[index] += float(log_p[each, targets].sum())
                greedy[index] &= bool((likeliest[each] == targets).all())
            position += len(logits)
        if not np.isfinite([totals[index] for index in served]).all():
            raise ArtifactError("its log-likelihoods are not finite")
        if progress:
            progress(done, len(fed))
    return list(zip(totals, greedy, strict=True))


def generate(
    prompts: Sequence[Prompt],
    runtime: Runtime,
    ends: Collection[int],
    decode: Callable[[Sequence[int]], str],
    progress: Progress | None = None,
) -> list[list[int]]:
    """The likeliest tokens after every prompt, up to a stop, an end or the limit, inclusive.

    Args:
        prompts: any number.
        runtime: loaded.
        ends: tokens that end a text.
        decode: of the tokenizer, to find stops.
        progress: ``progress(done, total)`` in prompts.

    Raises:
        ArtifactError: logits that are not finite.
    """
    cursor = Cursor(runtime)
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: prompts[index].tokens)
    for done, index in enumerate(order, start=1):
        prompt, made = prompts[index], found[index]
        # A token has at least a byte: a stop lies in as many of the last ones.
        reach = 4 + max((len(stop.encode()) for stop in prompt.stops), default=0)
        logits = cursor.last(prompt.tokens)
        while True:
            if not np.isfinite(logits.max()):
                raise ArtifactError("its logits are not finite")
            made.append(int(logits.argmax()))
            text = decode(made[-reach:])
            stopped = made[-1] in ends or any(stop in text for stop in prompt.stops if stop)
            if stopped or len(made) >= prompt.most:
                break
            logits = cursor.next(made[-1])
        if progress:
            progress(done, len(prompts))
    return found
