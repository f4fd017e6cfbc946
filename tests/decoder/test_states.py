"""Layers that convolve in place of attention: their config, their weights and their states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from exported import Exports, config_of
from transformers import Lfm2Config
from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.checkpoint.save import write_checkpoint
from compress.checkpoint.side_files import hf_config
from compress.decoder.config import DecoderConfig, WeightMap
from compress.decoder.decoder import Decoder
from compress.decoder.footprint import footprint, largest_context
from compress.decoder.states import State, fixed_bytes, layer_types, states
from compress.errors import CheckpointError, UnsupportedModelError

KEYS: dict[str, Any] = {
    "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "vocab_size": 512,
    "hidden_size": 128, "intermediate_size": 1000, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "layer_types": ["conv", "full_attention", "conv", "conv"],
}  # fmt: skip


OLDER = pytest.mark.skipif(
    not transformers.__version__.startswith("4."),
    reason="transformers 5 refuses the setting, or reads no theta",
)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"block_ff_dim": 6656},
        {"block_auto_adjust_ff_dim": False},
        pytest.param({"block_ffn_dim_multiplier": None}, marks=OLDER),
        {"block_ffn_dim_multiplier": 1.3, "block_multiple_of": 64},
        pytest.param({"theta": 5000.0, "rope_theta": 7.0}, marks=OLDER),
        {"tie_embedding": False, "tie_word_embeddings": True},
        {"layer_types": None, "full_attn_idxs": [0, 3]},
        {"layer_types": None},
    ],
)
def test_a_config_is_read_as_by_transformers(keys: dict[str, Any]) -> None:
    raw = {key: value for key, value in (KEYS | keys).items() if value is not None or key in keys}
    theirs, ours = Lfm2Config(**raw), DecoderConfig.from_hf(raw)
    assert ours.intermediate_size == Lfm2MLP(theirs).w1.out_features
    named = getattr(theirs, "rope_parameters", None) or {"rope_theta": theirs.rope_theta}
    assert ours.ropes[0].theta == named["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert layer_types(ours) == theirs.layer_types
    assert DecoderConfig.from_hf(hf_config(ours)) == replace(ours, raw={})
    assert Lfm2MLP(Lfm2Config(**hf_config(ours))).w1.out_features == ours.intermediate_size
    assert ours.kinds[0].taps == 0 or ours.kinds[0].taps == theirs.conv_L_cache


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"conv_bias": True}, "conv_bias"),
        ({"layer_types": ["conv"] * 4}, "without a layer that attends"),
        ({"layer_types": ["mamba"] * 4}, "layer_types has"),
        ({"conv_L_cache": 10**9}, "conv_L_cache"),
        ({"full_attn_idxs": 3}, "impossible"),
        ({"block_multiple_of": 0}, "block_multiple_of"),
    ],
)
def test_what_is_not_supported_is_refused(keys: dict[str, Any], reason: str) -> None:
    with pytest.raises((UnsupportedModelError, CheckpointError), match=reason):
        DecoderConfig.from_hf(KEYS | keys)


def test_the_cache_and_what_a_context_takes_follow_from_the_states() -> None:
    config = DecoderConfig.from_hf(KEYS)
    conv = State("conv", (128, 3))
    assert states(config) == (conv, State("kv", (2, 32)), conv, conv)
    assert config.kv_cache_bytes_per_token() == 2 * 2 * 32 * 2  # one layer of four
    assert fixed_bytes(config) == 3 * 128 * 3 * 4
    small, large = (footprint(config, 10**6, 0, context) for context in (1, 101))
    assert small.kv_cache == 256 + fixed_bytes(config)
    assert large.kv_cache - small.kv_cache == 100 * 256
    for need in (small, large):  # whatever context it was computed for
        at = footprint(config, 10**6, 0, 77)
        assert largest_context(config, need, at.total) == 77
        assert largest_context(config, need, at.total - 1) == 76


def test_layers_have_their_own_weights(exported: Exports, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(exported.checkpoint("lfm2"))
    config = config_of(checkpoint)
    shapes = WeightMap(config)
    names = set(shapes.names(tied_head=False))
    assert {"blocks.0.in_proj.weight", "blocks.2.q_proj.weight"} <= names
    assert not {"blocks.2.conv.weight", "blocks.0.q_norm.weight", "blocks.0.o_proj.weight"} & names
    fused = set(shapes.names(fused=("qkv_proj",)))
    assert {name for name in fused if "qkv_proj" in name} == {"blocks.2.qkv_proj.weight"}
    sizes = [np.prod(info.shape) for info in checkpoint.tensors.values()]
    assert config.num_parameters == sum(sizes)
    source = Stored(checkpoint, config)
    taps = source.read("blocks.1.conv.weight")
    assert taps.shape == (128, 3)
    assert (source.read("blocks.1.conv.weight", slice(5, 70)) == taps[5:70]).all()
    write_checkpoint(source, tmp_path)
    again = Checkpoint.open(tmp_path)
    for name, info in checkpoint.tensors.items():
        assert (again.tensors[name].shape, again.tensors[name].dtype) == (info.shape, info.dtype)
        assert (again.read(name) == checkpoint.read(name)).all()


def test_a_cut_cache_is_that_of_the_shorter_text(exported: Exports) -> None:
    checkpoint = Checkpoint.open(exported.checkpoint("lfm2"))
    config = config_of(checkpoint)
    decoder = Decoder(config, Stored(checkpoint, config).read, resident=True)
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 512, 30)]
    wanted = decoder.logits(ids)
    decoder.reset()
    decoder.feed(ids[:10])
    decoder.feed([5, 6, 7])
    assert decoder.rewind(10) == 10
    assert np.abs(decoder.extend(ids[10:]) - wanted[10:]).max() < 1e-4
