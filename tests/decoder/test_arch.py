"""config.json → DecoderConfig → WeightMap, for the configs of published models."""

from __future__ import annotations

import copy
import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import FUSED, DecoderConfig, Rope, WeightMap, split_name
from compress.decoder.config_json import read_json
from compress.decoder.families import ARCHITECTURES, FAMILIES
from compress.errors import CheckpointError, PacklightError, UnsupportedModelError

# The keys that count, as published on the Hub, and the parameters that the publishers state or
# that transformers 4.57.6 counts on the meta device.
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
MOBILE = {"architectures": ["MobileLLMForCausalLM"], "model_type": "mobilellm"} | {
    "vocab_size": 32000, "share_embedding": True, "tie_word_embeddings": False, "head_dim": 64,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
}  # fmt: skip
LONG48 = {"type": "longrope", "short_factor": [1.1] * 48, "long_factor": [1.5] * 48}
PHI3 = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"} | {
    "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "rope_scaling": None, "sliding_window": 2047, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000,
}  # fmt: skip
PHI = {"architectures": ["PhiForCausalLM"], "model_type": "phi", "vocab_size": 51200} | {
    "max_position_embeddings": 2048, "tie_word_embeddings": False, "layer_norm_eps": 1e-5,
    "qk_layernorm": False, "hidden_act": "gelu_new", "num_key_value_heads": None,
}  # fmt: skip
QWEN = {"use_sliding_window": False, "sliding_window": 32768, "tie_word_embeddings": True} | {
    "vocab_size": 151936, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def sizes(hidden: int, layers: int, heads: int, kv: int, ffn: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "intermediate_size": ffn,
    } | more  # fmt: skip


MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"} | sizes(
    4096, 32, 32, 8, 14336, max_position_embeddings=32768, rms_norm_eps=1e-5
)
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Phi-3-mini-4k": (PHI3, 3_821_079_552),
    "Phi-3.5-mini": (
        PHI3
        | {"max_position_embeddings": 131072, "sliding_window": 262144}
        | {"rope_scaling": LONG48},
        3_821_079_552,
    ),
    "Phi-3-medium-4k": (PHI3 | sizes(5120, 40, 40, 10, 17920), 13_960_238_080),
    "Phi-4-mini": (
        PHI3
        | sizes(3072, 32, 24, 8, 8192, vocab_size=200064, max_position_embeddings=131072)
        | {"tie_word_embeddings": True, "partial_rotary_factor": 0.75, "sliding_window": 262144}
        | {"rope_scaling": LONG48, "eos_token_id": 199999},
        3_836_021_760,
    ),
    "phi-1.5": (
        PHI | sizes(2048, 24, 32, 32, 8192, partial_rotary_factor=0.5), 1_418_270_720,
    ),
    "phi-2": (
        PHI | sizes(2560, 32, 32, 32, 10240, partial_rotary_factor=0.4), 2_779_683_840,
    ),
    "Llama-2-7B": (
        LLAMA | sizes(4096, 32, 32, 32, 11008, vocab_size=32000, max_position_embeddings=4096),
        6_738_415_616,
    ),
    "Llama-3-8B": (
        LLAMA
        | sizes(4096, 32, 32, 8, 14336, vocab_size=128256, max_position_embeddings=8192)
        | {"rope_theta": 500000.0},
        8_030_261_248,
    ),
    "Llama-3.2-1B": (
        LLAMA
        | sizes(2048, 16, 32, 8, 8192, vocab_size=128256, max_position_embeddings=131072)
        | {"tie_word_embeddings": True, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}
        | {"head_dim": 64, "eos_token_id": [128001, 128008, 128009]},
        1_235_814_400,
    ),
    "Mistral-7B-v0.1": (MISTRAL | {"vocab_size": 32000, "sliding_window": 4096}, 7_241_732_096),
    "Mistral-7B-v0.3": (
        MISTRAL | {"vocab_size": 32768, "sliding_window": None, "rope_theta": 1e6}, 7_248_023_552,
    ),
    "SmolLM2-135M": (
        LLAMA
        | sizes(576, 30, 9, 3, 1536, vocab_size=49152, max_position_embeddings=8192)
        | {"tie_word_embeddings": True, "rope_theta": 100000},
        134_515_008,
    ),
    "Qwen2.5-0.5B": (
        QWEN
        | sizes(896, 24, 14, 2, 4864, max_position_embeddings=32768)
        | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        494_032_768,
    ),
    "Qwen3-0.6B": (
        QWEN
        | sizes(1024, 28, 16, 8, 3072, max_position_embeddings=40960, head_dim=128)
        | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
        596_049_920,
    ),
    "MobileLLM-125M": (MOBILE | sizes(576, 30, 9, 3, 1536), 124_635_456),
    "MobileLLM-125M-LS": (MOBILE | sizes(576, 30, 9, 3, 1536, layer_sharing=True), 124_635_456),
    "MobileLLM-350M": (MOBILE | sizes(960, 32, 15, 5, 2560), 345_355_200),
}  # fmt: skip


