"""Merging adapters while a checkpoint is read, against PEFT's ``merge_and_unload``."""

from __future__ import annotations

import json
import shutil
import threading
from functools import cache
from pathlib import Path

import numpy as np
import peft_adapters
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import DecoderConfig, WeightMap
from compress.errors import PacklightError
from compress.files import check_unchanged
from compress.plan.job import describe_model

PHI3 = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
QUERY = ["q_proj"]
# Name → family, what LoraConfig is given, whether head and embedding are one afterwards.
CASES = {
    "linears": ("llama", {}, False),
    "rslora": ("llama", {"use_rslora": True}, False),
    "patterns": (
        "llama",
        {
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6},
            "alpha_pattern": {"v_proj": 3.5, "^model.layers.0.self_attn.o_proj": 9},
        },
        False,
    ),
    "regex": ("llama", {"target_modules": r".*\.(q_proj|down_proj)"}, False),
    "one-layer": ("llama", {"layers_to_transform": [1], "layers_pattern": "layers"}, False),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, False),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}, False),
    "whole-modules": (
        "llama",
        {"target_modules": QUERY, "modules_to_save": ["lm_head", "embed_tokens", "norm", "mlp"]},
        False,
    ),
    "fan-in": ("llama", {"fan_in_fan_out": True}, False),
    "tokens": ("llama", {"trainable_token_indices": [3, 70, 200]}, False),
    "fused": ("phi3", {"target_modules": PHI3}, False),
    "biases": ("qwen2", {"bias": "all"}, True),
    "lora-bias": ("qwen2", {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, True),
    "layernorms": ("phi", {"target_modules": ["q_proj", "dense", "fc1"], "bias": "all"}, False),
    "tied-embedding": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}, True),
    "tied-head": ("qwen2", {"target_modules": ["q_proj", "lm_head"]}, True),
    "own-head": ("qwen2", {"target_modules": QUERY, "modules_to_save": ["lm_head"]}, False),
    "own-embedding": (
        "qwen2",
        {"target_modules": QUERY, "modules_to_save": ["embed_tokens"]},
        False,
    ),
    "one-for-both": (
        "qwen2",
        {"target_modules": QUERY, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "own-head-embedding": (
        "qwen2",
        {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
        False,
    ),
    "half-precision": ("qwen3", {"dtype": "bfloat16"}, True),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return cache(lambda f: tiny.make(f, tmp_path_factory.mktemp(f) / f, dtype="float32"))


@pytest.fixture(scope="module")
def llama(bases):
    return bases("llama")


@pytest.fixture(scope="module")
def loras(llama, tmp_path_factory):
    """Two adapters of the llama, trained on other modules."""
    place = tmp_path_factory.mktemp("loras")
    first = peft_adapters.make(llama, place / "first")
    return first, peft_adapters.make(llama, place / "second", seed=1, target_modules=QUERY)


def weights(checkpoint):
    """Name → float32 of every tensor that a decoder of this config reads."""
    config = DecoderConfig.from_hf(checkpoint.config, checkpoint.generation_config)
    return {name: checkpoint.read(name) for name in WeightMap(config).expected()}


def differing(found, expected):
    return [name for name in found if not np.array_equal(found[name], expected[name])]


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_peft(case, bases, tmp_path):
    family, config, tied = CASES[case]
    base = bases(family)
    adapter = peft_adapters.make(base, tmp_path / "lora", **config)
    model = peft_adapters.merged(base, adapter)
    expected = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    checkpoint = Checkpoint.open(base, adapters=[str(adapter)])
    assert checkpoint.config["tie_word_embeddings"] is model.config.tie_word_embeddings is tied
    found = weights(checkpoint)
    assert differing(found, weights(Checkpoint.open(base)) | {"lm_head.weight": 0})
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5, err_msg=name)
    if tied:
        np.testing.assert_array_equal(
            expected["lm_head.weight"], expected["model.embed_tokens.weight"]
        )


def test_a_pair_that_was_trained_tied_is_added_once(bases, tmp_path):
    """PEFT 0.21 adds it twice where it merges; the model that was trained has it once."""
    import peft
    import torch

    base = bases("qwen2")
    targets = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = peft_adapters.make(base, tmp_path / "lora", **targets)
    assert any(
        "lm_head.lora_A" in name for name in load_file(adapter / "adapter_model.safetensors")
    )
    checkpoint = Checkpoint.open(base, adapters=[str(adapter)])
    model = peft.PeftModel.from_pretrained(tiny.reference(base), adapter).eval()
    plain = tiny.reference(base)
    plain.model.embed_tokens.weight.data = torch.from_numpy(
        checkpoint.read("model.embed_tokens.weight")
    )
    plain.tie_weights()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        np.testing.assert_allclose(plain(tokens).logits, model(tokens).logits, atol=1e-4)


def test_rows_have_the_same_bits_however_many_are_read(llama, loras):
    checkpoint = Checkpoint.open(llama, adapters=[str(loras[0])])
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        whole = checkpoint.read(name)
        for rows in (slice(0, 1), slice(7, 65), slice(63, 64), slice(100, 256), slice(5, 5)):
            np.testing.assert_array_equal(checkpoint.read(name, rows), whole[rows])


def test_an_embedding_has_the_same_bits_however_many_rows_are_read(llama, tmp_path):
    adapter = peft_adapters.make(llama, tmp_path / "lora", target_modules=["embed_tokens"])
    checkpoint = Checkpoint.open(llama, adapters=[str(adapter)])
    whole = checkpoint.read("model.embed_tokens.weight")
    for rows in (slice(0, 1), slice(7, 65), slice(300, 512)):
        np.testing.assert_array_equal(
            checkpoint.read("model.embed_tokens.weight", rows), whole[rows]
        )


def test_threads_read_the_same(llama, loras):
    stored = Stored(checkpoint := Checkpoint.open(llama, adapters=[str(loras[0])]),
                    DecoderConfig.from_hf(checkpoint.config))  # fmt: skip
    name, found = "blocks.0.down_proj.weight", {}
    readers = [
        threading.Thread(target=lambda i=i: found.update({i: stored.read(name)})) for i in range(4)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    for value in found.values():
        np.testing.assert_array_equal(value, stored.read(name))


def test_parts_of_fused_weights_are_merged(bases, tmp_path):
    base = bases("phi3")
    adapter = peft_adapters.make(base, tmp_path / "lora", target_modules=PHI3)
    checkpoint = Checkpoint.open(base, adapters=[str(adapter)])
    stored = Stored(checkpoint, DecoderConfig.from_hf(checkpoint.config))
    fused = checkpoint.read("model.layers.1.self_attn.qkv_proj.weight")
    parts = [stored.read(f"blocks.1.{role}.weight") for role in ("q_proj", "k_proj", "v_proj")]
    np.testing.assert_array_equal(np.concatenate(parts), fused)


def test_adapters_add_up_in_any_order(llama, loras):
    first, second = loras
    expected = peft_adapters.merged(llama, first, second).state_dict()
    one = weights(Checkpoint.open(llama, adapters=[str(first), str(second)]))
    other = weights(Checkpoint.open(llama, adapters=[str(second), str(first)]))
    for name, value in one.items():
        np.testing.assert_allclose(value, expected[name].numpy(), rtol=0, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(other[name], value, rtol=0, atol=1e-6, err_msg=name)


def test_weights_of_adapters_are_those_of_peft(llama, loras):
    import peft

    model = peft.PeftModel.from_pretrained(tiny.reference(llama), loras[0], adapter_name="first")
    model.load_adapter(loras[1], adapter_name="second")
    model.add_weighted_adapter(["first", "second"], [0.5, -0.25], "both", combination_type="cat")
    model.set_adapter("both")
    expected = model.merge_and_unload().state_dict()
    found = weights(Checkpoint.open(llama, adapters=[f"{loras[0]}=0.5", f"{loras[1]}=-0.25"]))
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name].numpy(), rtol=0, atol=1e-5, err_msg=name)


def test_embeddings_that_two_adapters_were_trained_on(llama, tmp_path):
    """PEFT saves the embedding beneath a LoRA along with it: the same in both."""
    adapters = [
        peft_adapters.make(llama, tmp_path / str(seed), seed=seed, target_modules=["embed_tokens"])
        for seed in (1, 2)
    ]
    tensors = load_file(adapters[0] / "adapter_model.safetensors")
    (base,) = (name for name in tensors if name.endswith("base_layer.weight"))
    name = "model.embed_tokens.weight"
    plain = Checkpoint.open(llama).read(name)
    found = Checkpoint.open(llama, adapters=[f"{path}=0.5" for path in adapters]).read(name)
    each = [Checkpoint.open(llama, adapters=str(path)).read(name) - plain for path in adapters]
    np.testing.assert_allclose(found, plain + sum(each) / 2, rtol=0, atol=1e-5)
    tensors[base][0, 0] += 1
    save_file(tensors, adapters[0] / "adapter_model.safetensors")
    with pytest.raises(PacklightError, match=r"model\.embed_tokens\.weight is brought by 1, too"):
        Checkpoint.open(llama, adapters=[*map(str, adapters)])


def test_pickled_checkpoints_are_merged_and_not_changed(llama, loras, tmp_path):
    base = tiny.make("llama", tmp_path / "pickled", dtype="float32", safetensors=False)
    expected = weights(Checkpoint.open(llama, adapters=[str(loras[0])]))
    checkpoint = Checkpoint.open(base, adapters=[str(loras[0])])
    for _ in range(2):
        assert not differing(weights(checkpoint), expected)


def test_a_pickled_head_is_untied(bases, tmp_path):
    base = tiny.make("qwen2", tmp_path / "pickled", dtype="float32", safetensors=False)
    targets = {"target_modules": QUERY, "modules_to_save": ["embed_tokens"]}
    adapter = peft_adapters.make(base, tmp_path / "lora", **targets)
    found = weights(Checkpoint.open(base, adapters=[str(adapter)]))
    expected = weights(Checkpoint.open(bases("qwen2"), adapters=[str(adapter)]))
    assert "lm_head.weight" in found and not differing(found, expected)


def test_a_tied_checkpoint_with_a_head_of_its_own(bases, tmp_path):
    """A stored head is used, and the adapter's embedding changes the embedding only."""
    base = shutil.copytree(bases("qwen2"), tmp_path / "qwen2")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = peft_adapters.make(bases("qwen2"), tmp_path / "lora", target_modules=["embed_tokens"])
    checkpoint = Checkpoint.open(base, adapters=str(adapter))
    assert describe_model(checkpoint).tie_word_embeddings is False
    (warning,) = checkpoint.warnings
    assert "differs from it" in warning
    found = weights(checkpoint)
    np.testing.assert_array_equal(found["lm_head.weight"], tensors["lm_head.weight"])
    tied = Checkpoint.open(bases("qwen2"), adapters=str(adapter)).read("model.embed_tokens.weight")
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], tied)


