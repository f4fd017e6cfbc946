"""compress.harness.answers: log-likelihoods and generation through every runtime's KV cache."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from echo_model import EchoModel
from exported import Exports
from numpy.typing import NDArray

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.decoder import Decoder
from compress.errors import ArtifactError
from compress.formats import get_format
from compress.harness.answers import Cursor, Prompt, generate, score, streamed
from compress.plan.job import describe_model
from compress.verify.tasks import Request

STEM = [7, 3, 9, 4, 11, 2, 8, 5]
REQUESTS = [
    Request([*STEM, 12, 13, 14], 8),
    Request([*STEM, 12, 13, 15], 8),  # the same sequence is run
    Request([*STEM, 12, 13], 9),
    Request([*STEM[:4], 20, 21, 22, 23], 5),
    Request([30, 31], 1),
    Request([*STEM, 12, 16, 17], 10),
]
PROMPTS = [Prompt(STEM, 6, []), Prompt([*STEM[:5], 1], 6, []), Prompt([30], 3, [])]


class Rewinding(EchoModel):
    """An ``EchoModel`` whose cache can be cut; ``fed`` counts tokens, ``keeps`` is false for one
    that can only be emptied."""

    def __init__(self, vocab: int, keeps: bool = True) -> None:
        super().__init__(vocab)
        self.states, self.fed, self.keeps = [self.memory], 0, keeps

    def reset(self) -> None:
        super().reset()
        self.states = [self.memory]

    def feed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return self.extend(tokens)[-1]

    def extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        rows = []
        for token in tokens:
            out, self.memory = self.step(self.memory, token)
            self.states.append(self.memory)
            rows.append(out)
        self.fed += len(tokens)
        return np.stack(rows)

    def rewind(self, length: int) -> int:
        kept = length if self.keeps else 0
        del self.states[kept + 1 :]
        self.memory = self.states[-1]
        return kept


def by_hand(logits, request: Request) -> tuple[float, bool]:  # type: ignore[no-untyped-def]
    rows = np.asarray(logits(request.tokens[:-1]), np.float64)[request.start - 1 :]
    targets = request.tokens[request.start :]
    total = sum(
        row[token] - row.max() - math.log(np.exp(row - row.max()).sum())
        for row, token in zip(rows, targets, strict=True)
    )
    return total, rows.argmax(axis=1).tolist() == targets


@pytest.mark.parametrize("model", [EchoModel(40), Rewinding(40), Rewinding(40, keeps=False)])
def test_scores_are_those_of_fresh_sequences(model: EchoModel) -> None:
    first = EchoModel(40)
    likeliest = int(first.logits(STEM)[-1].argmax())
    requests = [*REQUESTS, Request([*STEM, likeliest], 8)]
    found = score(requests, Cursor(model).rows)
    for (value, greedy), request in zip(found, requests, strict=True):
        expected, is_greedy = by_hand(first.logits, request)
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == is_greedy
    assert found[-1][1] and not found[0][1]


def test_a_shared_beginning_is_run_once() -> None:
    model = Rewinding(40)
    steps: list[tuple[int, int]] = []
    score(REQUESTS, Cursor(model).rows, lambda *step: steps.append(step))
    distinct = {tuple(request.tokens[:-1]) for request in REQUESTS}
    assert steps[-1] == (len(distinct), len(distinct)) == (5, 5)
    assert model.fed < sum(map(len, distinct)) - len(STEM)


def test_generation_equals_that_without_a_cache() -> None:
    model = EchoModel(40)

    def alone(prompt: Prompt) -> list[int]:
        tokens = list(prompt.tokens)
        for _ in range(prompt.most):
            tokens.append(int(model.logits(tokens)[-1].argmax()))
        return tokens[len(prompt.tokens) :]

    expected = [alone(prompt) for prompt in PROMPTS]
    for runtime in (EchoModel(40), Rewinding(40), Rewinding(40, keeps=False)):
        assert generate(PROMPTS, runtime, (), str) == expected
    tokens, most, _ = PROMPTS[1]
    made = expected[1]
    assert len(set(made)) == most
    assert generate(PROMPTS[1:2], Rewinding(40), {made[2]}, str) == [made[:3]]
    stop = Prompt(tokens, most, [f", {made[1]}"])  # in the text of the first two tokens

    def decode(found: Sequence[int]) -> str:
        return ", ".join(map(str, found))

    assert generate([stop], Rewinding(40), (), decode) == [made[:2]]


def test_logits_that_are_no_numbers_are_refused() -> None:
    model = Rewinding(40)
    model.table[STEM[-1]] = np.nan
    with pytest.raises(ArtifactError, match="not finite"):
        score(REQUESTS, Cursor(model).rows)
    with pytest.raises(ArtifactError, match="not finite"):
        generate(PROMPTS[:1], model, (), str)


@pytest.mark.parametrize("format", ["gguf", "onnx", "coreml"])
def test_every_runtime_cuts_its_cache(exported: Exports, format: str) -> None:
    made = exported(format, "llama")
    runtime = get_format(format).open_runtime(made.artifact.path, context=64, threads=1)
    try:
        assert hasattr(runtime, "rewind")
        whole = runtime.logits([*STEM, 12, 13, 14])
        runtime.reset()
        runtime.feed([*STEM, 20, 21, 22, 23])
        assert runtime.rewind(6) == 6
        np.testing.assert_allclose(runtime.extend([*STEM[6:], 12, 13, 14]), whole[6:], atol=2e-2)
        found = score(REQUESTS, Cursor(runtime).rows)
        expected = [by_hand(runtime.logits, request) for request in REQUESTS]
        np.testing.assert_allclose(
            [value for value, _ in found], [value for value, _ in expected], atol=2e-2
        )
    finally:
        runtime.close()


def test_the_float_model_streams_or_stays(exported: Exports) -> None:
    checkpoint = Checkpoint.open(exported.checkpoint("llama"))
    config = describe_model(checkpoint)
    decoder = Decoder(config, Stored(checkpoint, config).read, resident=True)
    stays = score(REQUESTS, Cursor(decoder).rows)
    streams = score(REQUESTS, streamed(Decoder(config, Stored(checkpoint, config).read)))
    for mine, other in zip(stays, streams, strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-3) and mine[1] == other[1]
