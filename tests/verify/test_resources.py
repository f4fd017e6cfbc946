"""compress.verify in a real child process: memory, speed, generation, crashes."""

from __future__ import annotations

import itertools
import mmap
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
from commands import until
from echo_model import EchoModel, text_windows

from compress import verify
from compress.errors import ArtifactError, RuntimeMissingError
from compress.verify import BaselineStore, Rounds, gates, quality, verify_artifact
from compress.verify.child import Event
from compress.verify.generate import check_generation, greedy
from compress.verify.resources import AnonymousPeak, measure_speed, peak_memory, read_status
from compress.verify.stopping import Stopping, shuffled

PROBE = [sys.executable, str(Path(__file__).parents[1].joinpath("echo_model.py"))]
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> BaselineStore:
    windows, model = text_windows(64, 4, 33), EchoModel(64)
    folder = tmp_path_factory.mktemp("baseline")
    return BaselineStore.write(folder, windows, map(model.logits, windows))


def test_one_artifact_in_its_own_process(baseline: BaselineStore) -> None:
    done: list[tuple[int, int]] = []
    found = verify_artifact(
        Path("model.echo"),
        "works",
        baseline,
        context=128,
        progress=lambda *step: done.append(step),
        probe=PROBE,
    )
    total = 4 * 33
    assert done[0] == (0, total) and done[-1] == (total, total)
    assert done == sorted(done)
    assert found.quality == quality.summarize(quality.score(EchoModel(64, noise=0.5), baseline))
    assert found.generation.consistent and len(found.generation.tokens) == 32
    assert found.generation.prompt == tuple(baseline.windows[0][:16].tolist())
    used = found.resources
    assert used.runtime == "numpy echo 1.0"
    assert used.speed.prefill_tokens == 64 and used.speed.decode_tokens == 8
    assert used.speed.prefill_tokens_per_second > 0 and used.speed.decode_tokens_per_second > 0
    assert not list(baseline.folder.glob("scores-*"))


@linux
def test_rounds_until_the_verdict_stands(tmp_path: Path) -> None:
    """A child that scores two windows, asks, and scores further ones of a baseline that grows."""
    model = EchoModel(64)
    windows = text_windows(64, 9, 128)
    mixed, places = shuffled(windows)
    store = BaselineStore.begin(tmp_path, mixed)
    extended: list[int] = []

    def extend(ready: int) -> None:
        nonlocal store
        extended.append(ready)
        store = store.extend(map(model.logits, mixed[store.ready : ready]), ready)

    def verified(limit: str) -> verify.Verified:
        stopping = Stopping(tuple(gates.parse({"kl_divergence": limit})), 9, exact=False)
        rounds = Rounds(stopping, lambda n: extend(n) if n > store.ready else None, places)
        return verify_artifact(Path("m"), "works", store, rounds, context=128, probe=PROBE)

    certain = verified("<=50")
    assert extended == [2] and certain.quality.windows == 2
    assert certain.stopped == "every gate is passed by 3 standard errors"
    near = verified(f"<={certain.quality.kl_mean.value:.6f}")
    assert extended[:2] == [2, 4] and near.quality.windows == extended[-1]
    exact = quality.score(EchoModel(64, noise=0.5), store, range(near.quality.windows))
    assert near.quality == quality.summarize(exact.in_text_order(places))


