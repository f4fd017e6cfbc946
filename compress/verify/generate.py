"""Greedy generation through a runtime, with and without its KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compress.plan.shapes import Runtime

PROMPT_TOKENS = 16  # of text before the greedy sample, or a quarter of the context
GENERATED_TOKENS = 32  # of the greedy sample
COSTLY_TOKENS = 4  # of it, where each call is costly


@dataclass(frozen=True)
class Generation:
    """Greedy tokens of an artifact, and whether its KV cache changes them.

    Attributes:
        prompt: token ids.
        tokens: generated through the cache.
        consistent: whether the tokens are the same without the cache.
        first_difference: index of the first different token, or None.
        gap: logit difference, without the cache, between the best token and the cached run's at
            that position: near zero it is a tie decided by rounding, else the cache is wrong.
        spread: standard deviation of the logits there, the scale for ``gap``.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    consistent: bool
    first_difference: int | None = None
    gap: float | None = None
    spread: float | None = None


def greedy(runtime: Runtime, prompt: Sequence[int], count: int) -> list[int]:
    """Generate ``count`` tokens greedily through the cache; does not stop at end-of-text.

    Args:
        runtime: a loaded artifact.
        prompt: token ids, at least one; with ``count`` they must fit the runtime's context.
        count: tokens to generate.
    """
    runtime.reset()
    tokens = [int(runtime.feed(prompt).argmax())]
    while len(tokens) < count:
        tokens.append(int(runtime.feed(tokens[-1:]).argmax()))
    return tokens


def check_generation(
    runtime: Runtime, prompt: Sequence[int], count: int = GENERATED_TOKENS
) -> Generation:
    """Generate through the cache, then run prompt and tokens at once, without it.

    Where every token is the most likely one in that single run, generating without the cache would
    give the same text: up to the first different token the contexts are equal. One run of the whole
    text per token would be too slow for a large model.
    """
    tokens = greedy(runtime, prompt, count)
    logits = runtime.logits([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
    without = logits.argmax(axis=1)
    differ = np.flatnonzero(without != tokens)
    if not differ.size:
        return Generation(tuple(prompt), tuple(tokens), True)
    at = int(differ[0])
    gap = float(logits[at, without[at]] - logits[at, tokens[at]])
    spread = float(logits[at].std())
    return Generation(tuple(prompt), tuple(tokens), False, at, gap, spread)
