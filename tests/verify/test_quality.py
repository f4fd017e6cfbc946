"""compress.verify.quality and baseline: figures against brute force, errors against simulation."""

from __future__ import annotations

import errno
import math
from pathlib import Path

import numpy as np
import pytest
from echo_model import EchoModel, text_windows

from compress.errors import ArtifactError, CheckpointError, DiskFullError
from compress.verify import quality
from compress.verify.baseline import BaselineStore, chunks, log_softmax
from compress.verify.quality import (
    Quality,
    TokenScores,
    cluster_mean,
    cluster_quantile,
    score,
    summarize,
)


def store(folder: Path, windows: list[list[int]], model: EchoModel) -> BaselineStore:
    return BaselineStore.write(folder, windows, (model.logits(window) for window in windows))


def compare(runtime: EchoModel, saved: BaselineStore) -> Quality:
    return summarize(score(runtime, saved))


def scores_of(kl: np.ndarray, window: np.ndarray) -> TokenScores:
    position = np.zeros(len(kl), np.int32)
    return TokenScores(window, position, np.ones(len(kl)), 1 + kl, kl, kl < 1)


def test_figures_equal_brute_force(tmp_path: Path) -> None:
    windows = [*text_windows(50, 3, 40), *text_windows(50, 1, 17, seed=2)]
    float_model, artifact = EchoModel(50), EchoModel(50, noise=0.4)
    found = compare(artifact, store(tmp_path, windows, float_model))

    nll, float_nll, kl, agrees = [], [], [], []
    for window in windows:
        for t in range(len(window) - 1):  # one position at a time, in plain Python floats
            p_logits = [float(x) for x in float_model.logits(window)[t]]
            q_logits = [float(x) for x in artifact.logits(window)[t]]
            p_sum = sum(math.exp(x) for x in p_logits)
            q_sum = sum(math.exp(x) for x in q_logits)
            p = [math.exp(x) / p_sum for x in p_logits]
            q = [math.exp(x) / q_sum for x in q_logits]
            nll.append(-math.log(q[window[t + 1]]))
            float_nll.append(-math.log(p[window[t + 1]]))
            kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            agrees.append(p.index(max(p)) == q.index(max(q)))
    n = len(nll)
    assert (found.windows, found.tokens) == (4, n) == (4, 3 * 39 + 16)
    assert found.perplexity.value == pytest.approx(math.exp(sum(nll) / n), rel=1e-7)
    assert found.baseline_perplexity.value == pytest.approx(math.exp(sum(float_nll) / n), rel=1e-7)
    assert found.perplexity_ratio.value == pytest.approx(
        math.exp((sum(nll) - sum(float_nll)) / n), rel=1e-7
    )
    assert found.kl_mean.value == pytest.approx(sum(kl) / n, abs=2e-6)
    assert found.kl_p99.value == pytest.approx(float(np.quantile(kl, 0.99)), abs=2e-4)
    assert found.kl_max == pytest.approx(max(kl), abs=2e-3)
    assert found.top1_agreement.value == pytest.approx(sum(agrees) / n, abs=1e-12)
    assert found.nonfinite_tokens == 0
    assert 1.02 < found.perplexity_ratio.value < 2  # the noise is seen at all
    assert 0.5 < found.top1_agreement.value < 1


def test_the_float_model_against_itself_is_perfect(tmp_path: Path) -> None:
    found = compare(EchoModel(50), store(tmp_path, text_windows(50, 4, 30), EchoModel(50)))
    assert found.perplexity_ratio == (1.0, 0.0)
    assert found.top1_agreement == (1.0, 0.0)
    assert 0 <= found.kl_mean.value < 5e-8


@pytest.mark.parametrize("vocab", [512, 32064])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 12.0], ids=["flat", "usual", "sharp"])
def test_noise_of_the_store_is_far_below_a_runtimes(
    tmp_path: Path, vocab: int, temperature: float
) -> None:
    random = np.random.default_rng(5)
    logits = (random.normal(0, 1.5, (33, vocab)) * temperature).astype(np.float32)
    other = (logits + random.normal(0, 0.3, logits.shape)).astype(np.float32)
    saved = BaselineStore.write(tmp_path, [[1] * 33], [logits])
    p, log_p = (array.astype(np.float64) for array in saved.probs(0, slice(0, 32)))
    mass = p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(mass, 1, rtol=1e-3)  # half a step is 3e-4
    p, log_p = p / mass, log_p - np.log(mass)
    exact, log_q = log_softmax(logits[:32]), log_softmax(other[:32])

    own = (p * (log_p - exact)).sum(axis=1)  # KL(stored ‖ exact): a second-order error
    assert 0 <= own.mean() < 3e-8
    stored = (p * (log_p - log_q)).sum(axis=1)
    true = (np.exp(exact) * (exact - log_q)).sum(axis=1)
    assert abs(stored.mean() - true.mean()) < 5e-6  # first order: random signs, 32 positions
    assert np.abs(stored - true).max() < 2e-4
    assert saved.nbytes == 32 * vocab * 2


