"""The float model's answers, kept for the next build of the same model."""

from __future__ import annotations

import numpy as np

from compress.verify.baseline import BaselineStore
from compress.verify.kept import KeptBaseline
from compress.verify.resources import Speed

WINDOWS = [[1, 2, 3, 4], [5, 6, 7, 0]]
SPEED = Speed(100.0, 50.0, 16, 8, 3)


def written(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    logits = [rng.standard_normal((4, 8)).astype(np.float32) for _ in WINDOWS]
    return BaselineStore.write(folder, WINDOWS, logits)


def test_kept_and_borrowed(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    store = written(first)
    kept = KeptBaseline.of(tmp_path / "kept", "model", WINDOWS, "torch")
    second.mkdir()
    assert kept.borrow(second) is None
    kept.keep(first, SPEED)
    kept.keep(first, None)  # another was faster
    for path in first.iterdir():
        path.unlink()
    found = kept.borrow(second)
    assert found is not None
    again, speed = found
    assert speed == SPEED
    assert np.array_equal(again.nll, store.nll) and np.array_equal(again.top, store.top)
    assert [list(window) for window in again.windows] == WINDOWS
    assert (second / "logprobs.u16").stat().st_nlink == 2  # no second copy on the disk


def test_another_model_text_or_runtime_has_answers_of_its_own(tmp_path):
    keys = {
        KeptBaseline.of(tmp_path, model, windows, runtime).key
        for model in ("a", "b")
        for windows in (WINDOWS, WINDOWS[:1])
        for runtime in ("torch, 1 threads", "torch, 2 threads")
    }
    assert len(keys) == 8


def test_what_is_damaged_is_not_borrowed(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    written(first)
    second.mkdir()
    kept = KeptBaseline.of(tmp_path / "kept", "model", WINDOWS, "torch")
    kept.keep(first, None)
    (tmp_path / "kept" / kept.key / "baseline.npz").write_bytes(b"")
    assert kept.borrow(second) is None
    (tmp_path / "kept" / kept.key / "facts.json").write_text("{")
    assert kept.borrow(second) is None
