"""The tokenizer's files beside a graph give the same ids in every version of transformers.

``AutoTokenizer`` must return for the folder exactly what ``tokenizers`` returns for its
``tokenizer.json``, in any version.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import tokenizers
from transformers import AutoTokenizer

from compress.checkpoint.checkpoint import Checkpoint
from compress.checkpoint.side_files import hf_config, write_side_files
from compress.decoder.config import DecoderConfig
from compress.decoder.tokenizer_texts import texts_for
from compress.demo import model_path
from compress.files import check_unchanged

FLAGS = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)


def settings(folder: Path, **keys: Any) -> None:
    path = folder / "tokenizer_config.json"
    document = json.loads(path.read_text())
    document.setdefault("added_tokens_decoder", {}).update(keys.pop("added", {}))
    path.write_text(json.dumps(document | keys))


CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("demo", {}),
    "no space in front": ("demo", {"add_prefix_space": False}),
    "no BOS": ("llama", {"add_bos_token": False}),
    "EOS behind": ("llama", {"add_eos_token": True}),
    "older files": ("mobilellm", {}),
    "bytes": ("qwen2", {}),
    "BOS by the template": ("llama3", {}),
    "GPT-2's class": ("phi4-mini", {}),
    "a token in the settings": (
        "qwen2",
        {"added": {"483": FLAGS | {"content": "<|tool|>", "special": True, "lstrip": True}}},
    ),
    "extra_special_tokens by name": ("qwen2", {"extra_special_tokens": {"image_token": "<img>"}}),
}


@pytest.mark.parametrize("case", list(CHANGES))
def test_the_files_beside_a_graph_are_read_alike(case: str, tmp_path: Path):
    family, change = CHANGES[case]
    if family == "demo":
        shutil.copytree(model_path(), tmp_path / "m")
    else:
        tiny.make(family, tmp_path / "m")
    settings(tmp_path / "m", **change)
    checkpoint = Checkpoint.open(tmp_path / "m")
    config = DecoderConfig.from_hf(checkpoint.config, checkpoint.generation_config)
    folder = tmp_path / "out"
    folder.mkdir()
    write_side_files(config, checkpoint, folder)

    assert {path.name for path in folder.glob("*token*")} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    loaded = AutoTokenizer.from_pretrained(folder)
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in texts_for(checkpoint.tokenizer):
        for special in (False, True):
            ids = loaded.encode(text, add_special_tokens=special)
            assert ids == plain.encode(text, add_special_tokens=special).ids, text
            assert ids == checkpoint.tokenizer.hf.encode(text, add_special_tokens=special), text
    theirs = checkpoint.tokenizer.hf
    keys = ["bos_token", "eos_token", "unk_token", "pad_token", "chat_template"]
    if type(loaded).__name__ == "Qwen2Tokenizer":  # of transformers 5, by the model's type
        keys.remove("unk_token")
    for key in keys:
        assert getattr(loaded, key) == getattr(theirs, key), key
    assert set(loaded.all_special_tokens) >= set(theirs.all_special_tokens)
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    assert stated["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in stated and "added_tokens_decoder" not in stated


def test_named_templates_travel(tmp_path: Path):
    source = tiny.make("qwen2", tmp_path / "m")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("R")
    (source / "chat_template.jinja").write_text("D")
    checkpoint = Checkpoint.open(source)
    folder = tmp_path / "out"
    folder.mkdir()
    write_side_files(DecoderConfig.from_hf(checkpoint.config), checkpoint, folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template == {"default": "D", "rag": "R"}
    assert (source / "additional_chat_templates" / "rag.jinja") in checkpoint.tokenizer_files()
    check_unchanged(checkpoint.opened)


def test_the_config_names_no_place_of_another_machine():
    keys = json.loads((model_path() / "config.json").read_text())
    places = {"_name_or_path": "/home/me/model", "_model_name_or_path": "/home/me/base"}
    written = hf_config(DecoderConfig.from_hf(keys | places))
    assert "/home/me" not in json.dumps(written)
    assert written["vocab_size"] == keys["vocab_size"]
