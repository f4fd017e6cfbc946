"""The arithmetic of `fit`, against figures that were published or worked out by hand."""

from __future__ import annotations

import pytest

from compress.arch import DecoderConfig
from compress.errors import UsageError
from compress.footprint import (
    Footprint,
    devices,
    footprint,
    get_device,
    judge,
    largest_context,
    tokens_per_second,
)

PHI3_MINI = {
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 3072,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "intermediate_size": 8192, "vocab_size": 32064, "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip


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
    need = footprint(phi3, 1_911_000_000, 0, 1024)
    limit = 3_120_000_000
    context = largest_context(phi3, need, limit)
    per_token = phi3.kv_cache_bytes_per_token()
    rest = need.weights + need.activations
    assert rest + context * per_token <= limit < rest + (context + 1) * per_token
    assert largest_context(phi3, need, 1_000_000) == 0
    assert largest_context(phi3, need, 10**12) == 4096


def test_every_device_is_plausible():
    for device in devices().values():
        assert device.app_limit <= device.entitled < device.memory
        assert 30e9 < device.bandwidth < 100e9
        assert set(device.estimated) <= {"app_limit", "entitled", "bandwidth"}


def test_unknown_device_offers_the_nearest():
    with pytest.raises(UsageError) as caught:
        get_device("iphone14")
    assert "iphone-14" in caught.value.hint
