"""Folds leave the float model's logits as they are, on every family; statistics follow them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

from compress.calibration.statistics import LayerStats, Statistics, input_names
from compress.calibration.walk import walk
from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import FUSED, DecoderConfig, WeightMap
from compress.decoder.decoder import Decoder
from compress.demo import model_path
from compress.solvers.folding import Folded, channels_of, check, fold_statistics, foldable, uses


def open_source(folder: Path) -> Stored:
    checkpoint = Checkpoint.open(folder)
    return Stored(checkpoint, DecoderConfig.from_hf(checkpoint.config))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    made: dict[str, Stored] = {}

    def get(family: str) -> Stored:
        if family not in made:
            sharing = {"layer_sharing": True} if family == "mobilellm" else {}
            folder = tmp_path_factory.mktemp(family)
            made[family] = open_source(tiny.make(family, folder, tokenizer=False, **sharing))
        return made[family]

    return get


def random_folds(config: DecoderConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Everything that may be folded: scales in [1/8, 8]."""
    random = np.random.default_rng(seed)
    folds = {}
    for key in input_names(config):
        if not foldable(config, key):
            continue
        folds[key] = (8.0 ** random.uniform(-1, 1, channels_of(config, key))).astype(np.float32)
    return folds


def logits(config: DecoderConfig, read) -> np.ndarray:
    windows = np.random.default_rng(1).integers(0, 480, (2, 40)).tolist()
    return np.stack(list(Decoder(config, read).stream_logits(windows)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_folds_leave_the_logits_as_they_are(sources, family):
    source = sources(family)
    config = source.config
    folds = random_folds(config)
    # q, o; down behind a gate; gate or up unless the block is parallel; the head unless it is tied.
    blocks = config.num_hidden_layers // config.block_repeat
    sites = 2 + config.gated_mlp + (not config.parallel_residual)
    assert len(folds) == blocks * sites + (not config.tie_word_embeddings)
    found = logits(config, Folded(source, folds).read)
    assert np.abs(found - logits(config, source.read)).max() < 1e-4


def test_folds_leave_the_demo_as_it_is():
    source = open_source(model_path())
    found = logits(source.config, Folded(source, random_folds(source.config)).read)
    assert np.abs(found - logits(source.config, source.read)).max() < 1e-4


@pytest.mark.parametrize("family", ["phi3", "phi", "qwen2", "qwen3"])
def test_a_fold_that_is_done_on_one_side_only_is_seen(sources, family):
    """Each role matters: without it, the tests above fail."""
    source = sources(family)
    folds = random_folds(source.config)
    folded = Folded(source, folds)
    plain = logits(source.config, source.read)
    for role in uses(source.config):

        def read(name: str, role: str = role) -> np.ndarray:
            return (source if role in name.split(".") else folded).read(name)

        assert np.abs(logits(source.config, read) - plain).max() > 0.05, role


@pytest.mark.parametrize("family", ["phi3", "qwen2", "phi", "mobilellm"])
def test_fused_weights_and_slabs_are_pieces_of_the_same(sources, family):
    config = sources(family).config
    source = Folded(sources(family), random_folds(config))
    for name in WeightMap(config).names():
        whole = source.read(name)
        slabs = [source.read(name, slice(start, start + 100)) for start in range(0, 1000, 100)]
        assert np.array_equal(np.concatenate(slabs)[: len(whole)], whole), name
    for fused, members in FUSED.items():
        if not all(member in config.linear_roles for member in members):
            continue
        for kind in ("weight", "bias") if config.has_bias(fused) else ("weight",):
            parts = [source.read(f"blocks.1.{member}.{kind}") for member in members]
            joined = np.concatenate(parts)
            name = f"blocks.1.{fused}.{kind}"
            assert np.array_equal(source.read(name), joined)
            assert np.array_equal(source.read(name, slice(200, 700)), joined[200:700])


def gather(config: DecoderConfig, read) -> dict[str, LayerStats]:
    windows = np.random.default_rng(2).integers(0, 480, (17, 16)).tolist()
    stats: dict[str, LayerStats] = {}
    for found in walk(config, read, windows, hessian=True, exact=True):
        stats |= found
    return stats


@pytest.mark.parametrize("family", ["qwen2", "phi", "mobilellm"])
def test_statistics_follow_the_folds(sources, family):
    """Closed form against a walk of the folded model."""
    source = sources(family)
    config = source.config
    folds = random_folds(config)
    plain = Statistics.of(config, gather(config, source.read))
    known = fold_statistics(config, plain, folds)
    for key, walked in gather(config, Folded(source, folds).read).items():
        stats = known.for_weight(f"{key}.weight")
        assert stats is not None and stats.count == walked.count
        near = {"rtol": 1e-3, "atol": 1e-4}
        np.testing.assert_allclose(stats.importance, walked.importance, **near)
        np.testing.assert_allclose(stats.mean, walked.mean, **near)
        np.testing.assert_allclose(stats.hessian[0], walked.hessian[0], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(stats.held_back, walked.held_back, rtol=1e-3, atol=1e-3)
        assert known.for_weight(f"{key}.weight") is stats  # gptq keeps its factors by identity
        if key in folds:  # and the fold did something
            before = plain.for_weight(f"{key}.weight")
            assert not np.allclose(before.importance, walked.importance, **near)


def test_a_split_hessian_is_folded_block_by_block():
    random = np.random.default_rng(0)
    x = random.standard_normal((50, 6)).astype(np.float32)
    whole = x.T @ x / 50
    stats = LayerStats(50, np.diagonal(whole), hessian=(whole[:4, :4], whole[4:, 4:]))
    scale = np.float32([1, 2, 3, 4, 5, 6])
    config = open_source(model_path()).config
    statistics = Statistics(config, lambda key: stats)
    folds = {"blocks.0.down_proj": scale}
    found = fold_statistics(config, statistics, folds).for_weight("blocks.0.down_proj.weight")
    y = x / scale
    np.testing.assert_allclose(found.hessian[0], (y.T @ y / 50)[:4, :4], rtol=1e-5)
    np.testing.assert_allclose(found.hessian[1], (y.T @ y / 50)[4:, 4:], rtol=1e-5)


def ones(count: int) -> np.ndarray:
    return np.ones(count, np.float32)


@pytest.mark.parametrize(
    ("family", "key", "scale", "message"),
    [
        ("phi", "blocks.0.down_proj", ones(512), "nothing can be folded"),  # GELU sits between
        ("qwen2", "lm_head", ones(256), "nothing can be folded"),
        ("qwen2", "blocks.9.q_proj", ones(256), "nothing can be folded"),
        ("qwen2", "blocks.0.k_proj", ones(256), "nothing can be folded"),
        ("qwen2", "blocks.0.o_proj", ones(256), r"float32 \[128\]"),
        ("qwen2", "blocks.0.o_proj", ones(128) - 1, "above 0"),
    ],
)
def test_what_would_change_the_function_is_refused(sources, family, key, scale, message):
    with pytest.raises(ValueError, match=message):
        check(sources(family).config, key, scale)


def test_a_fold_has_a_fingerprint_of_its_own(sources):
    source = sources("llama")
    prints = {source.fingerprint()}
    for value in (1.0, 2.0):
        folds = {"blocks.0.q_proj": value * ones(256)}
        prints |= {Folded(source, folds).fingerprint(), Folded(source, folds).fingerprint()}
    prints.add(Folded(source, {"blocks.0.down_proj": ones(512)}).fingerprint())
    assert len(prints) == 4