@pytest.mark.parametrize("noise", [1e-3, 0.1, 1.5])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 12.0], ids=["flat", "usual", "sharp"])
def test_the_fused_pass_against_float64(tmp_path: Path, temperature: float, noise: float) -> None:
    """The oracle: log-softmax and KL in float64, of the very probabilities that are stored."""
    random = np.random.default_rng(9)
    vocab = 49152
    logits = (random.normal(0, 1.5, (33, vocab)) * temperature).astype(np.float32)
    other = (logits + random.normal(0, noise, logits.shape)).astype(np.float32)
    window = random.integers(0, vocab, 33).tolist()
    saved = BaselineStore.write(tmp_path, [window], [logits])
    p, log_p = (array.astype(np.float64) for array in saved.probs(0, slice(0, 32)))
    mass = p.sum(axis=1, keepdims=True)
    log_q = log_softmax(other[:32])
    exact = (p / mass * (log_p - np.log(mass) - log_q)).sum(axis=1)
    found = quality.score_window(saved, 0, other)
    assert abs(found.kl - exact).max() < 1e-6
    assert found.kl.mean() == pytest.approx(exact.mean(), abs=1e-7)
    at = np.arange(32), np.array(window[1:])
    np.testing.assert_allclose(found.nll, -log_q[at], rtol=1e-6)
    np.testing.assert_allclose(saved.nll, -log_softmax(logits[:32])[at], rtol=1e-6)


def test_tokens_that_the_float_model_excludes(tmp_path: Path) -> None:
    """Padding entries at -inf in the artifact cost nothing where the float model has p = 0."""
    logits = np.random.default_rng(0).normal(size=(9, 20)).astype(np.float32)
    logits[:, 17:] = -1e30
    masked = logits.copy()
    masked[:, 17:] = -np.inf
    saved = BaselineStore.write(tmp_path, [[1] * 9], [logits])
    assert quality.score_window(saved, 0, masked).kl.max() < 1e-7
    masked[:, 3] = -np.inf  # but here the float model has mass
    assert np.isinf(quality.score_window(saved, 0, masked).kl).all()


def test_nan_logits_are_counted_and_never_agree(tmp_path: Path) -> None:
    windows = text_windows(20, 3, 12)
    saved = store(tmp_path, windows, EchoModel(20))

    class Broken(EchoModel):
        def logits(self, tokens):  # type: ignore[no-untyped-def]
            out = super().logits(tokens)
            out[2] = np.nan
            out[3, out[3].argmax()] = np.inf  # the right token by chance
            return out

    found = compare(Broken(20), saved)
    assert found.nonfinite_tokens == 6
    assert found.top1_agreement.value == pytest.approx(1 - 6 / 33)
    assert math.isnan(found.kl_mean.value)
    assert math.isnan(found.perplexity.value)


def test_chunking_does_not_change_figures(tmp_path: Path) -> None:
    """A window of three chunks against its tokens on their own."""
    vocab, length = 1 << 15, 20
    assert len(chunks(length - 1, vocab)) == 3
    random = np.random.default_rng(5)
    window = random.integers(0, vocab, length).tolist()
    logits, other = random.normal(0, 2, (2, length, vocab)).astype(np.float32)
    whole = quality.score_window(BaselineStore.write(tmp_path / "a", [window], [logits]), 0, other)
    for t in (0, 7, 8, 15, 16, 18):
        pair = slice(t, t + 2)
        alone = BaselineStore.write(tmp_path / str(t), [window[pair]], [logits[pair]])
        (kl,), (nll,) = (getattr(quality.score_window(alone, 0, other[pair]), key)
                         for key in ("kl", "nll"))  # fmt: skip
        assert whole.kl[t] == pytest.approx(kl, rel=1e-12)
        assert whole.nll[t] == nll


def test_window_error_is_the_jackknife() -> None:
    random = np.random.default_rng(3)
    values = random.normal(size=8 * 25) + np.repeat(random.normal(size=8), 25)
    window = np.repeat(np.arange(8, dtype=np.int32), 25)
    left_out = np.array([values[window != w].mean() for w in range(8)])
    jackknife = math.sqrt(7 / 8 * ((left_out - left_out.mean()) ** 2).sum())
    assert cluster_mean(values, window).se == pytest.approx(jackknife, rel=1e-12)


