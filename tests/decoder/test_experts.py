"""Mixtures of experts in the reference decoder: layouts on disk, and one matrix at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from exported import Exports, config_of

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import DecoderConfig, WeightMap
from compress.decoder.decoder import Decoder
from compress.errors import CheckpointError, UnsupportedModelError


def opened(exported: Exports, row: str) -> Stored:
    checkpoint = Checkpoint.open(exported.checkpoint(row))
    return Stored(checkpoint, config_of(checkpoint))


def test_a_tensor_of_all_experts_is_read_by_expert_and_rows(exported: Exports) -> None:
    stored = opened(exported, "granitemoeshared")
    stem = "model.layers.1.block_sparse_moe"
    both = stored.checkpoint.read(f"{stem}.input_linear.weight")  # [experts, gate and up, hidden]
    down = stored.checkpoint.read(f"{stem}.output_linear.weight")
    assert both.shape == (8, 192, 128)
    for expert in (0, 5):
        name = f"blocks.1.experts.{expert}"
        assert (stored.read(f"{name}.gate_proj.weight") == both[expert, :96]).all()
        assert (stored.read(f"{name}.up_proj.weight") == both[expert, 96:]).all()
        rows = stored.read(f"{name}.up_proj.weight", slice(10, 70))
        assert (rows == both[expert, 106:166]).all()
        assert (stored.read(f"{name}.down_proj.weight", slice(3, 9)) == down[expert, 3:9]).all()


def test_parameters_are_counted(exported: Exports) -> None:
    for row in ("mixtral", "qwen2_moe", "granitemoeshared"):
        stored = opened(exported, row)
        sizes = [np.prod(info.shape) for info in stored.checkpoint.tensors.values()]
        assert stored.config.num_parameters == sum(sizes)
        WeightMap(stored.config).check(stored.checkpoint)


def test_one_matrix_of_one_expert_is_in_memory(exported: Exports) -> None:
    """And it is read once, however many windows there are."""
    stored, held, most = opened(exported, "mixtral"), [], 0
    readings: dict[str, int] = {}

    def read(name: str) -> Any:
        nonlocal most
        values = stored.read(name)
        readings[name] = readings.get(name, 0) + 1
        if ".experts." in name:
            held[:] = [array for array in held if array() is not None]
            import weakref

            held.append(weakref.ref(values))
            most = max(most, len(held))
        return values

    ids = np.random.default_rng(0).integers(0, 512, (5, 20)).tolist()
    found = list(Decoder(stored.config, read).stream_logits(ids))
    assert most == 1
    assert max(count for name, count in readings.items() if name.startswith("blocks.")) == 1
    alone = Decoder(stored.config, stored.read, resident=True)
    for window, logits in zip(ids, found, strict=True):
        torch.testing.assert_close(alone.logits(window), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("row", "keys", "reason"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1]}, "some blocks only"),
        ("qwen2_moe", {"decoder_sparse_step": 2}, "some blocks only"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("mixtral", {"num_experts_per_tok": 9}, "more than num_local_experts"),
        ("mixtral", {"num_local_experts": 10**9}, "whole number"),
        ("granitemoe", {"num_local_experts": None}, "num_local_experts"),
    ],
)
def test_what_is_not_supported_is_refused(
    exported: Exports, row: str, keys: dict[str, Any], reason: str
) -> None:
    config = Checkpoint.open(exported.checkpoint(row)).config
    with pytest.raises((UnsupportedModelError, CheckpointError), match=reason):
        DecoderConfig.from_hf({**config, **keys})


def test_phimoes_longrope_has_a_factor_for_each_side(exported: Exports) -> None:
    """``short_mscale`` and ``long_mscale`` multiply cos and sin."""
    scaling = {
        "type": "longrope", "original_max_position_embeddings": 64,
        "short_factor": [1.0 + 0.05 * i for i in range(16)], "short_mscale": 1.1,
        "long_factor": [1.2**i for i in range(16)], "long_mscale": 1.4,
    }  # fmt: skip
    folder = exported.checkpoint("phimoe", rope_scaling=scaling)
    checkpoint = Checkpoint.open(folder)
    config = config_of(checkpoint, 128)
    decoder = Decoder(config, Stored(checkpoint, config).read, resident=True)
    model = tiny.reference(folder)
    # transformers 5 calls phimoe's rope_init_fn without the length: short factors everywhere.
    beyond = (65, 100) if transformers.__version__.startswith("4.") else ()
    for length in (40, 64, *beyond):
        ids = np.random.default_rng(length).integers(0, 512, length).tolist()
        with torch.inference_mode():
            expected = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        assert np.abs(decoder.logits(ids) - expected).max() <= 1e-4, length