def test_an_adapter_that_changes_meanwhile_is_found(llama, loras, tmp_path):
    folder = shutil.copytree(loras[0], tmp_path / "lora")
    checkpoint = Checkpoint.open(llama, adapters=str(folder))
    check_unchanged(checkpoint.opened)
    edit(folder, lora_alpha=1300)
    with pytest.raises(PacklightError, match=r"adapter_config\.json has changed"):
        check_unchanged(checkpoint.opened)


def test_layers_that_are_shared(tmp_path):
    """MobileLLM ties by ``share_embedding``, and runs each block twice."""
    base = tiny.make("mobilellm", tmp_path / "base", dtype="float32", layer_sharing=True)
    plain = tiny.make("llama", tmp_path / "llama", dtype="float32", num_key_value_heads=2)
    targets = {"target_modules": QUERY, "modules_to_save": ["lm_head"]}
    adapter = peft_adapters.make(plain, tmp_path / "lora", **targets)
    checkpoint = Checkpoint.open(base, adapters=str(adapter))
    config = describe_model(checkpoint)
    assert (config.tie_word_embeddings, config.num_hidden_layers) == (False, 4)
    stored = Stored(checkpoint, config)
    twice = [stored.read(f"blocks.{block}.q_proj.weight") for block in (2, 3)]
    np.testing.assert_array_equal(*twice)
    before = Checkpoint.open(base).read("model.layers.1.self_attn.q_proj.weight")
    assert not np.array_equal(twice[0], before)


def test_every_change_has_a_fingerprint_of_its_own(llama, loras, tmp_path):
    changed = shutil.copytree(loras[0], tmp_path / "changed")
    tensors = load_file(changed / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, changed / "adapter_model.safetensors")
    other = shutil.copytree(loras[0], tmp_path / "other")
    edit(other, lora_alpha=13)
    first, second = map(str, loras)
    choices = [(), (first,), (second,), (first, second), (f"{first}=0.5",), (changed,), (other,)]
    found = [Checkpoint.open(llama, adapters=[*map(str, c)]).fingerprint() for c in choices]
    assert len(set(found)) == len(choices)
    again = Checkpoint.open(llama, adapters=[first])
    assert again.fingerprint() == found[1]


def edit(folder: Path, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
