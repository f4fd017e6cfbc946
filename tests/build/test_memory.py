"""``--max-memory``: its bounds and refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
from commands import packlight, refused

from compress import __main__ as cli
from compress import machine
from compress.calibration import walk
from compress.checkpoint.checkpoint import Checkpoint
from compress.console import Console
from compress.decoder import decoder as decoding
from compress.decoder.decoder import Decoder
from compress.errors import UsageError
from compress.formats import get_format
from compress.machine import available_memory, bounded, resident_memory
from compress.plan.job import prepare
from compress.plan.memory import check_memory, hessian_bytes, smallest_memory
from compress.pruning.transforms import transforms_of
from compress.recipe import load


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make("llama", tmp_path_factory.mktemp("memory") / "tiny-llama")


def job_of(model, recipe="int4-fast", *overrides):
    found = load(recipe, overrides, [])
    return prepare(Checkpoint.open(str(model)), found, transforms=transforms_of(found))


def test_a_limit_bounds_what_is_available():
    with bounded(memory=resident_memory() + (64 << 20)):
        assert 0 < available_memory() <= 64 << 20
        with bounded(memory=1):
            assert available_memory() == 0
        assert 0 < available_memory() <= 64 << 20
    assert available_memory() > 64 << 20


def test_a_limit_that_is_too_small_is_refused_and_the_smallest_works(model):
    job = job_of(model, "phone-4bit")
    smallest = smallest_memory(job, verify=True)
    with pytest.raises(UsageError, match="too little") as caught:
        check_memory(job, Console(), limit=1 << 20, verify=True)
    told = int(caught.value.hint.split()[1].removesuffix("MB")) * 10**6
    assert told - 10**6 < smallest <= told
    check_memory(job, Console("quiet"), limit=told, verify=True)


def test_more_is_needed_the_more_is_done(model):
    def smallest(*overrides, verify):
        job = job_of(model, *overrides)
        return smallest_memory(job, verify=verify)

    gguf = "targets={gguf: {type: Q4_K_M}}"
    rounded = smallest("int4-fast", gguf, verify=False)
    searched = smallest("int4-fast", gguf, "quantize.solver=scale_search", verify=False)
    assert rounded < searched < smallest("phone-4bit", gguf, verify=False)
    assert rounded < smallest("int4-fast", gguf, verify=True)


def test_what_a_budget_or_a_mask_looks_at_counts(model):
    gguf, coreml = "targets={gguf: {type: Q4_K_M}}", "targets={coreml: {grid: int4-g32, %s}}"
    rounded = job_of(model, "int4-fast", gguf)
    budgeted = smallest_memory(rounded, verify=False, measures=True)
    assert smallest_memory(rounded, verify=False) < budgeted
    sizes = []
    for method in ("wanda", "sparsegpt"):
        job = job_of(model, "int4-fast", coreml % f"sparsity: 2of4, sparsity_method: {method}")
        job = replace(job, config=replace(job.config, intermediate_size=16384))  # large inputs
        sizes.append(smallest_memory(job, verify=False))
    assert sizes[0] < sizes[1]


def test_what_a_package_holds_whole_counts_and_no_more(model):
    def needed(settings):
        (plan,) = job_of(model, "int4-fast", f"targets={{coreml: {settings}}}").plans
        wide = replace(plan.entries[0], nbytes=plan.entries[0].nbytes << 10)  # a large embedding
        exporter = get_format("coreml")
        grown = replace(plan, entries=(wide, *plan.entries[1:]))
        assert exporter.writing_memory(grown) == exporter.writing_memory(plan)
        return exporter.writing_memory(plan)

    slabs = needed("{grid: int4-g32}")
    assert slabs < needed("{grid: lut4-tensor}")
    # Each array of a sparse matrix is written to its offset immediately, slab by slab.
    assert slabs == needed("{grid: int4-g32, sparsity: 2of4, sparsity_method: magnitude}")


def test_writers_that_wait_count(model):
    every, one = (
        smallest_memory(job_of(model, "int4-fast", *more), verify=False)
        for more in ((), ("targets={coreml: {grid: int4-g32}}",))
    )
    assert every > one


def test_second_moments_count_once_for_each_input(model):
    config = job_of(model).config
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    assert hessian_bytes(config, config.linear_roles)[0] == 4 * (
        2 * hidden**2 + heads**2 + inner**2
    )


def test_little_memory_makes_batches_with_the_same_logits(model, monkeypatch):
    job = job_of(model)
    windows = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    decoder = Decoder(job.config, job.source.read)
    whole = list(decoder.stream_logits(windows))
    monkeypatch.setattr(decoding, "available_memory", lambda: 0)
    told = []
    parts = list(decoder.stream_logits(windows, progress=lambda *news: told.append(news)))
    assert len(decoder.batches(windows)) == 3
    for mine, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert told[-1][0] == told[-1][1]
    assert told == sorted(told)


def test_hidden_states_stay_within_a_share_of_the_memory(monkeypatch):
    monkeypatch.setattr(walk, "available_memory", lambda: 1 << 40)
    assert walk.states_limit() == walk.STATES_LIMIT
    monkeypatch.setattr(walk, "available_memory", lambda: 8 << 20)
    assert walk.states_limit() == 1 << 20
    assert machine.available_memory() > 8 << 20


def test_the_command_refuses_in_one_line(model, tmp_path):
    done = packlight("build", model, "--max-memory", "10MB", "-o", "out", cwd=tmp_path)
    assert "error: --max-memory 10.00 MB (9.54 MiB) is too little for this model" in refused(done)
    done = packlight("build", model, "--max-memory", "ten", "-o", "out", cwd=tmp_path)
    assert "--max-memory: 'ten' is not a size" in refused(done)


def test_the_report_says_that_the_float_model_was_not_timed(model, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.verify.scorer.available_memory", lambda: 0)
    words = ["build", str(model), "-f", "gguf", "-r", "int4-fast", "-o", str(tmp_path / "out")]
    few = ["--set", "verify.windows=2", "--set", "verify.sequence_length=32"]
    assert cli.main([*words, *few]) < 2
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["baseline"]["decode_tokens_per_second"] is None
    assert any("speed was not measured" in note for note in report["notes"])