def described(name: str, **changes: Any) -> DecoderConfig:
    return DecoderConfig.from_hf(PUBLISHED[name][0] | changes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_the_published_models(name: str):
    config, parameters = PUBLISHED[name]
    found = DecoderConfig.from_hf(json.loads(json.dumps(config)))
    assert found.num_parameters == parameters
    weights = WeightMap(found)
    # The same number from the other side: the tensors on disk.
    assert sum(math.prod(shape) for shape in weights.expected().values()) == parameters


def test_kv_cache_of_the_published_models():
    for name, expected in {
        "Phi-3-mini-4k": 393_216, "Phi-4-mini": 131_072, "phi-2": 327_680, "Qwen2.5-0.5B": 12_288,
        "Qwen3-0.6B": 114_688, "MobileLLM-125M": 23_040, "MobileLLM-125M-LS": 46_080,
    }.items():  # fmt: skip
        assert described(name).kv_cache_bytes_per_token() == expected


def test_settings_of_the_published_models():
    mini = described("Phi-3-mini-4k")
    assert (mini.sliding_window, mini.max_context, mini.head_dim) == (2047, 4096, 96)
    long = described("Phi-3.5-mini")
    assert (long.sliding_window, long.max_context) == (None, 4096)  # 262144 is never reached
    assert long.max_position_embeddings == 131072
    assert long.ropes[0].attention_factor == pytest.approx(1.190238, abs=1e-6)
    phi4 = described("Phi-4-mini")
    assert (phi4.ropes[0].rotary_dim, phi4.head_dim, phi4.tie_word_embeddings) == (96, 128, True)
    assert described("phi-2").ropes[0].rotary_dim == 32
    assert described("Mistral-7B-v0.1").sliding_window == 4096
    assert described("Mistral-7B-v0.3").sliding_window is None
    without = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    assert DecoderConfig.from_hf(without | {"vocab_size": 8}).sliding_window == 4096
    assert described("Llama-3.2-1B").eos_token_ids == (128001, 128008, 128009)
    assert described("Qwen3-0.6B").weight_shape("o_proj") == (1024, 2048)
    assert described("Qwen2.5-0.5B").has_bias("qkv_proj")
    assert not described("Qwen2.5-0.5B").has_bias("o_proj")


def test_mobilellm_travels_as_a_tied_llama():
    for config in (
        described("MobileLLM-125M"),
        DecoderConfig.from_hf(PUBLISHED["MobileLLM-125M"][0] | LLAMA),  # Meta's GitHub spelling
    ):
        assert config.family == "mobilellm"
        assert (config.model_type, config.architecture) == ("llama", "LlamaForCausalLM")
        assert config.tie_word_embeddings
        assert WeightMap(config).parts("lm_head.weight")[0].source == "model.embed_tokens.weight"
    shared = described("MobileLLM-125M-LS")
    assert (shared.num_hidden_layers, shared.block_repeat) == (60, 2)
    sources = [
        WeightMap(shared).parts(f"blocks.{block}.q_proj.weight")[0].source for block in range(4)
    ]
    assert sources == [f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 0, 1, 1)]


