"""The float model's logits, cached for the next build of the same model."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import numpy as np
import pytest
import tiny
from commands import server, until

import packlight
from compress import __version__
from compress.checkpoint.checkpoint import Checkpoint
from compress.decoder.decoder import Decoder
from compress.decoder.tokenizer import Tokenizer, eval_windows
from compress.files import file_lock
from compress.plan import job
from compress.plan.job import describe_model
from compress.verify.baseline import BaselineCache, BaselineStore
from compress.verify.resources import Speed
from compress.verify.scorer import read_text

WAIT = "look for the float model's answers"
WINDOWS = [[1, 2, 3, 4], [5, 6, 7, 0]]
SPEED = Speed(100.0, 50.0, 16, 8, 3)


def written(folder):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    logits = [rng.standard_normal((4, 8)).astype(np.float32) for _ in WINDOWS]
    return BaselineStore.write(folder, WINDOWS, logits)


def test_saved_and_loaded(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    store = written(first)
    cache = BaselineCache.of(tmp_path / "kept", "model", WINDOWS, "torch")
    second.mkdir()
    assert cache.load(second) is None
    cache.save(BaselineStore(first), SPEED)
    cache.save(BaselineStore(first), None)  # another was faster
    for path in first.iterdir():
        path.unlink()
    found = cache.load(second)
    assert found is not None
    again, speed = found
    assert speed == SPEED
    assert np.array_equal(again.nll, store.nll) and np.array_equal(again.top, store.top)
    assert [list(window) for window in again.windows] == WINDOWS
    assert (second / "logprobs.u16").stat().st_nlink == 2  # no second copy on the disk


def test_another_model_text_or_runtime_has_answers_of_its_own(tmp_path):
    keys = {
        BaselineCache.of(tmp_path, model, windows, runtime).key
        for model in ("a", "b")
        for windows in (WINDOWS, WINDOWS[:1])
        for runtime in ("torch, 1 threads", "torch, 2 threads")
    }
    assert len(keys) == 8


def test_what_is_damaged_is_not_loaded(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    written(first)
    second.mkdir()
    cache = BaselineCache.of(tmp_path / "kept", "model", WINDOWS, "torch")
    cache.save(BaselineStore(first), None)
    (tmp_path / "kept" / cache.key / "baseline.npz").write_bytes(b"")
    assert cache.load(second) is None
    (tmp_path / "kept" / cache.key / "facts.json").write_text("{")
    assert cache.load(second) is None


def test_builds_that_want_the_same_answers_compute_them_once(tmp_path):
    cache = BaselineCache.of(tmp_path / "kept", "model", WINDOWS, "torch")
    together, computed = Barrier(6), []

    def build(number):
        work = tmp_path / f"work{number}"
        work.mkdir()
        together.wait()
        with cache.found(work) as found:
            if found:
                return found
            computed.append(number)
            time.sleep(0.05)  # so that the others are there
            store = written(work)
            cache.save(store, SPEED)
            return store, SPEED

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(build, range(6)))
    assert len(computed) == 1
    assert len({(store.folder, store.nll.tobytes(), speed) for store, speed in answers}) == 6
    assert len({store.nll.tobytes() for store, _ in answers}) == 1
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [cache.key]


def test_what_is_added_is_not_in_the_cache_before_it_is_saved(tmp_path):
    rng = np.random.default_rng(1)
    logits = [rng.standard_normal((4, 8)).astype(np.float32) for _ in WINDOWS]
    cache = BaselineCache.of(tmp_path / "kept", "model", WINDOWS, "torch")
    begun = BaselineStore.begin(tmp_path / "work", WINDOWS)
    assert begun.ready == 0
    one = begun.extend(logits[:1], 1)
    cache.save(one, SPEED)
    kept = tmp_path / "kept" / cache.key / "logprobs.u16"
    before = kept.read_bytes()
    both = one.extend(logits[1:], 2)
    assert (one.ready, both.ready) == (1, 2) and kept.read_bytes() == before
    cache.save(both, SPEED)
    cache.save(one, None)  # fewer windows replace nothing
    whole = BaselineStore.write(tmp_path / "whole", WINDOWS, logits)
    (tmp_path / "again").mkdir()
    found = cache.load(tmp_path / "again")
    assert found is not None and found[0].ready == 2 and found[1] == SPEED
    assert kept.read_bytes() == (whole.folder / "logprobs.u16").read_bytes()
    assert np.array_equal(found[0].nll, whole.nll)


def test_what_is_damaged_is_computed_once_again(tmp_path):
    cache = BaselineCache.of(tmp_path / "kept", "model", WINDOWS, "torch")
    written(tmp_path / "first")
    cache.save(BaselineStore(tmp_path / "first"), None)
    (tmp_path / "kept" / cache.key / "facts.json").write_text("{")
    with cache.found(tmp_path / "first") as found:
        assert found is None
        cache.save(BaselineStore(tmp_path / "first"), SPEED)
    with cache.found(tmp_path / "first") as found:
        assert found is not None and found[1] == SPEED


def phases(path):
    return [json.loads(line)["phase"] for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_one_of_two_builds_scores_the_float_model(tmp_path):
    """Two processes that need it at the same time, at a lock that the test holds."""
    model = tiny.make("llama", tmp_path / "model")
    checkpoint = Checkpoint.open(str(model))
    windows = eval_windows(read_text(None), Tokenizer(model), 64, 2)
    asked = f"{Decoder(describe_model(checkpoint), None).name}, 1 threads, packlight {__version__}"
    cache = BaselineCache.of(tmp_path / "kept", checkpoint.fingerprint(), windows, asked)
    line = ["build", str(model), "-r", "int4-fast", "--threads", "1"]
    line += ["--set", "verify.windows=2", "--set", "verify.sequence_length=64", "-f", "gguf"]
    line += ["--keep-baseline", str(cache.folder)]
    files = [tmp_path / "first", tmp_path / "second"]
    cache.folder.mkdir()
    with file_lock(cache.folder / f"{cache.key}.lock"):
        said = tmp_path / "said"
        builds = [
            server().start(
                [*line, "--progress-file", str(file), "-o", f"{file}-out"],
                tmp_path, os.environ, said, said,
            )
            for file in files
        ]  # fmt: skip
        until(lambda: all(file.is_file() and WAIT in phases(file) for file in files))
        assert [phases(file)[-1] for file in files] == [WAIT, WAIT]
    for build in builds:  # a random model need not pass its gates
        assert server().wait(build)[0] in (0, 1), said.read_text()
    assert sorted("score the float model" in phases(file) for file in files) == [False, True]
    first, second = (
        json.loads((tmp_path / f"{file.name}-out" / "report.json").read_text())["baseline"]
        for file in files
    )
    assert first == second and first["perplexity"] > 1
    assert [path.name for path in cache.folder.iterdir()] == [cache.key]


def test_what_was_used_longest_ago_makes_room(tmp_path):
    written(tmp_path / "work")
    store = BaselineStore(tmp_path / "work")
    entries = [BaselineCache.of(tmp_path / "kept", name, WINDOWS, "torch") for name in "abc"]
    for age, entry in enumerate(entries):
        entry.save(store, SPEED)
        os.utime(entry.folder / entry.key, (1000 + age, 1000 + age))
    size = sum(file.stat().st_size for file in (tmp_path / "kept" / entries[0].key).iterdir())
    (tmp_path / "again").mkdir()
    assert entries[0].load(tmp_path / "again")  # used now
    last = BaselineCache.of(tmp_path / "kept", "d", WINDOWS, "torch")
    replace(last, limit=2 * size + size // 2).save(store, SPEED)
    left = {path.name for path in (tmp_path / "kept").iterdir()}
    assert left == {entries[0].key, last.key}


@pytest.mark.parametrize("small", [True, False])
def test_models_that_are_not_small_keep_their_baseline_unasked(small, tmp_path, monkeypatch):
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    if not small:
        monkeypatch.setattr(job, "FEWER_FROM", 0)
    model, out = tiny.make("llama", tmp_path / "m"), tmp_path / "out"
    packlight.build(model, "int4-fast", formats=["onnx"], output=out, verify=False)
    options = {"sequence_length": 32, "gates": {"kl_divergence": "<=9"}}
    first = packlight.verify(out, model, **options)
    again = packlight.verify(out, model, **options)
    note = "The float model's answers are those of an earlier verification, from the cache."
    assert note not in first.notes and (note in again.notes) is not small
    assert (tmp_path / "cache" / "baselines").exists() is not small
    assert again["onnx"].perplexity == first["onnx"].perplexity
    assert again["onnx"].windows == first["onnx"].windows == (None if small else 2)
    assert small or first["onnx"].stopped == "every gate is passed by 3 standard errors"
    later = packlight.verify(out, model, windows=3, **options)
    assert later["onnx"].windows is None and later.baseline.windows == 3