def test_the_peak_is_the_childs_own(baseline: BaselineStore) -> None:
    """200 MiB held for a moment in the child are seen; 300 MiB held here are not."""
    ballast = np.ones(300 << 17)
    path = Path("model.echo")
    calm = verify_artifact(path, "works", baseline, context=128, probe=PROBE).resources
    greedy = verify_artifact(path, "greedy", baseline, context=128, probe=PROBE).resources
    assert ballast[0] == 1
    for field in ("peak_memory_bytes", "peak_anonymous_bytes"):
        low, high = getattr(calm, field), getattr(greedy, field)
        assert 150 << 20 < high - low < 215 << 20
        assert low < 250 << 20
    assert calm.startup_memory_bytes is not None and calm.peak_memory_bytes is not None
    assert 5 << 20 < calm.startup_memory_bytes <= calm.peak_memory_bytes


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("abort", ArtifactError, "crashed with SIGABRT while loading: .*something to complain"),
        ("missing", RuntimeMissingError, "^echo is not installed$"),
        ("raises", ArtifactError, "status 1 while loading: ZeroDivisionError: who divides"),
        ("silent", ArtifactError, "the child gave no result"),
    ],
)
def test_a_child_that_fails(
    baseline: BaselineStore, how: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        verify_artifact(Path("m.echo"), how, baseline, context=128, probe=PROBE)


def test_a_child_that_hangs(baseline: BaselineStore) -> None:
    """The time limit does not include the start: the child reports when it begins to load."""
    with pytest.raises(ArtifactError, match=r"no sign of life for 3 s while (loading|starting)"):
        verify_artifact(Path("m.echo"), "hangs", baseline, context=128, silence=3.0, probe=PROBE)


def examine(runtime: EchoModel, baseline: BaselineStore, folder: Path, **options) -> list[Event]:  # type: ignore[no-untyped-def]
    events: list[Event] = []
    scores = folder / "scores.npz"
    verify.examine(lambda: runtime, baseline, scores, 128, events.append, **options)
    return events


def test_a_slow_runtime_sends_an_event_after_every_run(
    baseline: BaselineStore, tmp_path: Path
) -> None:
    """A progress event for each run, so that ``silence`` limits one run, not a phase."""
    events = examine(EchoModel(64), baseline, tmp_path, every=0.0)
    stages = [index for index, event in enumerate(events) if "stage" in event]
    counts = [j - i - 1 for i, j in itertools.pairwise(stages)]
    loading, generating, computing = counts
    assert loading == 1 + (1 + 4) + 2 * (1 + 8)  # loaded, a warm-up, two measurements
    assert generating == 32 and computing == len(baseline.windows)


class Calls(EchoModel):
    """Records its calls; sleeps ``slow`` seconds for each input."""

    costly = False

    def __init__(self, slow: float = 0.0) -> None:
        super().__init__(64)
        self.calls: list[tuple[str, int]] = []
        self.slow = slow

    def logits(self, tokens: Sequence[int]):  # type: ignore[no-untyped-def]
        self.calls.append(("logits", len(tokens)))
        return super().logits(tokens)

    def feed(self, tokens: Sequence[int]):  # type: ignore[no-untyped-def]
        self.calls.append(("feed", len(tokens)))
        time.sleep(self.slow)
        return super().feed(tokens)


def test_speed_then_a_sample_then_every_window(baseline: BaselineStore, tmp_path: Path) -> None:
    runtime = Calls()
    events = examine(runtime, baseline, tmp_path, every=0.0)
    speed = [("feed", 64), *[("feed", 1)] * 4, *[("feed", 64), *[("feed", 1)] * 8] * 2]
    sample = [("feed", 16), *[("feed", 1)] * 31, ("logits", 16 + 31)]
    assert runtime.calls == [*speed, *sample, *[("logits", 33)] * 4]
    assert events[-1]["log_likelihoods"] == []
    tokens = [event["tokens"] for event in events if "tokens" in event]
    assert tokens == [0, 33, 66, 99, 132, 132, 132]


def test_measurements_of_speed_end_when_their_seconds_are_over(
    baseline: BaselineStore, tmp_path: Path
) -> None:
    runtime = Calls(slow=0.01)
    events = examine(runtime, baseline, tmp_path, seconds=0.0)
    (used,) = [event["resources"] for event in events if "resources" in event]
    assert used["speed"]["repeats"] == 1 and used["speed"]["decode_tokens"] == 4
    assert runtime.calls[:10] == [("feed", 64), *[("feed", 1)] * 4] * 2
    assert runtime.calls[10] == ("feed", 16)


def test_a_runtime_whose_calls_are_costly_is_called_seldom(
    baseline: BaselineStore, tmp_path: Path
) -> None:
    runtime = Calls()
    runtime.costly = True
    events = examine(runtime, baseline, tmp_path, parity=True)
    sample = [("feed", 29), *[("feed", 1)] * 3, ("logits", 32)]
    assert runtime.calls == [("feed", 16), ("feed", 1), *sample, *[("logits", 33)] * 4]
    (parity,) = [event["parity"] for event in events if "parity" in event]
    assert len(parity["ids"]) == 32


def test_the_child_ends_when_the_parent_stops_listening(baseline: BaselineStore) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = set(psutil.Process().children())  # of other tests
    with pytest.raises(KeyboardInterrupt):
        verify_artifact(Path("m"), "works", baseline, context=128, progress=interrupt, probe=PROBE)
    assert set(psutil.Process().children()) == before


def test_generation_is_what_no_cache_gives() -> None:
    model = EchoModel(64)
    tokens = [3, 1, 4]
    for _ in range(32):
        tokens.append(int(np.argmax(model.logits(tokens)[-1])))
    found = check_generation(model, [3, 1, 4], 32)
    assert found.consistent and list(found.tokens) == tokens[3:] == greedy(model, [3, 1, 4], 32)
    assert len(set(found.tokens)) > 3


def test_a_cache_that_forgets_is_caught() -> None:
    found = check_generation(EchoModel(64, forgets=True), [3, 1, 4], 32)
    assert not found.consistent
    at = found.first_difference
    assert at is not None and found.gap is not None
    assert found.gap > 0.01  # no tie: the cache is wrong
    # The same place and gap as running the text anew for every token.
    logits = EchoModel(64).logits([3, 1, 4, *found.tokens[:at]])[-1]
    assert found.gap == pytest.approx(float(logits.max() - logits[found.tokens[at]]))


def test_speed_counts_what_was_fed() -> None:
    now = 0.0

    class Slow(EchoModel):
        def feed(self, tokens: Sequence[int]):  # type: ignore[no-untyped-def]
            nonlocal now
            now += 0.25 if len(tokens) > 1 else 0.125
            return super().feed(tokens)

    speed = measure_speed(Slow(16), [1] * 20, 5, repeats=2, clock=lambda: now)
    assert (speed.repeats, speed.prefill_tokens, speed.decode_tokens) == (2, 20, 5)
    assert (speed.prefill_tokens_per_second, speed.decode_tokens_per_second) == (80, 8)
    hurried = measure_speed(Slow(16), [1] * 20, 5, repeats=9, seconds=0.0, clock=lambda: now)
    assert (hurried.repeats, hurried.decode_tokens) == (1, 4)
    assert hurried.decode_tokens_per_second == 8


@linux
def test_anonymous_peak_is_of_the_block() -> None:
    with AnonymousPeak() as watch:
        # A mapping of its own: the heap may hold 64 MiB of pages that are resident already.
        block = mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        before = watch.peak or 0
        block.write(b"x" * (64 << 20))
        until(lambda: (watch.peak or 0) > before + (48 << 20))
        block.close()
    after = read_status("RssAnon")
    assert watch.peak is not None and after is not None
    assert watch.peak - after > 48 << 20
    assert (peak_memory() or 0) >= watch.peak
