"""Adapters that are refused or warned of, in one line; written by hand, without PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from compress import __main__ as cli
from compress.checkpoint.adapter import split_weight
from compress.checkpoint.checkpoint import Checkpoint
from compress.errors import PacklightError, UsageError

QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "model",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "init_lora_weights": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("adapter") / "model", num_hidden_layers=1)


def pair(module: str = QUERY, rank: int = 2, rows: int = 256, columns: int = 256) -> dict[str, Any]:
    ones = np.ones((max(rows, columns), rank), np.float32)
    return {
        f"{module}.lora_A.weight": ones[:columns].T.copy(),
        f"{module}.lora_B.weight": ones[:rows],
    }


def write(folder: Path, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(pair() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


HEAD = "base_model.model.lm_head.weight"
REFUSED: dict[str, tuple[dict[str, Any] | None, dict[str, Any], str]] = {
    "another-type": (None, {"peft_type": "IA3"}, "'IA3' of PEFT, not LoRA"),
    "prompt": (None, {"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
    "no-type": (None, {"peft_type": None}, "has no peft_type"),
    "dora": (None, {"use_dora": True}, "DoRA is not supported"),
    "dora-tensors": (
        pair() | {f"{QUERY}.lora_magnitude_vector": np.ones(256, np.float32)},
        {},
        "DoRA is not supported",
    ),
    "activated": (None, {"alora_invocation_tokens": [3]}, "activated LoRA"),
    "pissa": (None, {"init_lora_weights": "pissa_niter_4"}, "changed the base model"),
    "layers": (None, {"layer_replication": [[0, 1], [0, 1]]}, "replicated layers"),
    "rank": (None, {"r": 3}, "has shape [2, 256]"),
    "rank-words": (None, {"r": "many"}, "not a whole number"),
    "alpha": (None, {"lora_alpha": [1]}, "not a number"),
    "rows": (pair(rows=255), {}, "has shape [255, 2]"),
    "columns": (pair(columns=200), {}, "has shape [2, 200]"),
    "another-model": (pair(QUERY.replace("layers.0", "layers.7")), {}, "match no module of model"),
    "classifier": (
        pair() | {"base_model.model.score.weight": np.ones((2, 256), np.float32)},
        {"modules_to_save": ["score"]},
        "match no module of model, first 'score.weight'",
    ),
    "new-tokens": (
        pair() | {HEAD: np.ones((515, 256), np.float32)},
        {"modules_to_save": ["lm_head"]},
        "lm_head.weight has shape [515, 256]",
    ),
    "one-of-two": ({f"{QUERY}.lora_A.weight": np.ones((2, 256), np.float32)}, {}, "no lora_B"),
    "not-chosen": (None, {"target_modules": ["v_proj"]}, "target_modules do not choose"),
    "saved-not-there": (None, {"modules_to_save": ["lm_head"]}, "weights have no lm_head.weight"),
    "endless-pattern": (
        None,
        {"target_modules": r"(?:.|..|...)+(?:.|..|...)+[0-9]"},
        "takes too long",
    ),
    "broken-pattern": (None, {"alpha_pattern": {"(": 3}}, "is not valid"),
    "long-pattern": (None, {"rank_pattern": {"q" * 3000: 3}}, "is not valid"),
    "many-patterns": (None, {"rank_pattern": dict.fromkeys(map(str, range(5000)), 1)}, "at most"),
    "names": (None, {"target_modules": [["q_proj"]]}, "target_modules is not a list"),
    "nan": (
        {name: value * np.nan for name, value in pair().items()},
        {},
        "NaN or Inf",
    ),
    "overflow": (
        {name: value * np.float32(3e38) for name, value in pair().items()},
        {},
        "q_proj.weight has 65536 NaN or Inf",
    ),
    "another-kind": (
        pair() | {f"{QUERY}.lora_diag": np.ones(2, np.float32)},
        {},
        "of a kind that is not supported",
    ),
    "huge": (None, {"r": 10**400}, "is a huge number, not a whole number"),
    "no-tensors": ({}, {}, "holds no tensors"),
    "whole-numbers": ({"x": np.ones(3, np.int32)}, {}, "not F32, F16 or BF16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused(case, model, tmp_path):
    tensors, config, message = REFUSED[case]
    folder = write(tmp_path / "lora", tensors, **config)
    with pytest.raises(PacklightError) as refusal:
        checkpoint = Checkpoint.open(model, adapters=[str(folder)])
        checkpoint.read("model.layers.0.self_attn.q_proj.weight")
    assert message in refusal.value.message
    assert "\n" not in refusal.value.message + refusal.value.hint
    assert len(refusal.value.message) < 300


@pytest.mark.parametrize("url", ["https://me:SECRET@host/lora", "s3://me:SECRET@b/lora=0.5"])
def test_an_adapters_url_is_told_without_its_secrets(url, model):
    with pytest.raises(PacklightError, match="is not a folder with an adapter") as refusal:
        Checkpoint.open(model, adapters=[url])
    assert "SECRET" not in refusal.value.message + refusal.value.hint


def test_a_refusal_is_one_line_and_leaves_nothing(model, tmp_path, monkeypatch, capsys):
    folder = write(tmp_path / "lora", use_dora=True)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["build", str(model), "--adapter", str(folder), "-o", "out"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-2].endswith("adapter lora: DoRA is not supported") and "hint:" in error[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora"]


@pytest.mark.parametrize(
    ("make", "message", "hint"),
    [
        (lambda folder: folder.mkdir(), "no adapter_config.json", "PEFT writes it"),
        (lambda folder: tiny.make("llama", folder), "no adapter_config.json", "as MODEL"),
        (lambda folder: to_pickle(write(folder)), "no adapter_model.safetensors", "is a pickle"),
        (lambda folder: cut(write(folder)), "is truncated", "download it again"),
        (lambda folder: wide(write(folder)), "more than 10,000,000 bytes", ""),
        (lambda folder: None, "is not a folder with an adapter", "someone/my-lora"),
    ],
)  # fmt: skip
def test_folders_that_are_no_adapter(make, message, hint, model, tmp_path):
    make(tmp_path / "lora")
    with pytest.raises(PacklightError) as refusal:
        Checkpoint.open(model, adapters=[str(tmp_path / "lora")])
    assert message in refusal.value.message and hint in refusal.value.hint


def to_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def cut(folder: Path) -> None:
    with (folder / "adapter_model.safetensors").open("r+b") as stream:
        stream.truncate(2000)


def wide(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"x": " " * 10_000_000}))


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (None, {"base_model_name_or_path": "someone/Other"}, "trained on 'someone/Other'"),
        (None, {"target_modules": ["q_proj", "v_proj"]}, "no tensors for 1 module(s)"),
        (None, {"sparkle": {"strength": 3}}, "does not know, first 'sparkle'"),
    ],
)
def test_what_is_only_odd_is_said(tensors, config, message, model, tmp_path):
    folder = write(tmp_path / "lora", tensors, **config)
    (warning,) = Checkpoint.open(model, adapters=[str(folder)]).warnings
    assert message in warning


@pytest.mark.parametrize("name", ["someone/MODEL", "/elsewhere/model/", "", None])
def test_the_same_name_elsewhere_is_not_said(name, model, tmp_path):
    folder = write(tmp_path / "lora", base_model_name_or_path=name)
    assert Checkpoint.open(model, adapters=[str(folder)]).warnings == []


def test_two_adapters_that_bring_one_tensor(model, tmp_path):
    first, second, again = (
        write(
            tmp_path / name,
            pair() | {HEAD: np.full((512, 256), value, np.float32)},
            modules_to_save=["lm_head"],
        )
        for name, value in (("a", 1), ("b", 2), ("c", 1))
    )
    Checkpoint.open(model, adapters=[str(first), str(again)])  # one head
    with pytest.raises(PacklightError, match=r"lm_head\.weight is brought by a, too"):
        Checkpoint.open(model, adapters=[str(first), str(second)])
    with pytest.raises(PacklightError, match=r"brings lm_head\.weight whole, of which there is no"):
        Checkpoint.open(model, adapters=[f"{first}=0.5"])


def test_weights_of_adapters(tmp_path):
    assert split_weight("my-lora") == ("my-lora", 1)
    assert split_weight("a/b@main=-0.5") == ("a/b@main", -0.5)
    named = tmp_path / "lr=0.1"
    named.mkdir()
    assert split_weight(str(named)) == (str(named), 1)
    assert split_weight(f"{named}=2") == (str(named), 2)
    for text in ("", "=0.5", "x=much", "x=nan", "x=inf"):
        with pytest.raises(UsageError, match="PATH=WEIGHT"):
            split_weight(text)
