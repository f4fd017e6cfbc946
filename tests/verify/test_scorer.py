"""The default amount of scored text, and its description in a dry run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny

from compress.checkpoint.checkpoint import Checkpoint
from compress.errors import RecipeError
from compress.plan.job import prepare, window_count
from compress.recipe import load
from compress.verify.scorer import describe_verification


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    checkpoint = Checkpoint.open(str(tiny.make("llama", tmp_path_factory.mktemp("scorer") / "m")))
    return prepare(checkpoint, load("int4-fast", [], []), transforms={})


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
        load("int4-fast", ["verify.windows=-1"], [])


def test_a_dry_run_names_runtimes_windows_and_tokens(job):
    length = min(512, job.config.max_context)
    assert describe_verification(job, job.plans) == (
        "verify the float model, gguf Q4_K_M, onnx int4-g32, coreml int4-g32 "
        f"on 16 windows of {length} tokens"
    )
