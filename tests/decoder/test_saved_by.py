"""Checkpoints as each major of transformers saves them: ``tests/data/save.py`` made them."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path

import pytest
import tiny

from compress.checkpoint.checkpoint import Checkpoint
from compress.checkpoint.side_files import write_side_files
from compress.decoder.config import DecoderConfig
from compress.decoder.tokenizer import Tokenizer

DATA = Path(__file__).resolve().parents[1] / "data"
NAMES = ("llama", "llama3")
TEXTS = (
    tiny.TEXT,
    "",
    "  two  spaces\n\tand a tab",
    "Zürich 🙂 日本 costs 129.50",
    "<|start_header_id|>user<|end_header_id|>\n\nHow?<|eot_id|> and <s>on</s> it goes",
)
CHAT = [{"role": "user", "content": "How small?"}, {"role": "assistant", "content": "Four bits."}]


def settings(major: int, name: str) -> dict[str, object]:
    file = DATA / f"saved_by_{major}" / name / "tokenizer_config.json"
    return dict(json.loads(file.read_text("utf-8")))


def tokens(tokenizer: Tokenizer) -> list[object]:
    return [
        [
            tokenizer.encode(text, add_special=special)
            for text in TEXTS
            for special in (False, True)
        ],
        tokenizer.encode(tokenizer.render_chat(CHAT)),
        tokenizer.bos_id,
        tokenizer.adds_bos,
        tokenizer.hf.eos_token_id,
        tokenizer.hf.all_special_ids,
    ]


def test_the_two_say_it_differently():
    """The settings that the tests below depend on are in the files."""
    assert settings(4, "llama3")["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings(5, "llama3")["tokenizer_class"] == "TokenizersBackend"
    assert isinstance(settings(5, "llama3")["extra_special_tokens"], list)
    assert settings(4, "llama")["add_bos_token"] is False
    assert "add_bos_token" not in settings(5, "llama")
    old, new = (
        json.loads((DATA / f"saved_by_{major}" / "llama3" / "config.json").read_text("utf-8"))
        for major in (4, 5)
    )
    assert "rope_scaling" in old and "rope_theta" in old
    assert "rope_scaling" not in new and "rope_theta" in new["rope_parameters"]


@pytest.mark.parametrize("name", NAMES)
def test_both_are_one_model(name: str):
    opened = [Checkpoint.open(DATA / f"saved_by_{major}" / name) for major in (4, 5)]
    old, new = (DecoderConfig.from_hf(c.config, c.generation_config) for c in opened)
    assert dataclasses.replace(old, raw={}) == dataclasses.replace(new, raw={})
    assert opened[0].tensors.keys() == opened[1].tensors.keys()
    for tensor in opened[0].tensors:
        assert (opened[0].read(tensor) == opened[1].read(tensor)).all()


@pytest.mark.parametrize("name", NAMES)
def test_both_have_one_tokenizer(name: str):
    old, new = (Tokenizer(DATA / f"saved_by_{major}" / name) for major in (4, 5))
    assert tokens(old) == tokens(new)
    assert old.adds_bos == (name == "llama3")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("major", [4, 5])
def test_what_lies_beside_a_graph_loads_in_both(name: str, major: int, tmp_path: Path):
    """The oracle is the installed transformers, another one in each environment."""
    from transformers import AutoTokenizer

    source = DATA / f"saved_by_{major}" / name
    checkpoint = Checkpoint.open(source)
    write_side_files(DecoderConfig.from_hf(checkpoint.config), checkpoint, tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    wanted = Tokenizer(source)
    for text in TEXTS:
        assert found(text)["input_ids"] == wanted.encode(text, add_special=True)
    rendered = found.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert rendered == wanted.render_chat(CHAT)


@pytest.mark.parametrize("model", ["llama", "tomorrows"])
@pytest.mark.parametrize("major", [4, 5])
def test_where_no_class_is_named_the_model_type_decides(major: int, model: str, tmp_path: Path):
    source = DATA / f"saved_by_{major}" / "llama"
    for file in source.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    keys = settings(major, "llama") | {"add_bos_token": True}
    del keys["tokenizer_class"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(keys))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
    assert Tokenizer(tmp_path).adds_bos == (major == 4 and model == "llama")
    assert Tokenizer(tmp_path).encode(tiny.TEXT) == Tokenizer(source).encode(tiny.TEXT)


@pytest.mark.parametrize("name", NAMES)
def test_a_class_that_nobody_knows_is_read_from_tokenizer_json(name: str, tmp_path: Path):
    source = DATA / "saved_by_5" / name
    for file in source.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    keys = settings(5, name) | {"tokenizer_class": "TomorrowsTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(keys))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "tomorrows"}))
    (tmp_path / "chat_template.jinja").write_bytes((source / "chat_template.jinja").read_bytes())
    assert tokens(Tokenizer(tmp_path)) == tokens(Tokenizer(source))


def test_only_classes_that_ask_for_it_get_their_template_remade(tmp_path: Path):
    """As 4.57 has it: others keep the template of tokenizer.json, whatever add_bos_token says."""
    source = DATA / "saved_by_4" / "llama3"
    for file in source.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    keys = settings(4, "llama3") | {"add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(keys))
    assert Tokenizer(tmp_path).adds_bos
    keys = settings(4, "llama") | {"add_bos_token": True}
    for file in (DATA / "saved_by_4" / "llama").glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(keys))
    assert Tokenizer(tmp_path).adds_bos


def test_the_files_are_of_these_majors():
    """Also that this environment is one of the two that are promised."""
    assert version("transformers").split(".")[0] in ("4", "5")
    for major in (4, 5):
        for name in NAMES:
            config = json.loads((DATA / f"saved_by_{major}" / name / "config.json").read_text())
            assert str(config["transformers_version"]).startswith(f"{major}.")
