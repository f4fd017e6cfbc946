"""The time of a verification, told beforehand; few windows for large models."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import tiny

from compress.checkpoint.checkpoint import Checkpoint
from compress.decoder.config import DecoderConfig
from compress.decoder.decoder import Decoder
from compress.errors import RecipeError
from compress.plan.job import prepare, window_count
from compress.plan.shapes import Plan, PlanEntry
from compress.progress import Estimate, rough_time
from compress.recipe import load
from compress.verify import forecast as forecasting
from compress.verify.agenda import Agenda, Run
from compress.verify.forecast import (
    Slowness,
    artifact_seconds,
    artifact_start,
    artifact_steps,
    float_steps,
    run_seconds,
    slowness,
    unpacking_seconds,
    verification_seconds,
)
from compress.verify.scorer import forecast
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
    few, many = Agenda.of([128] * 4, 256), Agenda.of([128] * 80, 256)
    one = verification_seconds(job.config, job.plans[:1], few)
    assert verification_seconds(job.config, job.plans, few) > one
    assert verification_seconds(job.config, job.plans[:1], many) > one


def test_all_is_the_float_model_and_each_artifact(job):
    agenda, slow = Agenda.of([128] * 4, 256), Slowness(3.0, 5.0)
    whole = verification_seconds(job.config, job.plans, agenda, slow)
    parts = [artifact_seconds(job.config, plan, agenda, slow) for plan in job.plans]
    alone = verification_seconds(job.config, (), agenda, slow)
    assert whole == pytest.approx(alone + sum(parts))


def test_a_slow_machine_takes_longer(job, monkeypatch):
    assert 0 < slowness(1).runtime < 1000
    monkeypatch.setattr("compress.verify.scorer.slowness", lambda threads: Slowness(1e6, 1e6))
    seconds, told = forecast(job, job.plans, 1)
    assert told.startswith("verify the float model, gguf Q4_K_M, onnx int4-g32, coreml int4-g32 on")
    assert told.endswith(f"tokens: about {rough_time(seconds)}")
    monkeypatch.setattr("compress.verify.scorer.slowness", lambda threads: Slowness(2e6, 2e6))
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


# qwen2.5-0.5b with ten blocks, as benchmarks/progress.md has it: config.json, and tensors on disk.
QWEN = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 10,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936,
    "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip
GRIDS = {"Q8_0": 136_708_096, "Q5_0": 104_939_520, "Q6_K": 21_790_720, "Q4_K": 21_790_720}


@pytest.fixture(scope="module")
def qwen():
    return DecoderConfig.from_hf(QWEN)


def plan_of(format: str) -> Plan:
    grids = GRIDS if format == "gguf" else {"int4-g32": 285_229_056}
    entries = tuple(PlanEntry("", "", grid, (count,), count // 2) for grid, count in grids.items())
    return Plan(format, "", "qwen", entries)


@pytest.mark.parametrize(
    ("format", "kind", "tokens", "seconds"),
    [
        ("gguf", "read", 256, 1.21),
        ("gguf", "decoded", 32, 1.35),
        ("gguf", "answered", 512, 4.70),
        ("onnx", "read", 256, 1.12),
        ("onnx", "decoded", 32, 0.69),
        ("onnx", "answered", 512, 2.45),
        ("coreml", "read", 256, 1.73),
        ("coreml", "decoded", 32, 4.70),
        ("coreml", "answered", 512, 3.40),
    ],
)
def test_runs_take_what_was_measured(qwen, format, kind, tokens, seconds):
    """CPU seconds of one thread, on a machine that multiplies matrices 1.05 times as fast."""
    found = run_seconds(qwen, plan_of(format), Run(tokens, kind), Slowness(0.95, 0.95))
    assert found == pytest.approx(seconds, rel=0.2)


def test_what_the_evaluator_does_not_keep_is_unpacked_for_every_run():
    """750 million weights, measured on the same machine: 0.8 s for a token, 5.8 and 3.8 s for 256
    of them, the first time and later."""
    assert 0.95 * unpacking_seconds(750_000_000, first=False) == pytest.approx(0.8, rel=0.2)
    more = unpacking_seconds(750_000_000, first=True) - unpacking_seconds(750_000_000, first=False)
    assert 0.95 * more == pytest.approx(5.8 - 3.8, rel=0.3)


def test_all_of_phi3_mini_takes_what_was_measured():
    """CPU seconds in docs/performance.md, two windows of 128 tokens: 34 of the float model, 80 of
    llama.cpp, 66 of onnxruntime, 547 of the MIL evaluator."""
    phi3 = DecoderConfig.from_hf(
        QWEN | {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192,
                "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
                "vocab_size": 32_064, "tie_word_embeddings": False}
    )  # fmt: skip
    agenda, slow = Agenda.of([128] * 2, 2048), Slowness()
    for format, grid, seconds in (
        ("gguf", "Q4_K", 80), ("onnx", "int4-g32", 66), ("coreml", "int4-g32", 547),
    ):  # fmt: skip
        entry = PlanEntry("", "", grid, (phi3.num_parameters,), phi3.num_parameters // 2)
        found = artifact_seconds(phi3, Plan(format, "", "phi3", (entry,)), agenda, slow)
        assert found == pytest.approx(seconds, rel=0.3)
    assert verification_seconds(phi3, (), agenda) == pytest.approx(34, rel=0.3)


def test_comparing_is_done_by_one_thread(qwen):
    plan, slow = plan_of("onnx"), Slowness(0.5, 2.0)
    answered = run_seconds(qwen, plan, Run(512, "answered"), slow)
    scored = run_seconds(qwen, plan, Run(512, "scored"), slow)
    both = Slowness(1.0, 1.0)
    alone = run_seconds(qwen, plan, Run(512, "scored"), both)
    alone -= run_seconds(qwen, plan, Run(512, "answered"), both)
    assert scored - answered == pytest.approx(2 * alone)
    assert alone == pytest.approx(0.75, rel=0.2)  # measured


@pytest.mark.parametrize("format", ["gguf", "onnx", "coreml"])
@pytest.mark.parametrize("machine", [0.5, 1.0, 2.0, 6.0])
@pytest.mark.parametrize("windows", [2, 8])
def test_time_left_is_right_though_the_machine_is_another(qwen, format, machine, windows):
    """And windows take a fifth longer than all else says: within 30 % after a tenth."""
    agenda = Agenda.of([512] * windows, 2048)
    steps = artifact_steps(qwen, plan_of(format), agenda, Slowness())
    clock = [0.0]
    estimate = Estimate(steps, lambda: clock[0], artifact_start(plan_of(format), Slowness()))
    told = list(verify(estimate, clock, steps, machine))
    whole = clock[0]
    after_a_tenth = [gone + left for gone, left in told if gone > whole / 10]
    assert len(after_a_tenth) > windows
    assert max(abs(all / whole - 1) for all in after_a_tenth) < 0.3


def verify(estimate, clock, steps, machine):
    """Go through the steps as a child does; yield seconds gone and left after each run."""
    clock[0] += 2 * machine
    total = estimate_total = sum(step.units for step in steps)
    begun, done = clock[0], 0
    estimate.update(0, total)
    for step in steps:
        cost = step.cost * machine * (1.2 if step.kind.startswith("scored") else 1.0)
        for units in [1] * step.units if step.kind == "decoded" else [step.units]:
            if step.until < clock[0] - begun:
                total -= units
                continue
            if step.until == math.inf and total < estimate_total:
                estimate_total = total
                estimate.update(done, total)  # no more time for measurements
            clock[0] += units * cost
            done += units
            estimate.update(done, estimate_total)
            yield estimate.seconds, estimate.seconds_left
