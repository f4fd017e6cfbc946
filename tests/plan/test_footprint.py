"""The estimates of `fit` against published figures and manual calculations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from compress.decoder.config import DecoderConfig
from compress.decoder.footprint import (
    Footprint,
    activation_bytes,
    chunk_bytes,
    devices,
    footprint,
    get_device,
    judge,
    largest_context,
    prompt_bytes,
    realistic_tokens_per_second,
    tokens_per_second,
)
from compress.errors import UsageError

PHI3_MINI = {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 3072,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "intermediate_size": 8192, "vocab_size": 32064, "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip

MEASURED = json.loads(
    (Path(__file__).resolve().parents[2] / "benchmarks" / "activations.json").read_text(
        encoding="utf-8"
    )
)


@pytest.fixture
def phi3():
    return DecoderConfig.from_hf(PHI3_MINI)


def test_phi3_mini_counts(phi3):
    assert phi3.num_parameters == 3_821_079_552
    assert phi3.kv_cache_bytes_per_token() == 393_216


def test_weights_cache_and_activations_are_three_numbers(phi3):
    need = footprint(phi3, 1_911_000_000, 49_250_304, 2048)
    assert need.kv_cache == 805_306_368
    assert need.total == need.weights + need.kv_cache + need.activations
    assert need.read_per_token == 1_911_000_000 - 49_250_304 + 805_306_368


def test_bandwidth_bound_is_that_of_the_roofline(phi3):
    # facts: LUT4 Phi-3-mini reads 1.86 GB per token: 27.5 tokens/s on an A16 at short context.
    need = footprint(phi3, 1_911_000_000, 49_250_304, 1)
    assert tokens_per_second(need, get_device("iphone-14-pro")) == pytest.approx(27.5, abs=0.1)
    assert tokens_per_second(need, get_device("iphone-14")) == pytest.approx(18.3, abs=0.1)


def test_verdicts_follow_the_limits():
    device = get_device("iphone-14")
    for total, verdict in (
        (device.app_limit, "fits"),
        (device.app_limit + 1, "with entitlement"),
        (device.entitled + 1, "too large"),
    ):
        assert judge(Footprint(total, 0, 0, 1, 1), device) == verdict


def test_largest_context_just_fits(phi3):
    limit = 3_120_000_000
    context = largest_context(phi3, footprint(phi3, 1_911_000_000, 0, 1024), limit)
    assert footprint(phi3, 1_911_000_000, 0, context).total <= limit
    assert footprint(phi3, 1_911_000_000, 0, context + 1).total > limit
    # (3.12 - 1.911 - about 0.1 for activations) GB at 393,216 bytes per position
    assert context == pytest.approx(2800, rel=0.02)


def test_largest_context_at_both_ends(phi3):
    need = footprint(phi3, 1_911_000_000, 0, 1024)
    assert largest_context(phi3, need, 1_000_000) == 0
    assert largest_context(phi3, need, 10**12) == 4096


def measured_rows():
    return [
        pytest.param(
            DecoderConfig.from_hf(MEASURED["configs"][row["model"]]),
            row,
            id=f"{row['model']}-{row['blocks']}-{row['context']}",
        )
        for row in MEASURED["rows"]
    ]


@pytest.mark.parametrize(("config", "row"), measured_rows())
def test_compute_buffer_is_the_one_llama_cpp_reported(config, row):
    tokens = MEASURED["chunk"]
    assert chunk_bytes(config, tokens, row["context"]) == pytest.approx(
        row["compute_buffer"], rel=0.01
    )


@pytest.mark.parametrize(("config", "row"), measured_rows())
def test_allowance_covers_the_measured_peak(config, row):
    allowed = activation_bytes(config, row["context"])
    assert row["peak"] <= allowed <= 1.42 * row["peak"]
    assert allowed - row["peak"] < 40_000_000


def test_number_of_blocks_does_not_change_the_compute_buffer():
    # That is what lets two blocks stand for thirty in the measurement.
    sizes = {}
    for row in MEASURED["rows"]:
        case = sizes.setdefault((row["model"], row["context"]), {})
        case[row["blocks"]] = row["compute_buffer"]
    several = [case for case in sizes.values() if len(case) > 1]
    assert len(several) >= 4
    assert all(len(set(case.values())) == 1 for case in several)


def test_every_device_is_plausible():
    for device in devices().values():
        assert device.app_limit <= device.entitled < device.memory
        assert 30e9 < device.bandwidth <= 100e9
        assert set(device.estimated) <= {"app_limit", "entitled", "bandwidth", "memory"}
        assert device.source and device.limits_measured == ("entitled" not in device.estimated)


@pytest.mark.parametrize(
    ("name", "limits", "measured"),
    [
        ("iphone-12-mini", (2.1e9, 2.4e9), True),
        ("iphone-12-pro", (3e9, 4e9), True),  # measured to be less than other phones of 6 GB
        ("iphone-13-pro", (3.12e9, 4.2e9), True),
        ("iphone-14", (3.12e9, 4.2e9), False),
        ("iphone-17", (3e9, 6e9), True),
        ("iphone-17e", (3e9, 6e9), False),
        ("iphone-18-pro", (4.4e9, 9e9), False),
        ("iphone-duo", (4.4e9, 9e9), False),
        ("ipad-16gb", (5e9, 12e9), True),
    ],
)
def test_limits_are_those_of_the_memory_and_say_whether_they_were_measured(name, limits, measured):
    device = get_device(name)
    assert (device.app_limit, device.entitled) == limits
    assert device.limits_measured == measured


def test_a_prompt_in_one_call_has_the_logits_of_all_positions(phi3):
    logits, mask, block = 131_334_144, 8_388_608, 163_577_856
    assert prompt_bytes(phi3, 2048, 2048) == logits + mask + block
    shared = replace(phi3, num_key_value_heads=8)  # a mask for each of four query heads
    more = prompt_bytes(shared, 2048, 2048) - prompt_bytes(phi3, 2048, 2048)
    assert more == 3 * mask
    assert prompt_bytes(phi3, 64, 2048) == prompt_bytes(phi3, 2048, 2048) // 32
    whole = footprint(phi3, 1_911_000_000, 0, 2048, prompt_call=1 << 20)
    chunk = footprint(phi3, 1_911_000_000, 0, 2048)
    assert whole.activations - prompt_bytes(phi3, 2048, 2048) == pytest.approx(
        chunk.activations - chunk_bytes(phi3, 512, 2048)
    )
    runner = footprint(phi3, 1_911_000_000, 0, 2048, prompt_call=1024)  # Core AI's
    less = prompt_bytes(phi3, 2048, 2048) - prompt_bytes(phi3, 1024, 2048)
    assert whole.activations - runner.activations == less
    outside = replace(whole, outside=True)  # the Neural Engine's
    assert whole.total - outside.total == whole.weights
    assert largest_context(phi3, outside, outside.total) == 2048
    context = largest_context(phi3, whole, whole.total)
    assert context == 2048 < largest_context(phi3, chunk, whole.total)


@pytest.mark.parametrize(("nbytes", "milliseconds"), [(338_000_000, 8.9), (2_076_000_000, 33.8)])
def test_likely_speeds_include_measured_ones(nbytes, milliseconds):
    # iPhone 17 Pro, MLX, 4 bits, 0.6 and 3.8 billion parameters: apple-silicon-llm-bench.
    device, need = get_device("iphone-17-pro"), Footprint(nbytes, 0, 0, nbytes, 1)
    slow, fast = realistic_tokens_per_second(need, device)
    assert slow < 1000 / milliseconds < fast < tokens_per_second(need, device)


def test_unknown_device_offers_the_nearest():
    with pytest.raises(UsageError) as caught:
        get_device("iphone14")
    assert "iphone-14" in caught.value.hint
