"""Greedy generation through a runtime, with and without its KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.model import Runtime


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
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    consistent: bool
    first_difference: int | None = None
    gap: float | None = None


def greedy(runtime: Runtime, prompt: Sequence[int], count: int, *, cached: bool) -> list[int]:
    """The ``count`` most likely next tokens, one after another; does not stop at end-of-text.

    Args:
        runtime: a loaded artifact.
        prompt: token ids, at least one; with ``count`` they must fit the runtime's context.
        count: tokens to generate.
        cached: feed one token at a time into the KV cache, else run the whole text each time.
    """
    tokens = list(prompt)
    if cached:
        runtime.reset()
        last = runtime.feed(tokens)
    else:
        last = runtime.logits(tokens)[-1]
    while True:
        tokens.append(int(last.argmax()))
        if len(tokens) == len(prompt) + count:
            return tokens[len(prompt) :]
        last = runtime.feed(tokens[-1:]) if cached else runtime.logits(tokens)[-1]


def check_generation(runtime: Runtime, prompt: Sequence[int], count: int = 32) -> Generation:
    """Generate both ways and compare."""
    with_cache = greedy(runtime, prompt, count, cached=True)
    without = greedy(runtime, prompt, count, cached=False)
    pairs = enumerate(zip(with_cache, without, strict=True))
    at = next((index for index, (ours, theirs) in pairs if ours != theirs), None)
    if at is None:
        return Generation(tuple(prompt), tuple(with_cache), True)
    logits = runtime.logits([*prompt, *without[:at]])[-1]
    gap = float(logits[without[at]] - logits[with_cache[at]])
    return Generation(tuple(prompt), tuple(with_cache), False, at, gap)
