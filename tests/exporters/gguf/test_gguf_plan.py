"""The plan against llama-quantize: sizes of full-size models, from their configs alone."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import gguf
import pytest
from writing import plan_for

from compress.decoder.config import DecoderConfig
from compress.errors import GridError, UnsupportedModelError
from compress.grids import get_grid
from exporters.gguf.metadata import display_name
from exporters.gguf.mixes import BLOCKS, MIXES, Mix, fitting, more_bits, tensor_bytes


def config(
    hidden: int,
    layers: int,
    heads: int,
    kv: int,
    ffn: int,
    vocab: int,
    kind: str = "Llama",
    **keys: Any,
) -> DecoderConfig:
    raw = {
        "architectures": [f"{kind}ForCausalLM"],
        "model_type": kind.lower(),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "hidden_act": "gelu_new" if kind == "Phi" else "silu",
    }
    return DecoderConfig.from_hf(raw | keys)


def weights_bytes(model: DecoderConfig, kind: str) -> int:
    return plan_for("gguf", model, {"type": kind}).weights_bytes


PHI3_MINI = config(3072, 32, 32, 32, 8192, 32064, "Phi3")


def test_phi3_mini_to_the_byte() -> None:
    # Whole files as llama-quantize and convert_hf_to_gguf write them: they differ by the weights
    # only, and what is left over (keys and tokenizer) is one number.
    files = {
        "F16": 7_643_311_712,
        "BF16": 7_643_311_712,
        "Q8_0": 4_061_236_832,
        "Q4_0": 2_176_191_584,
        "Q4_K_M": 2_396_785_760,
        "IQ4_XS": 2_075_595_872,
    }
    heads = {size - weights_bytes(PHI3_MINI, kind) for kind, size in files.items()}
    assert len(heads) == 1
    assert 700_000 < heads.pop() < 800_000


@pytest.mark.parametrize(
    ("kind", "mebibytes"),
    {
        "Q2_K": 1438, "Q3_K_S": 1603, "Q3_K_M": 1871, "Q3_K_L": 2098, "Q4_0": 2075,
        "Q4_K_S": 2100, "IQ4_NL": 2087, "Q4_K_M": 2285, "Q4_1": 2297, "Q5_0": 2518,
        "Q5_K_S": 2518, "Q5_K_M": 2627, "Q6_K": 2990, "Q8_0": 3872, "Q4_0-pure": 2050,
        "Q4_K_S-pure": 2050, "IQ3_XXS": 1531, "IQ3_XS": 1549, "IQ3_S": 1603, "IQ3_M": 1769,
        "IQ4_XS": 1979, "IQ4_XS-pure": 1937,
    }.items(),
)  # fmt: skip
def test_phi3_mini_presets(kind: str, mebibytes: int) -> None:
    # `llama-quantize --dry-run` of each preset.
    assert round(weights_bytes(PHI3_MINI, kind) / 2**20) == mebibytes


TIED: dict[str, Any] = {"tie_word_embeddings": True}
SIZES = {  # GB of whole files, Q4_0 and Q4_K_M, by `llama-quantize --dry-run`
    "phi-1": (config(2048, 24, 32, 32, 8192, 51200, "Phi"), 0.828, 0.893),
    "phi-2": (config(2560, 32, 32, 32, 10240, 51200, "Phi"), 1.602, 1.737),
    "phi-3-medium": (config(5120, 40, 40, 10, 17920, 32064, "Phi3"), 7.897, 8.573),
    "phi-4-mini": (config(3072, 32, 24, 8, 8192, 200064, "Phi3", **TIED), 2.322, 2.491),
    "llama-2-7b": (config(4096, 32, 32, 32, 11008, 32000), 3.826, 4.081),
    "llama-3-8b": (config(4096, 32, 32, 8, 14336, 128256), 4.657, 4.916),
    "llama-3.2-1b": (config(2048, 16, 32, 8, 8192, 128256, **TIED), 0.766, 0.803),
    "llama-3.2-3b": (config(3072, 28, 24, 8, 8192, 128256, **TIED), 1.913, 2.015),
    "mistral-7b": (config(4096, 32, 32, 8, 14336, 32000, "Mistral"), 4.109, 4.369),
    "mobilellm-125m": (
        config(576, 30, 9, 3, 1536, 32000, "MobileLLM", share_embedding=True), 0.080, 0.094,
    ),
    "mobilellm-1b": (
        config(1280, 54, 20, 5, 3584, 32000, "MobileLLM", share_embedding=True), 0.577, 0.611,
    ),
    "smollm2-135m": (config(576, 30, 9, 3, 1536, 49152, **TIED), 0.091, 0.105),
    "qwen2.5-0.5b": (config(896, 24, 14, 2, 4864, 151936, "Qwen2", **TIED), 0.350, 0.396),
    "qwen3-0.6b": (
        config(1024, 28, 16, 8, 3072, 151936, "Qwen3", head_dim=128, **TIED), 0.379, 0.395,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_other_models(name: str) -> None:
    model, q4_0, q4_k_m = SIZES[name]
    small, medium = weights_bytes(model, "Q4_0"), weights_bytes(model, "Q4_K_M")
    # The table is rounded to 1 MB; the difference has no tokenizer in it.
    assert medium - small == pytest.approx((q4_k_m - q4_0) * 1e9, abs=1.01e6)
    # Tokenizer and keys: 20 to 45 bytes per token of the vocabulary, and the rounding.
    for size, weights in ((q4_0, small), (q4_k_m, medium)):
        head = size * 1e9 - weights
        assert 18 * model.vocab_size - 0.5e6 < head < 45 * model.vocab_size + 0.8e6


def test_block_sizes_are_ggmls() -> None:
    for name, block in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == block
        assert get_grid(name).nbytes((3, 512)) == tensor_bytes(name, (3, 512))
    for name, (_, number) in MIXES.items():
        theirs = "MXFP4_MOE" if name == "MXFP4" else name
        assert gguf.LlamaFileType[f"MOSTLY_{theirs}"] == number


def test_mxfp4_is_in_all_linears_but_the_head() -> None:
    plan = plan_for("gguf", PHI3_MINI, {"type": "mxfp4"})
    entries = {e.target_name: e.grid for e in plan.entries}
    assert entries.pop("output.weight") == "Q6_K"
    assert set(entries.values()) == {"F32", "MXFP4"}
    weights = [
        e for e in plan_for("gguf", PHI3_MINI, {"type": "MXFP4-pure"}).entries if e.grid != "F32"
    ]
    assert all(8 * e.nbytes == 4.25 * e.shape[0] * e.shape[1] for e in weights)
    small = plan_for("gguf", SIZES["smollm2-135m"][0], {"type": "mxfp4"})
    assert small.notes == (
        "1 tensor in Q8_0 instead of Q6_K: rows of 576 are not a multiple of 256",
    )
    assert fitting("MXFP4", 80)[0] == "F16"


def test_which_blocks_get_more_bits() -> None:
    # Phi-3-mini's Q4_K_M as llama-quantize made it: 16 of 32 blocks.
    assert sum(more_bits(block, 32) for block in range(32)) == 16
    entries = {e.target_name: e.grid for e in plan_for("gguf", PHI3_MINI, {}).entries}
    assert entries["blk.0.attn_qkv.weight"] == entries["blk.31.ffn_down.weight"] == "Q6_K"
    assert entries["blk.4.attn_qkv.weight"] == entries["blk.4.ffn_down.weight"] == "Q4_K"
    assert entries["output.weight"] == "Q6_K"
    assert entries["token_embd.weight"] == entries["blk.4.ffn_up.weight"] == "Q4_K"
    assert entries["blk.0.attn_norm.weight"] == "F32"


def test_seventy_billion_rule() -> None:
    llama = config(8192, 80, 64, 8, 28672, 32000)
    assert Mix.parse("Q3_K_S").wish("v_proj", 40, llama) == "Q5_K"
    assert Mix.parse("Q3_K_S").wish("v_proj", 40, config(8192, 80, 64, 64, 28672, 32000)) == "Q3_K"


def grids_of(model: DecoderConfig, kind: str, *, importance: bool = False) -> dict[str, list[str]]:
    """Type by block, per role, of a preset."""
    mix = Mix.parse(kind, importance=importance)
    roles = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head", "embed_tokens")
    layers = range(model.num_hidden_layers)
    return {role: [mix.wish(role, block, model) for block in layers] for role in roles}


def test_what_an_importance_matrix_changes() -> None:
    """As ``llama_tensor_get_type_impl`` reads ``has_imatrix``: nothing else of any preset."""
    llama = config(4096, 16, 32, 32, 11008, 32000)
    changed = {
        kind: {
            role: (before, after)
            for role, before in grids_of(llama, kind).items()
            if (after := grids_of(llama, kind, importance=True)[role]) != before
        }
        for kind in MIXES
    }
    assert {kind: roles for kind, roles in changed.items() if roles} == {
        "IQ3_XXS": {
            "v_proj": (["IQ3_S"] * 16, ["IQ3_XXS"] * 16),
            "down_proj": (["Q4_K"] * 2 + ["Q3_K"] * 14, ["IQ3_XXS"] * 16),
        },
        "IQ4_XS": {"down_proj": (["Q5_K"] * 2 + ["IQ4_XS"] * 14, ["IQ4_XS"] * 16)},
        "IQ4_NL": {"down_proj": (["Q5_K"] * 2 + ["IQ4_NL"] * 14, ["IQ4_NL"] * 16)},
        "Q4_0": {"down_proj": (["Q4_0"] * 16, ["Q4_1"] * 2 + ["Q4_0"] * 14)},
        "Q5_0": {"down_proj": (["Q5_0"] * 16, ["Q5_1"] * 2 + ["Q5_0"] * 14)},
    }
    plain = plan_for("gguf", llama, {"type": "IQ4_XS"})
    weighted = plan_for("gguf", llama, {"type": "IQ4_XS", "importance": True})
    assert plain.weights_bytes - weighted.weights_bytes == 2 * 4096 * 11008 * (176 - 136) // 256
    assert plan_for("gguf", llama, weighted.settings) == weighted


def test_presets_of_codebook_types() -> None:
    """The exceptions of the IQ presets that Phi-3-mini's sizes do not show: split q, k, v, and
    grouped heads."""
    llama = config(4096, 16, 32, 8, 14336, 128256)
    xs = grids_of(llama, "IQ3_XS")
    assert xs["q_proj"] == ["IQ3_XXS"] * 16
    assert xs["v_proj"] == ["Q4_K"] * 16
    assert xs["up_proj"] == ["IQ3_S"] * 2 + ["IQ3_XXS"] * 12 + ["IQ3_S"] * 2
    assert xs["o_proj"] == xs["down_proj"] == xs["embed_tokens"] == ["IQ3_S"] * 16
    medium = grids_of(llama, "IQ3_M")
    assert medium["down_proj"] == ["Q4_K"] * 2 + ["IQ3_S"] * 14
    assert medium["v_proj"] == medium["o_proj"] == ["Q4_K"] * 16
    assert medium["q_proj"] == ["IQ3_S"] * 16
    assert grids_of(llama, "IQ3_S")["v_proj"] == ["Q4_K"] * 16
    assert grids_of(llama, "IQ4_XS")["v_proj"] == ["Q5_K"] * 16
    xxs = grids_of(llama, "IQ3_XXS", importance=True)
    assert xxs["lm_head"] == ["Q5_K"] * 16
    assert xxs["embed_tokens"] == xxs["o_proj"] == ["IQ3_S"] * 16
    assert xxs["q_proj"] == ["IQ2_S"] * 16
    assert xxs["v_proj"] == ["Q4_K"] * 16
    odd = config(4096 + 32, 16, 32, 8, 14336, 128256, head_dim=128)
    assert grids_of(odd, "IQ3_XXS")["lm_head"] == ["Q6_K"] * 16  # which falls back to Q8_0


def test_a_type_that_cannot_be_written_is_told() -> None:
    plan = plan_for("gguf", config(1024, 2, 16, 16, 2048, 512), {"type": "iq3_xxs"})
    assert plan.notes == ("4 tensors in IQ3_XXS instead of IQ2_S, which packlight cannot write",)
    note = "IQ4_NL instead of IQ2_S: rows of 96 are not a multiple of 256"
    assert fitting("IQ2_S", 96) == ("IQ4_NL", note)


def test_rows_that_do_not_fit_are_told() -> None:
    plan = plan_for("gguf", SIZES["smollm2-135m"][0], {"type": "q4_k_m"})
    assert plan.type_name == "Q4_K_M"
    assert plan.notes == (
        "15 tensors in Q8_0 instead of Q6_K: rows of 576 are not a multiple of 256",
        "166 tensors in Q5_0 instead of Q4_K: rows of 576 are not a multiple of 256",
    )
    noted = [entry for entry in plan.entries if entry.note]
    assert len(noted) == 181
    assert all(entry.shape[1] == 576 for entry in noted)
    assert fitting("Q5_K", 96)[0] == "Q5_1"
    assert fitting("Q3_K", 96)[0] == fitting("Q2_K", 96)[0] == "Q4_0"
    assert {fitting(name, 96)[0] for name in ("IQ3_XXS", "IQ3_S", "IQ4_XS")} == {"IQ4_NL"}
    note = "F16 instead of Q4_0: rows of 80 are not a multiple of 32"
    assert fitting("Q4_0", 80) == ("F16", note)
    assert fitting("Q4_K", 80)[0] == "F16"


def test_refusals() -> None:
    with pytest.raises(GridError, match="no GGUF type 'Q9_K'"):
        plan_for("gguf", PHI3_MINI, {"type": "Q9_K"})
    with pytest.raises(UnsupportedModelError, match="heads x head_dim"):
        plan_for("gguf", config(256, 2, 4, 4, 512, 512, "Phi3", head_dim=32), {})
    with pytest.raises(UnsupportedModelError, match="no place for these attention biases"):
        plan_for("gguf", config(256, 2, 4, 4, 512, 512, "Qwen3", attention_bias=True), {})
    bounds = {"rope_type": "yarn", "factor": 4.0, "beta_slow": 4.0}
    with pytest.raises(UnsupportedModelError, match="yarn with its usual bounds only"):
        plan_for("gguf", config(256, 2, 4, 4, 512, 512, "Qwen2", rope_scaling=bounds), {})
    plan_for("gguf", config(256, 2, 4, 4, 512, 512, rope_scaling=bounds), {})  # a table of factors
    with pytest.raises(UnsupportedModelError, match="rotates whole heads"):
        plan_for("gguf", config(256, 2, 4, 4, 512, 512, partial_rotary_factor=0.5), {})


def test_caveats_limit_the_context() -> None:
    windowed = plan_for("gguf", config(256, 2, 4, 4, 512, 512, "Mistral", sliding_window=64), {})
    assert windowed.max_context == 64
    assert "sliding window of 64" in windowed.notes[0]
    factors = {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    long = config(
        256, 2, 4, 4, 512, 512, "Phi3", max_position_embeddings=4096,
        original_max_position_embeddings=768 + 100, rope_scaling=factors,
    )  # fmt: skip
    limited = plan_for("gguf", long, {})
    assert limited.max_context == 768  # llama.cpp would round 868 up to 1024: the long factors
    assert "at most 768 tokens" in limited.notes[0]
    shared = config(256, 4, 4, 4, 512, 512, "MobileLLM", share_embedding=True, layer_sharing=True)
    plan = plan_for("gguf", shared, {})
    assert "written 2 times" in plan.notes[-1]
    assert "blk.7.attn_q.weight" in {entry.target_name for entry in plan.entries}


@pytest.mark.parametrize(
    ("name", "strips", "shown"),
    [
        ("Phi-3-mini-4k-instruct", True, "Phi-3-mini-4k-instruct"),
        ("demo", True, "demo (phi-3 tokens)"),
        ("Phi-3.5-mini", False, "Phi 3.5-mini"),
        ("my-phi3-merge", False, "my-Phi 3-merge"),
        ("Llama-3.2-1B", False, "Llama-3.2-1B"),
    ],
)
def test_names_that_llama_cpp_reads_behaviour_from(name: str, strips: bool, shown: str) -> None:
    assert display_name(name, strips_after_special=strips) == shown


def test_planning_loads_nothing_heavy() -> None:
    code = (
        "import sys, exporters; from compress.formats import get_format as get; get('gguf').plan;"
        "print([m for m in ('torch', 'gguf', 'numba', 'transformers') if m in sys.modules])"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.strip() == "[]"