def test_errors_cover_the_truth_where_naive_ones_do_not() -> None:
    """Correlated tokens, 80 windows, 400 trials: ±1.96 se holds the mean and the quantile."""
    random = np.random.default_rng(11)
    trials, windows, length = 400, 80, 15
    window = np.repeat(np.arange(windows, dtype=np.int32), length)
    # exp of a normal of variance 1, half of it shared by the window: mean e^0.5, 99 % at e^2.326
    hits = {"mean": 0, "naive": 0, "p99": 0}
    for _ in range(trials):
        shared = np.repeat(random.normal(size=windows), length)
        values = np.exp((shared + random.normal(size=windows * length)) * math.sqrt(0.5))
        mean = cluster_mean(values, window)
        p99 = cluster_quantile(values, window, 0.99)
        assert mean.se is not None and p99.se is not None
        naive = values.std() / math.sqrt(len(values))
        hits["mean"] += abs(mean.value - math.exp(0.5)) < 1.96 * mean.se
        hits["naive"] += abs(mean.value - math.exp(0.5)) < 1.96 * naive
        hits["p99"] += abs(p99.value - math.exp(2.3263)) < 1.96 * p99.se
    assert 0.88 < hits["mean"] / trials < 0.98
    assert 0.80 < hits["p99"] / trials < 0.985
    assert hits["naive"] / trials < 0.7


def test_paired_ratio_is_tighter_than_its_parts(tmp_path: Path) -> None:
    saved = store(tmp_path, text_windows(50, 12, 40), EchoModel(50))
    found = compare(EchoModel(50, noise=0.1), saved)
    assert found.perplexity_ratio.se is not None and found.perplexity.se is not None
    assert found.perplexity_ratio.se < 0.3 * found.perplexity.se / found.perplexity.value


def test_one_window_has_no_error() -> None:
    found = summarize(scores_of(np.array([0.1, 0.2, 0.4]), np.zeros(3, np.int32)))
    assert found.kl_mean.value == pytest.approx(0.7 / 3)
    assert found.kl_mean.se is None and found.kl_p99.se is None and found.perplexity.se is None


def test_series_bins_in_order() -> None:
    kl = np.arange(1000, dtype=np.float64)
    window = np.repeat(np.arange(10, dtype=np.int32), 100)
    position = np.tile(np.arange(100, dtype=np.int32), 10)
    scores = TokenScores(window, position, kl, kl, kl, kl < 0)
    found = summarize(scores)
    along, by_position = found.kl_along_text, found.kl_by_position
    assert along.tokens_per_point == 11 and len(along.mean) == 91
    assert along.mean[0] == 5.0 and along.max[0] == 10.0
    assert along.mean[-1] == 994.5 and along.max[-1] == 999.0  # the last bin is short
    assert by_position.tokens_per_point == 2 and len(by_position.mean) == 50
    assert by_position.mean[0] == pytest.approx(
        np.mean([100 * w + i for w in range(10) for i in (0, 1)])
    )


def test_scores_survive_the_disk(tmp_path: Path) -> None:
    scores = quality.score(EchoModel(20), store(tmp_path, text_windows(20, 2, 9), EchoModel(20)))
    scores.save(tmp_path / "scores.npz")
    again = TokenScores.load(tmp_path / "scores.npz")
    assert summarize(again) == summarize(scores)


def test_the_baseline_is_written_as_it_comes(tmp_path: Path) -> None:
    windows, model = text_windows(20, 3, 9), EchoModel(20)
    seen: list[int] = []

    def stream():  # type: ignore[no-untyped-def]
        for window in windows:
            seen.append((tmp_path / "logprobs.u16").stat().st_size if seen else 0)
            yield model.logits(window)

    done: list[tuple[int, int]] = []
    BaselineStore.write(tmp_path, windows, stream(), lambda *step: done.append(step))
    assert done == [(1, 3), (2, 3), (3, 3)]
    opened = BaselineStore(tmp_path)
    assert [window.tolist() for window in opened.windows] == windows
    assert opened.vocab_size == 20


def test_an_unfinished_or_damaged_baseline_is_refused(tmp_path: Path) -> None:
    windows = text_windows(20, 3, 9)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        BaselineStore.write(tmp_path, windows, [EchoModel(20).logits(windows[0])])
    with pytest.raises(ArtifactError, match="missing or damaged"):
        BaselineStore(tmp_path)
    store(tmp_path, windows, EchoModel(20))
    (tmp_path / "logprobs.u16").write_bytes(b"short")
    with pytest.raises(ArtifactError, match="missing or damaged"):
        BaselineStore(tmp_path)


def test_a_broken_float_model_is_refused(tmp_path: Path) -> None:
    logits = np.zeros((5, 8), np.float32)
    logits[1, 2] = np.nan
    with pytest.raises(CheckpointError, match="not finite"):
        BaselineStore.write(tmp_path, [[0, 1, 2, 3, 4]], [logits])


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(DiskFullError, match=r"the disk ran full in .* float model's answers"):
        store(tmp_path, text_windows(20, 1, 9), EchoModel(20))


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    saved = store(tmp_path, text_windows(20, 2, 9), EchoModel(20))
    with pytest.raises(ArtifactError, match="21 tokens, the float model 20"):
        compare(EchoModel(21), saved)
    with pytest.raises(ArtifactError, match=r"shape \(8, 20\), not \(9, 20\)"):
        quality.score_window(saved, 0, np.zeros((8, 20), np.float32))
