"""Dense families in the reference decoder: against transformers, with scalars folded, and with each
feature switched off, which must be noticed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from exported import Exports, config_of
from numpy.typing import NDArray
from tiny_families import ROWS, WINDOW

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.checkpoint.scalars import ScalarsFolded
from compress.decoder.config import DecoderConfig, WeightMap
from compress.decoder.decoder import Decoder
from compress.errors import CheckpointError, UnsupportedModelError
from compress.plan.job import describe_model

TOLERANCE = 1e-4


def opened(folder: Path) -> Stored:
    checkpoint = Checkpoint.open(folder)
    config = config_of(checkpoint)
    WeightMap(config).check(checkpoint)
    return Stored(checkpoint, config)


def tokens(length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(length).integers(0, 512, length)]


def without(config: DecoderConfig, name: str, value: Any) -> DecoderConfig:
    """The config with one feature switched off."""
    if name == "kinds":
        return replace(config, kinds=tuple(replace(k, window=None) for k in config.kinds))
    if value == "sequential":  # a block whose MLP reads the stream after attention
        return replace(config, parallel_residual=False)
    if name == "experts":
        return replace(config, experts=replace(config.experts, **value))
    return replace(config, **{name: value})


def fewer_taps(stored: Stored, count: int, name: str) -> NDArray[Any]:
    """Weights without all but the last taps of a convolution."""
    values = stored.read(name)
    if name.endswith("conv.weight"):
        values[:, :-count] = 0
    return values


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_what_transformers_computes(exported: Exports, row: str) -> None:
    folder = exported.checkpoint(row)
    stored = opened(folder)
    config = stored.config
    decoder = Decoder(config, stored.read, resident=True)
    folded = ScalarsFolded(stored, config.scalars)
    other = Decoder(folded.config, folded.read, resident=True)
    model = tiny.reference(folder)
    found = np.empty(0)
    for length in (1, 12, WINDOW - 1, WINDOW + 1, 100):
        ids = tokens(length)
        with torch.inference_mode():
            expected = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        found = decoder.logits(ids)
        assert np.abs(found - expected).max() <= TOLERANCE, length
        assert np.abs(other.logits(ids) - expected).max() <= TOLERANCE, length
        assert length == 1 or expected.std() > 0.5  # a blind comparison would pass with anything
    # A prompt, a chunk that crosses the window, then one token at a time.
    position = 0
    for count in (5, 6, 1, 1, 20, 1):
        position += count
        last = decoder.feed(tokens(100)[position - count : position])
        assert np.abs(last - found[position - 1]).max() <= TOLERANCE, position
    for name, value in ROWS[row].without.items():
        if name == "taps":
            logits = Decoder(config, partial(fewer_taps, stored, value)).logits(tokens(100))
        else:
            changed = without(config, name, value)
            source = Stored(stored.checkpoint, changed)
            logits = Decoder(changed, source.read).logits(tokens(100))
        assert np.abs(logits - found).max() > 100 * TOLERANCE, name


def test_a_fold_reads_any_rows(exported: Exports) -> None:
    for row in ("glm", "llama4_text", "granite"):
        stored = opened(exported.checkpoint(row))
        folded = ScalarsFolded(stored, stored.config.scalars)
        whole = folded.read("blocks.1.qkv_proj.weight")
        parts = [folded.read(f"blocks.1.{role}_proj.weight") for role in "qkv"]
        assert (whole == np.concatenate(parts)).all()
        for rows in (slice(3, 70), slice(100, 140), slice(0, 1)):
            assert (folded.read("blocks.1.qkv_proj.weight", rows) == whole[rows]).all()
            assert (folded.read("blocks.1.q_proj.weight", rows) == parts[0][rows]).all()
        assert folded.fingerprint() != stored.fingerprint()


def test_layouts_on_disk_are_read_by_rows(exported: Exports) -> None:
    """Transposed (gpt2), by head (gpt_neox), by group (falcon)."""
    for row in ("gpt2", "gpt_neox", "falcon"):
        stored = opened(exported.checkpoint(row))
        whole = stored.read("blocks.2.qkv_proj.weight")
        parts = [stored.read(f"blocks.2.{role}_proj.weight") for role in "qkv"]
        assert (whole == np.concatenate(parts)).all()
        assert (stored.read("blocks.2.qkv_proj.weight", slice(30, 111)) == whole[30:111]).all()


@pytest.mark.parametrize(
    ("row", "keys", "reason"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "bidirectional"),
        ("gemma3_text", {"layer_types": ["chunked_attention"] * 4}, "layer_types has"),
        ("granite4", {"layer_types": ["mamba"] * 4}, "mamba"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm"),
        ("stablelm", {"qk_layernorm": True}, "stablelm 12B"),
        ("falcon", {"alibi": True}, "alibi"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx"),
        ("llama4_text", {"num_local_experts": 4, "moe_layers": [1]}, "experts"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
        ("smollm3", {"no_rope_layers": [1, 2, 0, 0]}, "zeros and ones"),
        ("gpt_neo", {"attention_types": [["global"]]}, "attention_types"),
    ],
)
def test_what_a_row_does_not_have_is_refused(
    exported: Exports, row: str, keys: dict[str, Any], reason: str
) -> None:
    config = Checkpoint.open(exported.checkpoint(row)).config
    with pytest.raises((UnsupportedModelError, CheckpointError), match=reason):
        DecoderConfig.from_hf({**config, **keys})


def test_gpt2_may_leave_its_prefix_out(exported: Exports, tmp_path: Path) -> None:
    """The published gpt2 does, and holds its causal masks."""
    from safetensors.torch import load_file, save_file

    folder = exported.checkpoint("gpt2")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): values for name, values in tensors.items()}
    bare |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(4)}
    save_file(bare, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    whole, without = Checkpoint.open(folder), Checkpoint.open(tmp_path)
    config = describe_model(without)
    name = "blocks.1.q_proj.weight"
    assert (Stored(without, config).read(name) == Stored(whole, config).read(name)).all()


def test_the_text_of_a_gemma_that_sees_pictures(tmp_path: Path) -> None:
    """Gemma 3 from 4B on: the decoder is inside, its config without transformers' defaults."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = ROWS["gemma3_text"].config | {"model_type": "gemma3_text"}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    config._attn_implementation = "eager"
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    decoder_config = describe_model(checkpoint)
    assert any("pictures" in line for line in checkpoint.warnings)
    decoder = Decoder(decoder_config, Stored(checkpoint, decoder_config).read)
    ids = tokens(30)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids])).logits[0].float().numpy()
    assert np.abs(decoder.logits(ids) - expected).max() <= TOLERANCE
