"""Experts in GGUF: the types of llama.cpp's presets, slabs, keys, imatrix files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from exported import Exports, config_of
from writing import plan_for, write

from compress.calibration.statistics import LayerStats, Statistics, input_names, input_of
from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import DecoderConfig
from compress.errors import ArtifactError, UnsupportedModelError
from compress.grids import get_grid
from compress.plan.weights import Weights
from compress.solvers import scale_search
from exporters.gguf.imatrix import read_imatrix, write_imatrix

MIXTRAL = {  # as llama_tensor_get_type_impl in llama.cpp's src/llama-quant.cpp has them
    "Q2_K": {"attn_k": "Q8_0", "attn_v": "Q8_0", "attn_output": "Q5_K", "ffn_down_exps": "Q3_K"},
    "Q3_K_L": {"attn_k": "Q8_0", "attn_v": "Q8_0", "attn_output": "Q3_K", "ffn_down_exps": "Q5_K"},
    "Q4_0": {"attn_k": "Q8_0", "attn_v": "Q8_0", "attn_output": "Q4_0", "ffn_down_exps": "Q4_0"},
    "Q4_K_M": {"attn_q": "Q4_K", "attn_output": "Q5_K", "ffn_up_exps": "Q4_K"},
    "MXFP4": {"attn_q": "Q8_0", "attn_k": "Q8_0", "ffn_gate_exps": "MXFP4", "token_embd": "Q8_0"},
    "Q6_K": {"attn_v": "Q8_0", "attn_output": "Q6_K", "ffn_down_exps": "Q6_K"},
}


@pytest.fixture(scope="module")
def mixtral() -> DecoderConfig:
    """Mixtral 8x7B."""
    return DecoderConfig.from_hf({
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 32768, "num_local_experts": 8,
        "num_experts_per_tok": 2, "rope_theta": 1e6,
    })  # fmt: skip


@pytest.mark.parametrize("preset", MIXTRAL)
def test_types_are_those_of_llama_quantize(mixtral: DecoderConfig, preset: str) -> None:
    types: dict[str, set[str]] = {}
    for entry in plan_for("gguf", mixtral, {"type": preset}).entries:
        name = entry.target_name.removesuffix(".weight").rpartition(".")[2]
        types.setdefault(name, set()).add(entry.grid)
    assert types["ffn_gate_inp"] == {"F32"}
    for name, kind in MIXTRAL[preset].items():
        assert types[name] == {kind}, name
    if preset == "Q4_K_M":  # both ends and every third between
        assert types["ffn_down_exps"] == {"Q4_K", "Q6_K"}


def test_other_numbers_of_experts_raise_nothing(mixtral: DecoderConfig) -> None:
    assert mixtral.experts is not None
    sixteen = replace(mixtral, experts=replace(mixtral.experts, count=16))
    entries = {e.target_name: e for e in plan_for("gguf", sixteen, {"type": "Q4_K_M"}).entries}
    assert entries["blk.9.attn_k.weight"].grid == entries["blk.9.attn_output.weight"].grid == "Q4_K"
    assert entries["blk.9.ffn_up_exps.weight"].shape == (16, 14336, 4096)
    assert entries["blk.9.ffn_up_exps.weight"].nbytes == 16 * 14336 * 4096 // 256 * 144


def test_the_file_has_the_matrices_of_all_experts(exported: Exports) -> None:
    """In slabs: the values of each expert are those of the checkpoint."""
    made = exported("gguf", "granitemoeshared", type="F16")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(made.path).tensors}
    for role, name in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
        tensor = tensors[f"blk.2.ffn_{role}_exps.weight"]
        for expert in range(8):
            stored = made.weights.read(f"blocks.2.experts.{expert}.{name}.weight")
            assert (tensor.data[expert] == stored.astype(np.float16)).all()
    router = tensors["blk.2.ffn_gate_inp.weight"]
    assert router.tensor_type == gguf.GGMLQuantizationType.F32
    fields = gguf.GGUFReader(made.path).fields
    for key, value in (
        ("expert_count", 8), ("expert_used_count", 2), ("expert_shared_feed_forward_length", 64),
    ):  # fmt: skip
        assert fields[f"granitemoe.{key}"].contents() == value
    assert fields["general.size_label"].contents().startswith("8x")


def test_an_imatrix_of_experts_goes_both_ways(exported: Exports, tmp_path: Path) -> None:
    config = config_of(Checkpoint.open(exported.checkpoint("qwen2_moe")))
    draw, stats = np.random.default_rng(0), {}
    for place, key in enumerate(input_names(config)):
        width = config.weight_shape(key.removeprefix("blocks.").partition(".")[2] or key)[1]
        count = 0 if key == "blocks.1.experts.3.gate_proj" else 100 + place
        stats[key] = LayerStats(count, draw.lognormal(0, 1, width).astype(np.float32))
    path = tmp_path / "a.gguf"
    write_imatrix(path, config, Statistics.of(config, stats))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    sums = tensors["blk.1.ffn_up_exps.weight.in_sum2"]
    assert list(sums.shape) == [config.hidden_size, 8]  # as llama.cpp's loader wants them
    counts = tensors["blk.1.ffn_up_exps.weight.counts"]
    assert list(counts.shape) == [1, 8] and counts.data.reshape(-1)[3] == 0
    found = read_imatrix(path, config)
    for key, entry in stats.items():
        again = found.for_weight(f"{key}.weight")
        assert again is not None and again.count == entry.count
        if entry.count:
            np.testing.assert_allclose(again.importance, entry.importance, rtol=1e-6)
    assert input_of(config, "blocks.1.experts.up_proj.weight") is None
    other = config_of(Checkpoint.open(exported.checkpoint("qwen2_moe", num_experts=4)))
    with pytest.raises(ArtifactError, match="of 4 experts with 128 columns"):
        read_imatrix(path, other)


def test_importance_of_an_expert_is_used(exported: Exports, tmp_path: Path) -> None:
    """An expert's columns count as often as its own tokens use them."""
    checkpoint = Checkpoint.open(exported.checkpoint("mixtral"))
    config = config_of(checkpoint)
    stored, stats = Stored(checkpoint, config), {}
    for key in input_names(config):
        width = config.weight_shape(key.removeprefix("blocks.").partition(".")[2] or key)[1]
        important = np.ones(width, np.float32)
        important[:: 2 if ".experts.1." in key else width] = 1e-3
        stats[key] = LayerStats(100, important)
    plan = plan_for("gguf", config, {"type": "Q4_0-pure"}, importance=True)
    weights = Weights(stored, scale_search, statistics=Statistics.of(config, stats))
    file = write(plan, weights, tmp_path).path
    tensor = next(
        t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.ffn_gate_exps.weight"
    )
    decoded = gguf.dequantize(tensor.data, tensor.tensor_type)
    for expert in (0, 1):
        name = f"blocks.0.experts.{expert}.gate_proj"
        values, grid = stored.read(f"{name}.weight"), get_grid("Q4_0")
        own, other = (stats[f"blocks.0.experts.{e}.gate_proj"] for e in (expert, 1 - expert))
        assert (decoded[expert] == scale_search(values, grid, own).decode()).all()
        assert (decoded[expert] != scale_search(values, grid, other).decode()).any()


@pytest.mark.parametrize(
    ("row", "keys", "reason"),
    [
        ("qwen3_moe-plain", {}, "norm_topk_prob is false"),
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob is true"),
        ("olmoe", {"num_key_value_heads": 2}, "grouped key-value heads"),
    ],
)
def test_what_a_graph_has_not_is_refused(
    exported: Exports, row: str, keys: dict[str, Any], reason: str
) -> None:
    config = config_of(Checkpoint.open(exported.checkpoint(row, **keys)))
    with pytest.raises(UnsupportedModelError, match=reason):
        plan_for("gguf", config)
