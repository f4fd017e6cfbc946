"""Checkpoints of published shapes (`benchmarks/make_checkpoint.py`)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import make_checkpoint
from published import MODELS

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import DecoderConfig, WeightMap

# Published counts, or computed by transformers from the published config on the meta device.
PARAMETERS = {
    "mobilellm-125m": 124_635_456,
    "mobilellm-350m": 345_355_200,
    "mobilellm-600m": 603_188_352,
    "mobilellm-1b": 1_005_461_760,
    "mobilellm-1.5b": 1_511_188_800,
    "mobilellm-ls-125m": 124_635_456,
    "mobilellm-ls-350m": 345_355_200,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "llama-3.2-1b": 1_235_814_400,
    "phi-1.5": 1_418_270_720,
    "phi-2": 2_779_683_840,
    "llama-3.2-3b": 3_212_749_824,
    "phi-3-mini-4k": 3_821_079_552,
    "phi-3.5-mini": 3_821_079_552,
    "phi-4-mini": 3_836_021_760,
    "llama-2-7b": 6_738_415_616,
    "mistral-7b": 7_241_732_096,
    "llama-3-8b": 8_030_261_248,
    "phi-3-medium-4k": 13_960_238_080,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-2-2b": 2_614_341_888,
    "granite-3-2b": 2_533_531_648,
    "smollm3-3b": 3_075_098_624,
    "olmo-2-1b": 1_484_916_736,
    "gpt2": 124_439_808,
    "tinystories-1m": 3_745_984,
    "tinystories-33m": 68_514_048,
    "mobilellm-r1-140m": 140_248_512,
    "mobilellm-r1-360m": 359_431_168,
    "mobilellm-r1-950m": 949_685_760,
    "starcoder2-3b": 3_030_371_328,
    "stablelm-2-1.6b": 1_644_515_328,
    "pythia-160m": 162_322_944,
    "command-r7b": 8_028_033_024,
    "ernie-4.5-0.3b": 360_748_032,
    "falcon-7b": 6_921_720_704,
    "mixtral-8x7b": 46_702_792_704,
    "phi-3.5-moe": 41_873_153_344,
    "gpt-oss-20b": 20_914_757_184,
    "falcon-40b": 41_303_293_952,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "olmoe-1b-7b": 6_919_161_856,
    "granite-3.1-1b-a400m": 1_334_628_352,
    "lfm2-350m": 354_483_968,
    "lfm2-700m": 742_489_344,
    "lfm2-1.2b": 1_170_340_608,
}

SIZES = {"shard": 20_000_000, "slab": 100_000}  # so small that there are several


@pytest.mark.parametrize("model", MODELS)
def test_shapes_are_the_published_ones(model: str) -> None:
    assert DecoderConfig.from_hf(MODELS[model][2]).num_parameters == PARAMETERS[model]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of the table cut to two blocks."""
    tokenizer, pieces, keys = MODELS["phi-3-mini-4k"]
    cut = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    monkeypatch.setitem(MODELS, "small", (tokenizer, pieces, keys | cut | heads))
    return "small"


@pytest.mark.slow
def test_checkpoint_is_whole_and_repeatable(tmp_path: Path, small: str) -> None:
    first = make_checkpoint.make(small, tmp_path / "first", **SIZES)
    second = make_checkpoint.make(small, tmp_path / "second", **SIZES, threads=1)
    files = sorted(first.iterdir())
    assert sum(file.suffix == ".safetensors" for file in files) > 1
    for file in files:
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name

    from transformers import AutoTokenizer

    assert len(AutoTokenizer.from_pretrained(first)) == 32_011  # Phi-3: rows to 32,064 are padding


def test_weights_look_trained(tmp_path: Path, small: str) -> None:
    checkpoint = Checkpoint.open(make_checkpoint.make(small, tmp_path / "model", **SIZES))
    config = DecoderConfig.from_hf(checkpoint.config, checkpoint.generation_config)
    WeightMap(config).check(checkpoint)
    weights = Stored(checkpoint, config)
    up = weights.read("blocks.1.up_proj.weight")
    columns = np.sort(up.std(axis=0))
    assert columns[-make_checkpoint.OUTLIERS] > 2 * columns[-make_checkpoint.OUTLIERS - 1]
    scaled = up / up.std(axis=0)
    # A normal distribution has 3; Student-t with 5 degrees of freedom 9, a sample somewhat less.
    assert 5 < float((scaled**4).mean()) < 12
    norm = weights.read("blocks.0.input_layernorm.weight")
    assert abs(float(norm.mean()) - 1) < 0.05


def test_sparse_shards_have_the_sizes_and_no_bytes(tmp_path: Path, small: str) -> None:
    folder = make_checkpoint.make(small, tmp_path / "model", weights=False)
    checkpoint = Checkpoint.open(folder)
    assert not checkpoint.read("model.norm.weight").any()
    for file in folder.glob("*.safetensors"):
        assert file.stat().st_blocks * 512 < file.stat().st_size / 10
