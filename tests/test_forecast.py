"""The time of a verification, told beforehand; few windows for large models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny

from compress.checkpoint import Checkpoint
from compress.decoder import Decoder
from compress.errors import RecipeError
from compress.job import prepare, window_count
from compress.progress import rough_time
from compress.recipe import load
from compress.scorer import forecast
from compress.verify import forecast as forecasting
from compress.verify.forecast import (
    artifact_seconds,
    float_steps,
    slowness,
    verification_seconds,
)
from exporters import SHIPYARD


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    checkpoint = Checkpoint.open(str(tiny.make("llama", tmp_path_factory.mktemp("told") / "m")))
    return prepare(checkpoint, load("int4-fast", [], []), SHIPYARD.get_exporter)


def test_few_windows_for_large_models_unless_asked_for(job):
    def large(parameters):
        return replace(job.config, vocab_size=parameters // job.config.hidden_size)

    assert window_count(job.config, 0) == 16
    assert window_count(large(1_300_000_000), 0) == 8
    assert window_count(large(3_800_000_000), 0) == 4
    assert window_count(large(3_800_000_000), 32) == 32


def test_a_recipe_says_how_many_windows():
    assert load("int4-fast", ["verify.windows=12"], []).windows == 12
    assert load("int4-fast", [], []).windows == 0
    with pytest.raises(RecipeError, match=r"verify\.windows: 'some' is not allowed"):
        load("int4-fast", ["verify.windows=some"], [])
    with pytest.raises(RecipeError, match=r"verify\.windows"):
        load("int4-fast", ["verify.windows=1"], [])


def test_time_grows_with_text_and_artifacts(job):
    one = verification_seconds(job.config, job.plans[:1], 4, 128)
    assert verification_seconds(job.config, job.plans, 4, 128) > one
    assert verification_seconds(job.config, job.plans[:1], 8, 128) > 1.5 * one


def test_all_is_the_float_model_and_each_artifact(job):
    whole = verification_seconds(job.config, job.plans, 4, 128)
    parts = [artifact_seconds(job.config, plan, 4, 128) for plan in job.plans]
    assert whole == pytest.approx(verification_seconds(job.config, (), 4, 128) + sum(parts))


def test_a_slow_machine_takes_longer(job, monkeypatch):
    assert 0 < slowness(1) < 1000
    monkeypatch.setattr("compress.scorer.slowness", lambda threads: 1e9)
    seconds, told = forecast(job, job.plans, 1)
    assert told.startswith("verify the float model, gguf Q4_K_M, onnx int4-g32, coreml int4-g32 on")
    assert told.endswith(f"tokens: about {rough_time(seconds)}")
    monkeypatch.setattr("compress.scorer.slowness", lambda threads: 2e9)
    assert forecast(job, job.plans, 1)[0] > 1.5 * seconds


def test_times_are_told_roughly():
    assert [rough_time(s) for s in (3, 42, 200, 9000)] == ["5 s", "40 s", "3 min", "2.5 h"]


def test_steps_of_the_float_model_are_those_that_it_tells(job):
    windows = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    decoder = Decoder(job.config, job.source.read)
    batches = [len(batch) for batch in decoder.batches(windows)]
    steps = float_steps(job.config, batches, 4)
    told = []
    for _ in decoder.stream_logits(windows, progress=lambda *news: told.append(news)):
        pass
    assert sum(step.units for step in steps) == told[-1][1]
    assert forecasting.FLOAT > 0
