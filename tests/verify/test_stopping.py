"""When the scoring of windows ends: against simulation, and against Student's t."""

from __future__ import annotations

import numpy as np
import pytest

from compress.verify.gates import parse
from compress.verify.quality import TokenScores
from compress.verify.stopping import ALL, Stopping, shuffled, widened

LENGTH = 511


def scores(windows: int, kl: float, spread: float = 0.3, seed: int = 0) -> TokenScores:
    """Positions with a skewed KL of this mean, and windows that differ."""
    random = np.random.default_rng(seed)
    each = random.lognormal(np.log(kl) - 0.5, 1, (windows, LENGTH))
    each *= random.normal(1, spread, (windows, 1)).clip(0.1)
    window = np.repeat(np.arange(windows, dtype=np.int32), LENGTH)
    position = np.tile(np.arange(LENGTH, dtype=np.int32), windows)
    flat = each.reshape(-1)
    return TokenScores(window, position, np.full(flat.size, 2.0), 2 + flat, flat, flat < 0.5)


def reason(gates: dict[str, str], found: TokenScores, most: int = 16) -> str | None:
    return Stopping(tuple(parse(gates)), most, exact=False).reason(found)


def test_a_gate_that_is_failed_is_enough_and_all_must_be_passed() -> None:
    found = scores(2, 0.4, spread=0.05)
    assert reason({"kl_divergence": "<=0.2"}, found) == "kl_divergence fails by 3 standard errors"
    failed = {"kl_divergence": "<=0.2", "perplexity_ratio": "<=1.5"}  # the second is too near
    assert reason(failed, found) == "kl_divergence fails by 3 standard errors"
    passed = {"kl_divergence": "<=0.9", "perplexity_ratio": "<=5"}
    assert reason(passed, found) == "every gate is passed by 3 standard errors"
    assert reason({**passed, "top1_agreement": ">=0.99"}, found) == (
        "top1_agreement fails by 3 standard errors"
    )


def test_near_a_limit_it_goes_on() -> None:
    found = scores(2, 0.2)
    near = {"kl_divergence": f"<={found.kl.mean() * 1.1}"}
    assert reason(near, found) is None
    assert reason(near, found, most=2) == ALL


def test_only_gates_on_text_count() -> None:
    found = scores(2, 0.2)
    assert reason({"bytes": "<=1"}, found) is None
    both = {"bytes": "<=1", "tokenizer_agreement": ">=1", "kl_divergence": "<=2"}
    assert reason(both, found) == "every gate is passed by 3 standard errors"


def test_the_worst_token_can_only_fail_early() -> None:
    found = scores(2, 0.2)
    assert reason({"kl_divergence_max": "<=1e3"}, found) is None
    assert "kl_divergence_max fails" in str(reason({"kl_divergence_max": "<=0.01"}, found))


def test_nan_fails_at_once() -> None:
    found = scores(2, 0.2)
    found.kl[7] = np.nan
    assert reason({"kl_divergence": "<=0.9"}, found) == "kl_divergence is not a number"


def test_a_stated_number_is_scored_whole() -> None:
    stopping = Stopping(tuple(parse({"kl_divergence": "<=0.2"})), 8)
    assert stopping.first() == 8
    assert stopping.reason(scores(8, 9.0)) == ALL


def test_precision_is_enough_without_gates() -> None:
    assert "is known to 5%" in str(reason({}, scores(12, 0.2, spread=0.02)))
    assert reason({}, scores(3, 0.2, spread=0.0)) is None  # too few to tell
    assert reason({}, scores(8, 0.2, spread=0.5, seed=1)) is None


def test_rounds_grow_to_the_most() -> None:
    stopping = Stopping((), 16, exact=False)
    rounds = [stopping.first()]
    while rounds[-1] < 16:
        rounds.append(stopping.after(rounds[-1]))
    assert rounds == [2, 4, 6, 9, 13, 16]
    assert Stopping((), 3, exact=False).after(2) == 3


@pytest.mark.parametrize(
    ("free", "exact"), [(7, 4.53), (10, 3.96), (15, 3.59), (20, 3.42), (30, 3.27), (100, 3.077)]
)
def test_errors_widen_as_students_t(free: int, exact: float) -> None:
    """Against table G.2 of JCGM 100:2008 (99.73 %)."""
    assert widened(1.0, np.arange(free + 1), 3.0) == pytest.approx(exact, rel=0.02)


def test_verdicts_are_right_though_it_looks_after_every_round() -> None:
    """A KL of 0.25 against limits above and below: wrong verdicts among 300 texts of 16 windows."""
    wrong = taken = 0
    for seed in range(300):
        whole = scores(16, 0.25, spread=0.15, seed=seed)
        above = seed % 2
        stopping = Stopping(
            tuple(parse({"kl_divergence": f"<={0.28 if above else 0.22}"})), 16, False
        )
        windows = stopping.first()
        while True:
            end = windows * LENGTH
            part = TokenScores(*(getattr(whole, key)[:end] for key in TokenScores.__annotations__))
            if why := stopping.reason(part):
                break
            windows = stopping.after(windows)
        taken += windows
        wrong += ("fails" if above else "passed") in why
    assert wrong <= 3
    assert taken / 300 < 14


def test_the_order_is_fixed_and_undone() -> None:
    windows = [[i] for i in range(16)]
    mixed, places = shuffled(windows)
    assert shuffled(windows) == (mixed, places)
    assert mixed != windows and sorted(places) == list(range(16))
    assert [windows[place] for place in places] == mixed
    found = scores(16, 0.3)
    back = found.in_text_order(places)
    assert back.window.tolist() == np.repeat(np.arange(16), LENGTH).tolist()
    for i, place in enumerate(places):
        assert np.array_equal(back.kl[back.window == place], found.kl[found.window == i])
