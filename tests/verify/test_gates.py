"""compress.verify.gates: the syntax of limits, and their evaluation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from compress.errors import RecipeError
from compress.verify.gates import Gate, judge, parse, parse_option

ARTIFACT = SimpleNamespace(
    perplexity_ratio=1.06,
    kl_divergence=SimpleNamespace(mean=0.05, se=0.001, p99=0.4, max=3.0),
    top1_agreement=0.9,
    bytes=1_932_735_283,
    peak_memory_bytes=None,
    decode_tokens_per_second=float("nan"),
    perplexity=float("inf"),
    generation_consistent=True,
)


@pytest.mark.parametrize(
    ("name", "limit", "value", "passed"),
    [
        ("perplexity_ratio", "<=1.06", 1.06, True),
        ("perplexity_ratio", "<1.06", 1.06, False),
        ("perplexity_ratio", "<= 1.0599", 1.06, False),
        ("kl_divergence", "<=0.05", 0.05, True),
        ("kl_divergence_p99", "<=0.3", 0.4, False),
        ("kl_divergence_max", ">2.5", 3.0, True),
        ("top1_agreement", ">=0.88", 0.9, True),
        ("top1_agreement", ">=9e-1", 0.9, True),
        ("bytes", "<=1.8GiB", 1932735283, True),  # 1.8 · 2^30 = 1932735283.2
        ("bytes", "<=1.9GB", 1932735283, False),
        ("bytes", "<=1932735283", 1932735283, True),
        ("generation_consistent", ">=1", 1.0, True),
        ("peak_memory_bytes", "<=8GB", None, False),  # not measured
        ("decode_tokens_per_second", ">=0", None, False),  # NaN
        ("perplexity", ">=0", None, False),  # infinite
        ("load_seconds", "<=1", None, False),  # not even there
    ],
)
def test_judging(name: str, limit: str, value: float | None, passed: bool) -> None:
    assert judge(parse({name: limit}), ARTIFACT) == [Gate(name, limit, value, passed)]


@pytest.mark.parametrize(
    ("name", "limit", "message", "hint"),
    [
        ("kl_divergance", "<=1", "verify.gates.kl_divergance: unknown metric", "kl_divergence?"),
        ("zzz", "<=1", "verify.gates.zzz: unknown metric", "known: perplexity, perplexity_ratio"),
        ("perplexity_ratio", "1.06", "'1.06' is not a limit", "<=1.06"),
        ("perplexity_ratio", "=1.06", "is not a limit", "<=1.06"),
        ("perplexity_ratio", "<=", "is not a limit", "<=1.06"),
        ("perplexity_ratio", "<=low", "'low' is not a number", "only bytes take units"),
        ("perplexity_ratio", "<=1GiB", "'1GiB' is not a number", "only bytes take units"),
        ("perplexity_ratio", "<=nan", "is not a limit", "finite"),
        ("bytes", "<=1.8Gib2", "is not a size", ""),
    ],
)
def test_refusals(name: str, limit: str, message: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse({name: limit})
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "text", ["kl_divergence=<=0.05", "kl_divergence<=0.05", " kl_divergence = <=0.05"]
)
def test_option(text: str) -> None:
    assert parse_option(text) == ("kl_divergence", "<=0.05")


@pytest.mark.parametrize("text", ["kl_divergence", "kl_divergence=0.05", "<=0.05", ""])
def test_option_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="write NAME=LIMIT"):
        parse_option(text)