def test_eos_of_both_files_generation_first():
    config = DecoderConfig.from_hf(PHI3, {"eos_token_id": [32001, 32000, 32007]})
    assert config.eos_token_ids == (32001, 32000, 32007)
    assert DecoderConfig.from_hf(PHI3, {"eos_token_id": 32007}).eos_token_ids == (32007, 32000)
    assert DecoderConfig.from_hf(PHI3 | {"pad_token_id": -1}).pad_token_id is None


def test_newer_configs_say_rope_parameters_and_dtype():
    """transformers 5 writes rope_parameters, and dtype instead of torch_dtype."""

    def newer(config: dict[str, Any], **rope: Any) -> DecoderConfig:
        moved = ("rope_theta", "rope_scaling", "partial_rotary_factor")
        kept = {key: value for key, value in config.items() if key not in moved}
        return DecoderConfig.from_hf(kept | {"dtype": "bfloat16", "rope_parameters": rope})

    llama = PUBLISHED["Llama-3.2-1B"][0]
    assert (
        newer(llama, rope_theta=500000.0, **LLAMA3_ROPE).ropes[0]
        == described("Llama-3.2-1B").ropes[0]
    )
    phi = PUBLISHED["phi-2"][0]
    found = newer(phi, rope_theta=10000.0, rope_type="default", partial_rotary_factor=0.4)
    assert found.ropes[0] == described("phi-2").ropes[0]
    phi4 = {k: v for k, v in PUBLISHED["Phi-4-mini"][0].items() if not k.startswith("original")}
    factors = {key: LONG48[key] for key in ("short_factor", "long_factor")}
    found = newer(
        phi4, rope_theta=10000.0, rope_type="longrope", partial_rotary_factor=0.75, **factors,
        original_max_position_embeddings=4096, factor=32.0,
    )  # fmt: skip
    assert found.ropes[0] == described("Phi-4-mini").ropes[0]
    with pytest.raises(UnsupportedModelError, match="differ between layers"):
        newer(llama, full_attention={"rope_type": "default"}, sliding_attention={})


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}


def test_what_transformers_does_not_read_of_a_rope_is_told():
    """DeepSeek-R1-0528-Qwen3-8B has an ``attn_factor``, which vLLM and llama.cpp multiply by."""
    assert not described("Qwen3-0.6B", rope_scaling=YARN).ropes[0].caveat
    rope = described("Qwen3-0.6B", rope_scaling=YARN | {"attn_factor": 0.878}).ropes[0]
    assert "attn_factor" in rope.caveat and "1.139" in rope.caveat
    dynamic = described("Llama-2-7B", rope_scaling={"type": "dynamic", "factor": 4.0})
    assert "4096 positions" in dynamic.ropes[0].caveat and dynamic.max_context == 4096


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("phi-2", {}),
        ("Phi-3-mini-4k", {}),
        ("Llama-3.2-1B", {}),
        ("SmolLM2-135M", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("Phi-3.5-mini", {"rope_scaling": LONG48}),
        ("Phi-3.5-mini", {"rope_scaling": LONG48 | {"type": "su"}}),
        ("Phi-4-mini", {}),
        ("Qwen3-0.6B", {}),
        ("Qwen3-0.6B", {"rope_scaling": YARN}),
        ("Qwen3-0.6B", {"rope_scaling": YARN | {"attn_factor": 0.878}}),
        ("Qwen3-0.6B", {"rope_scaling": YARN | {"truncate": False, "beta_fast": 24.0}}),
        ("Llama-2-7B", {"rope_scaling": {"type": "yarn", "factor": 16.0}}),
        ("Llama-2-7B", {"rope_scaling": YARN | {"attention_factor": 0.9, "beta_slow": 2.0}}),
        ("Llama-2-7B", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}}),
        ("phi-2", {"rope_scaling": YARN | {"original_max_position_embeddings": 40}}),
        ("Llama-2-7B", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
    ],
)
def test_rope_is_that_of_transformers(name: str, changes: dict[str, Any]):
    from transformers import AutoConfig

    if name.startswith("Phi-3.5"):  # factors that differ, so that an order or a sign shows
        spread = [1.0 + 0.04 * i for i in range(48)]
        changes = {"rope_scaling": changes["rope_scaling"] | {"short_factor": spread}}
    keys = copy.deepcopy(PUBLISHED[name][0] | changes)  # transformers 5 writes into them
    rope = DecoderConfig.from_hf(keys).ropes[0]
    if "su" in changes.get("rope_scaling", {}).values():  # which transformers 5 does not know
        keys["rope_scaling"]["type"] = "longrope"
    config = AutoConfig.for_model(**{k: v for k, v in keys.items() if k != "architectures"})
    kind = config.model_type
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    oracle = getattr(module, f"{kind.capitalize()}RotaryEmbedding")(config)
    found = rope.inverse_frequencies()
    assert np.abs(found / oracle.inv_freq.numpy() - 1).max() < 3e-7
    assert rope.attention_factor == pytest.approx(oracle.attention_scaling, rel=1e-12)
    cos, sin = rope.cos_sin(100)
    assert cos.dtype == sin.dtype == np.float32
    assert np.allclose(cos**2 + sin**2, rope.attention_factor**2, atol=1e-5)


