"""Greedy generation through a runtime, with and without its KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compress.plan.shapes import Runtime

PROMPT_TOKENS = 16  # of text before the greedy sample, or a quarter of the context
GENERATED_TOKENS = 32  # of the greedy sample


@dataclass(frozen=True)
class Generation:
    """Greedy tokens of an artifact, and whether its KV cache changes them.

    Attributes:
        prompt: token ids that it was given.
        tokens: generated through the cache.
        consistent: the same tokens come without the cache.
        first_difference: index of the first other token, or None.
        gap: how much less likely (logit difference without the cache) the token of the cached run
            was at that place: near zero is a tie that rounding decides, else the cache is wrong.
        spread: standard deviation of the logits there, which says what is near.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    consistent: bool
    first_difference: int | None = None
    gap: float | None = None
    spread: float | None = None


def greedy(runtime: Runtime, prompt: Sequence[int], count: int) -> list[int]:
    """The ``count`` most likely next tokens through the cache; does not stop at end-of-text.

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

    Where every token is the most likely one after those before it, generating without the cache,
    one run of the whole text per token, would have made the same text: up to the first other
    token both have seen the same. A large model in a slow runtime could not afford those runs.
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
