"""Rotations: the matrices against their definition, the float model against itself."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import DecoderConfig, Float32, WeightMap
from compress.decoder.decoder import Decoder
from compress.demo import model_path
from compress.errors import UnsupportedModelError
from compress.grids import get_grid
from compress.pruning.rotation import Rotated, Rotation, factors, hadamard_order
from compress.solvers import rtn

KINDS = ("r1", "r2", "r1r2")
VARIANTS = {
    **{family: (family, {}) for family in tiny.FAMILIES if family != "phi"},
    "mobilellm-ls": ("mobilellm", {"layer_sharing": True}),
    "qwen3-biased": ("qwen3", {"attention_bias": True}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    # 192 = 12 · 16 with heads of 48 = 12 · 4, and 120 = 60 · 2 with heads of 30, an odd 15 · 2.
    "llama-192": ("llama", {"hidden_size": 192}),
    "llama-120": ("llama", {"hidden_size": 120}),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stored]:
    made: dict[str, Stored] = {}

    def open_(variant: str) -> Stored:
        if variant not in made:
            family, overrides = VARIANTS[variant]
            folder = tmp_path_factory.mktemp(variant)
            made[variant] = open_stored(tiny.make(family, folder, tokenizer=False, **overrides))
        return made[variant]

    return open_


def open_stored(folder: Path) -> Stored:
    checkpoint = Checkpoint.open(folder)
    config = DecoderConfig.from_hf(checkpoint.config, checkpoint.generation_config)
    WeightMap(config).check(checkpoint)
    return Stored(checkpoint, config)


def logits(source: Stored | Rotated, tokens: list[int]) -> Float32:
    return Decoder(source.config, source.read).logits(tokens)


def tokens(vocabulary: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(0, vocabulary, 40)]


# --- matrices -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "order"),
    [(64, 1), (12, 12), (20, 20), (28, 28), (96, 12), (176, 44), (576, 36), (896, 28), (3072, 12)],
)
def test_a_hadamard_matrix_where_one_is_known(size, order):
    """Every entry is ±1/√n: no other matrix spreads an outlier as evenly."""
    assert hadamard_order(size) == order
    matrix = Rotation(size, "R1").matrix()
    assert np.allclose(np.abs(matrix) * np.sqrt(size), 1, atol=1e-5)


@pytest.mark.parametrize("size", [6, 15, 30, 184])
def test_elsewhere_an_orthogonal_matrix_that_is_nearly_as_even(size):
    matrix = Rotation(size, "R1").matrix()
    assert np.abs(matrix).max() * np.sqrt(size) < 1.4143


@pytest.mark.parametrize("size", [1, 2, 6, 12, 15, 28, 96, 176, 256, 576, 896, 3072])
def test_rotations_are_orthogonal(size):
    matrix = Rotation(size, "R1").matrix().astype(np.float64)
    assert np.abs(matrix.T @ matrix - np.eye(size)).max() < 1e-6


@pytest.mark.parametrize("size", [1, 6, 12, 96, 256, 576])
def test_the_fast_way_is_the_matrix(size):
    """Against signs times a Kronecker product that numpy makes."""
    turn = Rotation(size, "R2")
    explicit = np.ones((1, 1))
    for factor in factors(size):
        explicit = np.kron(explicit, factor.astype(np.float64))
    explicit = turn.signs[:, None] * explicit
    weight = np.random.default_rng(1).standard_normal((5, 3 * size)).astype(np.float32)
    blocks = np.kron(np.eye(3), explicit)
    assert np.abs(turn.columns(weight) - weight @ blocks).max() < 1e-5
    assert np.abs(turn.rows(weight.T.copy()) - blocks.T @ weight.T).max() < 1e-5
    assert np.abs(turn.rows(weight[0].copy()) - blocks.T @ weight[0]).max() < 1e-5


def test_signs_are_drawn_once_for_all_and_differ_by_name():
    assert Rotation(64, "R1").signs.tolist() == Rotation(64, "R1").signs.tolist()
    assert Rotation(64, "R1").signs.tolist() != Rotation(64, "R2").signs.tolist()
    assert set(Rotation(64, "R1").signs.tolist()) == {-1.0, 1.0}


def test_outliers_that_a_channel_s_scale_suffers_from_are_spread():
    """What rotation is for."""
    draws = np.random.default_rng(3)
    weight = draws.standard_normal((64, 512)).astype(np.float32)
    weight[:, draws.integers(0, 512, 4)] *= 20
    turned = Rotation(512, "R1").columns(weight)

    def error(values: Float32) -> float:
        decoded = rtn(values, get_grid("int4-channel")).decode()
        return float(np.square(decoded - values).mean())

    assert error(turned) < 0.5 * error(weight)


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_logits_stay(stored, variant, kinds):
    source = stored(variant)
    rotated = Rotated(source, kinds)
    ids = tokens(source.config.vocab_size)
    before = logits(source, ids)
    assert before.std() > 1  # a wrong rotation would show
    assert np.abs(logits(rotated, ids) - before).max() < 1e-4


@pytest.mark.parametrize("kinds", KINDS)
def test_the_demo_s_logits_stay(kinds):
    source = open_stored(model_path())
    ids = tokens(source.config.vocab_size)
    before = logits(source, ids)
    assert np.abs(logits(Rotated(source, kinds), ids) - before).max() < 1e-4


@pytest.mark.parametrize("variant", ["llama-biased", "qwen3-biased", "phi3"])
def test_every_weight_by_its_definition(stored, variant):
    """Against explicit matrices, tensor by tensor: also that each did change."""
    source = stored(variant)
    config, rotated = source.config, Rotated(source, "r1r2")
    around = Rotation(config.hidden_size, "R1").matrix()
    inside = Rotation(config.head_dim, "R2").matrix()
    values = np.kron(np.eye(config.num_key_value_heads), inside)
    outputs = np.kron(np.eye(config.num_attention_heads), inside)
    norm = source.read("blocks.1.input_layernorm.weight")
    second = source.read("blocks.1.post_attention_layernorm.weight")

    def weight(role: str) -> Float32:
        return source.read(f"blocks.1.{role}.weight")

    expected = {
        "embed_tokens.weight": source.read("embed_tokens.weight") @ around,
        "blocks.1.input_layernorm.weight": np.ones(config.hidden_size),
        "blocks.1.post_attention_layernorm.weight": np.ones(config.hidden_size),
        "blocks.1.q_proj.weight": (weight("q_proj") * norm) @ around,
        "blocks.1.k_proj.weight": (weight("k_proj") * norm) @ around,
        "blocks.1.v_proj.weight": values.T @ (weight("v_proj") * norm) @ around,
        "blocks.1.o_proj.weight": around.T @ weight("o_proj") @ outputs,
        "blocks.1.gate_proj.weight": (weight("gate_proj") * second) @ around,
        "blocks.1.up_proj.weight": (weight("up_proj") * second) @ around,
        "blocks.1.down_proj.weight": around.T @ weight("down_proj"),
        "norm.weight": np.ones(config.hidden_size),
        "lm_head.weight": (source.read("lm_head.weight") * source.read("norm.weight")) @ around,
    }
    if config.qkv_bias:
        expected["blocks.1.q_proj.bias"] = source.read("blocks.1.q_proj.bias")
        expected["blocks.1.v_proj.bias"] = values.T @ source.read("blocks.1.v_proj.bias")
        expected["blocks.1.o_proj.bias"] = around.T @ source.read("blocks.1.o_proj.bias")
    if config.mlp_bias:
        expected["blocks.1.up_proj.bias"] = source.read("blocks.1.up_proj.bias")
        expected["blocks.1.down_proj.bias"] = around.T @ source.read("blocks.1.down_proj.bias")
    for name, values_expected in expected.items():
        assert np.abs(rotated.read(name) - values_expected).max() < 1e-5, name


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("variant", ["llama-biased", "phi3", "qwen2"])
def test_rows_are_rows_of_the_whole(stored, variant, kinds):
    """Slabs that begin and end inside heads, parts of fused tensors, and slabs of one row."""
    rotated = Rotated(stored(variant), kinds)
    names = [
        *WeightMap(rotated.config).names(),
        "blocks.0.qkv_proj.weight",
        "blocks.0.gate_up_proj.weight",
    ]
    for name in names:
        whole = rotated.read(name)
        assert whole.dtype == np.float32
        for rows in (slice(0, 100), slice(70, 131), slice(199, 200), slice(200, None)):
            part = rotated.read(name, rows)
            assert part.shape == whole[rows].shape, (name, rows)
            assert np.allclose(part, whole[rows], atol=1e-6), (name, rows)


@pytest.mark.parametrize("kinds", KINDS)
def test_large_tensors_are_turned_in_slabs(stored, kinds, monkeypatch):
    """The same numbers when nothing fits in one slab."""
    rotated = Rotated(stored("llama"), kinds)
    names = [f"blocks.0.{role}.weight" for role in ("v_proj", "o_proj", "down_proj", "up_proj")]
    whole = [rotated.read(name) for name in names]
    monkeypatch.setattr("compress.pruning.rotation.SLAB", 1000)
    for name, before in zip(names, whole, strict=True):
        assert np.allclose(rotated.read(name), before, atol=1e-6)


def test_fused_reads_are_the_parts_in_order(stored):
    rotated = Rotated(stored("phi3"), "r1r2")
    parts = [rotated.read(f"blocks.1.{role}.weight") for role in ("q_proj", "k_proj", "v_proj")]
    assert np.allclose(rotated.read("blocks.1.qkv_proj.weight"), np.concatenate(parts), atol=1e-6)


def test_r1_unties_the_head_and_r2_does_not(stored):
    source = stored("qwen2")
    assert source.config.tie_word_embeddings
    assert not Rotated(source, "r1").config.tie_word_embeddings
    assert Rotated(source, "r2").config.tie_word_embeddings
    assert Rotated(source, "r1").unties
    assert not Rotated(source, "r2").unties
    assert not Rotated(stored("llama"), "r1").unties  # never was tied


def test_layernorm_is_refused(tmp_path):
    source = open_stored(tiny.make("phi", tmp_path, tokenizer=False))
    with pytest.raises(UnsupportedModelError, match="LayerNorm") as caught:
        Rotated(source, "r2")
    assert "RMSNorm" in (caught.value.hint or "")


def test_fingerprints_tell_rotations_apart(stored):
    source = stored("llama")
    prints = {source.fingerprint(), *(Rotated(source, kinds).fingerprint() for kinds in KINDS)}
    assert len(prints) == 4
    assert Rotated(source, "r1").fingerprint() == Rotated(source, "r1").fingerprint()


@pytest.mark.parametrize(
    ("name", "rows", "copies"),
    [
        ("blocks.0.down_proj.weight", None, 3.5),
        ("blocks.0.o_proj.weight", slice(0, 16), 3.5),
        ("lm_head.weight", slice(0, 64), 0.5),
    ],
)
def test_memory_is_a_few_copies_of_one_tensor(stored, name, rows, copies, monkeypatch):
    """Of the rows asked for where rows stay apart, of the tensor where R1 mixes them."""
    monkeypatch.setattr("compress.pruning.rotation.SLAB", 4096)
    source = stored("llama")
    whole = source.read(name).nbytes
    rotated = Rotated(source, "r1r2")
    tracemalloc.start()
    rotated.read(name, rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < copies * whole