# --- where weights are -------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_tensor_of_a_saved_checkpoint_is_expected(family: str, tmp_path: Path):
    checkpoint = Checkpoint.open(tiny.make(family, tmp_path, tokenizer=False))
    config = DecoderConfig.from_hf(checkpoint.config, checkpoint.generation_config)
    weights = WeightMap(config)
    weights.check(checkpoint)
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == weights.expected()
    assert sum(math.prod(info.shape) for info in checkpoint.tensors.values()) == (
        config.num_parameters
    )
    for name in weights.names():
        values = Stored(checkpoint, config).read(name)
        assert values.shape == weights.shape(name)
        assert values.dtype == np.float32


@pytest.mark.parametrize("family", ["phi3", "qwen2"])
def test_fused_and_unfused_are_the_same_rows(family: str, tmp_path: Path):
    """phi3 stores fused tensors, qwen2 (with biases) parts; both can be read by both names."""
    checkpoint = Checkpoint.open(tiny.make(family, tmp_path, tokenizer=False))
    weights = WeightMap(DecoderConfig.from_hf(checkpoint.config))
    read = Stored(checkpoint, weights.config).read
    for fused, members in FUSED.items():
        kinds = ("weight", "bias") if weights.config.has_bias(fused) else ("weight",)
        for kind in kinds:
            whole = read(f"blocks.1.{fused}.{kind}")
            assert whole.shape == weights.shape(f"blocks.1.{fused}.{kind}")
            parts = [read(f"blocks.1.{role}.{kind}") for role in members]
            assert (np.concatenate(parts) == whole).all()
            for rows in (
                slice(0, 1),
                slice(250, 300),
                slice(510, 600),
                slice(7, None),
                slice(9, 9),
            ):
                found = read(f"blocks.1.{fused}.{kind}", rows)
                assert found.shape == whole[rows].shape
                assert (found == whole[rows]).all()
    up = read("blocks.0.up_proj.weight", slice(3, 5))
    assert (up == read("blocks.0.up_proj.weight")[3:5]).all()
    with pytest.raises(KeyError):
        weights.parts("blocks.0.nothing.weight")


def test_split_name():
    assert split_name("blocks.12.q_proj.bias") == (12, "q_proj", "bias")
    assert split_name("lm_head.weight") == (None, "lm_head", "weight")


# --- refusals ----------------------------------------------------------------------------------


