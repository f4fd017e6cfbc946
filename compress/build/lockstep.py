"""Several targets written beside each other, so that the checkpoint comes from disk once.

A checkpoint that is larger than the memory has left the page cache by the time that the next target
reads it. So the targets keep step: the embedding for all of them, the first block for all of them,
and so on. What one has read is still in the page cache when the others ask for it, and the kernel
may drop it after that; nothing is kept here.

A writer pulls its weights in the middle of its own story, so each has a thread. Only one of them
runs at any time, the one whose turn it is: it hands over when it asks for weights that the others
have not come to. So nothing has to be safe for threads, memory is that of one writer and of what
the others hold between two tensors, and the bytes are those of writers that run one by one.

All writers ask for weights in order of execution, with one exception: a head that is tied to the
embedding and stored apart (other bits than the embedding's, or rotated) reads the embedding again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from compress.decoder.config import DecoderConfig, Float32, split_name
from compress.checkpoint.sources import Around, Source
from compress.calibration.statistics import stored_block

__all__ = ["in_lockstep"]

T = TypeVar("T")

NOT_BEGUN, AT_END = -1.0, math.inf
LOOK_UP = 0.5  # seconds; a signal that another thread was given wakes the main one no sooner


def in_lockstep(
    sources: Sequence[Source],
    write: Callable[[int, Source], T],
    let_go: Callable[[int], None] = lambda index: None,
) -> list[T]:
    """``[write(0, source), write(1, source), …]``, all in step; one alone is just called.

    Args:
        sources: the weights of each target.
        write: called once for each, in a thread of its own, with its index and with its source as
            one that waits for the others.
        let_go: called with the index of one that others need the room of: it waits, or is done.

    Raises:
        BaseException: the first that one of them raises, or an interruption of the caller, after
            all were ended. They are ended by an exception out of the source when they ask for a
            weight, so that their ``finally`` clauses are at work as usual.
    """
    if len(sources) == 1:
        return [write(0, sources[0])]
    relay = Relay(len(sources), let_go)
    results: dict[int, T] = {}

    def run(index: int) -> None:
        results[index] = write(index, InStep(sources[index], relay, index))

    relay.run(run)
    return [results[index] for index in range(len(sources))]


def group_of(config: DecoderConfig, name: str) -> int:
    """The part of the model that a weight is read with: 0 for the embedding, then the stored
    blocks, at last the norm and the head."""
    block, role, _ = split_name(name)
    if block is not None:
        return 1 + stored_block(config, block)
    return 0 if role == "embed_tokens" else 1 + config.num_hidden_layers


class InStep(Around):
    """A source that lets the other targets catch up before it goes on to the next group."""

    def __init__(self, source: Source, relay: Relay, runner: int) -> None:
        super().__init__(source, source.config)
        self._reach = partial(relay.reach, runner)

    def read(self, name: str, rows: slice | None = None) -> Float32:
        """See ``Source.read``."""
        self._reach(group_of(self.config, name))
        return self.source.read(name, rows)

    def reader(self, name: str, rows: slice | None = None) -> Callable[[], Float32]:
        """See ``Source.reader``; it is this call that waits, and not the other thread."""
        self._reach(group_of(self.config, name))
        return self.source.reader(name, rows)

    def fingerprint(self) -> str:
        """See ``Source.fingerprint``."""
        return self.source.fingerprint()


class Ended(BaseException):
    """Ends a writer whose artifact nobody wants any more; no ``except Exception`` stops it."""


class Relay:
    """One baton and several runners, each in a thread, of whom only the holder of the baton moves.

    The baton is a lock for each runner, free when it is that runner's turn: taking it is waiting,
    and only who runs frees another's.

    Args:
        count: of runners.
        let_go: called with one who is going to wait, or has come to the end.

    Attributes:
        error: the first that a runner ended with.
    """

    def __init__(self, count: int, let_go: Callable[[int], None]) -> None:
        self._let_go = let_go
        self.error: BaseException | None = None
        self._reached = [NOT_BEGUN] * count  # the group that each runner is at
        self._turns = [held_lock() for _ in range(count)]
        self._over = held_lock()
        self._begun = self._ended = False

    def run(self, work: Callable[[int], None]) -> None:
        """``work(runner)`` for all runners; returns when all have come to their ends."""
        threads = [
            threading.Thread(target=self._run, args=(work, runner), daemon=True)
            for runner in range(len(self._turns))
        ]
        try:
            for thread in reversed(threads):  # the first has the baton as it starts
                thread.start()
            self._wait()
        except BaseException:  # most of all Ctrl-C
            self._ended = True
            if self._begun:
                self._wait()
            raise
        if self.error is not None:
            raise self.error

    def reach(self, runner: int, group: int) -> None:
        """Called by the one who runs, on its way to a group; returns when it is its turn there.

        Raises:
            Ended: the others failed meanwhile, or all were interrupted.
        """
        if group > self._reached[runner]:
            self._reached[runner] = group
            next_one = self._furthest_behind()
            if next_one != runner:
                self._let_go(runner)
                self._turns[next_one].release()
                self._turns[runner].acquire()
        if self._ended:
            raise Ended

    def _run(self, work: Callable[[int], None], runner: int) -> None:
        if runner == 0:
            self._begun = True
        else:
            self._turns[runner].acquire()
        try:
            if not self._ended:
                work(runner)
                self._let_go(runner)
        except Ended:
            pass
        except BaseException as error:
            self._ended = True
            self.error = self.error or error
        self._reached[runner] = AT_END
        next_one = self._furthest_behind()
        if self._reached[next_one] == AT_END:
            self._over.release()
        else:
            self._turns[next_one].release()

    def _furthest_behind(self) -> int:
        """Who shall run next: of several that are at the same group, the first."""
        return min(range(len(self._reached)), key=self._reached.__getitem__)

    def _wait(self) -> None:
        while not self._over.acquire(timeout=LOOK_UP):
            pass


def held_lock() -> threading.Lock:
    """A lock that somebody else will free."""
    lock = threading.Lock()
    lock.acquire()
    return lock
