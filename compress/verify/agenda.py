"""What is done to an artifact, in its order, and how many tokens go through its runtime for it.

The child that does it goes by this, and whoever tells how long that takes does too: tokens of one
kind cost alike, whatever they are run for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["REPEATS", "SECONDS", "WARM_UP", "Agenda", "Run"]

PREFILLED = 256  # tokens of a prefill measurement, or half the context
DECODED = 32  # tokens of a decode measurement
WARM_UP = 4  # tokens decoded before anything is timed
REPEATS = 3  # measurements of speed after the warm-up, at most
SECONDS = 10.0  # after which no measurement is begun, and decoding stops
PROMPT = 16  # tokens of text before the greedy sample
GENERATED = 32  # tokens of the greedy sample


class Run(NamedTuple):
    """Tokens that go through a runtime at once, or, decoded, one by one.

    Attributes:
        tokens: how many.
        kind: ``read`` (logits after the last one; ``first``: as nothing was run before),
            ``decoded``, ``answered`` (logits of all), or ``scored`` (these are held against the
            float model's, too).
        until: seconds after the first run, from when on it is left out.
    """

    tokens: int
    kind: str
    until: float = math.inf


@dataclass(frozen=True)
class Agenda:
    """The runs that one artifact is verified by.

    Attributes:
        prompt, decoded: tokens of a measurement of speed: prefill, and decode after it.
        sample_prompt, generated: tokens of the greedy sample, and of the text before it.
        windows: tokens of each.
        asked: tokens of each sequence of the tasks.
    """

    prompt: int
    decoded: int
    sample_prompt: int
    generated: int
    windows: tuple[int, ...]
    asked: tuple[int, ...] = ()

    @classmethod
    def of(cls, windows: Sequence[int], context: int, asked: Sequence[int] = ()) -> Agenda:
        """What fits into a context, with prompts from the first windows.

        Args:
            windows: tokens of each.
            context: positions that the runtime has room for.
            asked: tokens of each sequence of the tasks.
        """
        prompt = max(1, min(PREFILLED, context // 2, sum(windows[:4])))
        sample_prompt = max(1, min(PROMPT, context // 4, prompt))
        return cls(
            prompt,
            min(DECODED, context - prompt),
            sample_prompt,
            min(GENERATED, context - sample_prompt),
            tuple(windows),
            tuple(asked),
        )

    @property
    def speed_runs(self) -> list[Run]:
        """Of ``resources.measure_speed``."""
        warm_up = min(self.decoded, WARM_UP)
        first = [Run(self.prompt, "first"), Run(warm_up, "decoded")]
        needed = [Run(self.prompt, "read"), Run(warm_up, "decoded")]
        rest = [Run(self.decoded - warm_up, "decoded", SECONDS)]
        more = [Run(self.prompt, "read", SECONDS), Run(self.decoded, "decoded", SECONDS)]
        return some([*first, *needed, *rest, *(more * (REPEATS - 1))])

    @property
    def sample_runs(self) -> list[Run]:
        """Of ``generate.check_generation``: with the cache, and without."""
        more = self.generated - 1
        prompt = Run(self.sample_prompt, "read")
        return some([prompt, Run(more, "decoded"), Run(self.sample_prompt + more, "answered")])

    @property
    def runs(self) -> list[Run]:
        """All, in their order."""
        windows = [Run(tokens, "scored") for tokens in self.windows]
        asked = [Run(tokens, "answered") for tokens in self.asked]
        return [*self.speed_runs, *self.sample_runs, *windows, *asked]

    @property
    def tokens(self) -> int:
        """Of all runs."""
        return sum(run.tokens for run in self.runs)


def some(runs: Sequence[Run]) -> list[Run]:
    """Runs of any tokens."""
    return [run for run in runs if run.tokens]