def one_line(error: PacklightError) -> None:
    assert error.message and "\n" not in error.message and len(error.message) < 200
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "key 'hidden_size' is missing"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, not a whole number from 1"),
        ({"num_attention_heads": 6}, "not a multiple of num_key_value_heads"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": -8}, "num_key_value_heads is -8"),
        ({"hidden_size": 10**400}, "hidden_size is a huge number"),
        ({"hidden_size": 4096.5}, "hidden_size is 4096.5"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"vocab_size": [1] * 1000}, "vocab_size is"),
        ({"head_dim": 10**8}, "head_dim is 100000000"),
        ({"head_dim": 63}, "63 rotating dimensions"),
        ({"max_position_embeddings": {}}, "max_position_embeddings is {}"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rope_theta": 10**400}, "rope_theta is a huge number"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', not a token id"),
        ({"eos_token_id": [1, [2]]}, "eos_token_id is"),
        ({"bos_token_id": [1, 2]}, "bos_token_id is a list of 2 ids"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', not true or false"),
        ({"rope_scaling": "linear"}, "rope_scaling is not an object"),
        ({"rope_scaling": {"type": "linear"}}, "key 'factor' is missing"),
        ({"rope_scaling": {"type": "llama3"}}, "key 'factor' is missing"),
        ({"rope_scaling": {"type": "yarn"}}, "key 'factor' is missing"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor 0.5"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": "x"}}, "beta_fast is 'x'"),
        ({"rope_scaling": {"type": "dynamic"}}, "key 'factor' is missing"),
        ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "is not above"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": 3, "long_factor": []}},
            "not a list",
        ),
        ({"rope_scaling": LONG48}, "has 48 short and 48 long factors, the heads need 64"),
    ],
)
def test_impossible_values_are_named(changes: dict[str, Any], message: str):
    with pytest.raises(CheckpointError) as caught:
        described("Llama-3-8B", **changes)
    one_line(caught.value)
    assert message in caught.value.message
    assert caught.value.message.startswith("config.json: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["OPTForCausalLM"]}, "unknown architecture: OPTForCausalLM"),
        ({"architectures": []} | {"model_type": "mamba"}, "unknown architecture: mamba"),
        ({"architectures": [["LlamaForCausalLM"]]}, "unknown architecture"),
        ({"architectures": {"a": 1}}, "unknown architecture"),
        ({"architectures": None, "model_type": None}, "config.json names none"),
        (
            {"architectures": ["Phi3SmallForCausalLM"], "auto_map": {"AutoModel": "x.Y"}},
            "Phi3SmallForCausalLM needs the checkpoint's own code, which packlight never executes",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already ('gptq')"),
        ({"quantization_config": "awq"}, "quantized already"),
        ({"rope_scaling": {"type": "mrope", "factor": 4.0}}, "rope scaling 'mrope'"),
        ({"rope_scaling": {"rope_type": ["x"]}}, "rope scaling ['x']"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported for llama, only silu"),
        ({"hidden_act": ["silu"]}, "hidden_act ['silu']"),
    ],
)
def test_what_is_not_built_is_refused_with_the_reason(changes: dict[str, Any], message: str):
    with pytest.raises(UnsupportedModelError) as caught:
        described("Llama-3-8B", **changes)
    one_line(caught.value)
    assert message in caught.value.message
    if "architecture" in message or "own code" in message:
        assert "Phi3ForCausalLM" in caught.value.hint


def test_family_settings_that_are_not_built():
    for name, changes, message in (
        ("phi-2", {"qk_layernorm": True}, "qk_layernorm"),
        ("phi-2", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ):
        with pytest.raises(UnsupportedModelError, match=message) as caught:
            described(name, **changes)
        one_line(caught.value)


def test_a_missing_architecture_is_found_by_model_type():
    for name in ("Llama-3-8B", "Phi-3-mini-4k", "MobileLLM-125M"):
        assert described(name, architectures=None) == described(name)


def test_the_table_is_whole():
    assert {*ARCHITECTURES.values(), "falcon-40b"} == set(FAMILIES)  # of falcon's class
    for family in FAMILIES.values():
        assert ARCHITECTURES[family.architecture] in FAMILIES


def test_config_json_that_is_not_an_object(tmp_path: Path):
    file = tmp_path / "config.json"
    for text, message in (
        ("[]", "config.json is not a JSON object"),
        ("7", "not a JSON object"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "config.json cannot be read"),
        ('{"a": ' + "9" * 10_000 + "}", "config.json cannot be read"),
    ):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=message) as caught:
            read_json(file)
        one_line(caught.value)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        read_json(file)
    one_line(caught.value)
    with pytest.raises(CheckpointError, match=r"nothing\.json is missing"):
        read_json(tmp_path / "nothing.json")


def test_rope_default_is_a_value():
    assert Rope(10000.0, "default", 4, (1.0, 1.0)).inverse_frequencies() == pytest.approx([1, 0.01])
