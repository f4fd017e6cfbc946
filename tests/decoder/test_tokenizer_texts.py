"""Texts that tokenizers are compared on, and tokenizers with more ids than the model has rows."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import tiny
from commands import packlight

from compress.decoder.tokenizer import Tokenizer
from compress.decoder.tokenizer_facts import TokenizerFacts, facts_from_child, parse
from compress.decoder.tokenizer_texts import TEXTS, texts_for
from compress.errors import CheckpointError


def test_thirty_texts_in_the_usual_form():
    assert len(TEXTS) == len(set(TEXTS)) == 30
    assert all(unicodedata.is_normalized("NFC", text) for text in TEXTS)


def test_every_added_token_stands_alone_and_inside_a_text(tmp_path: Path):
    tokenizer = Tokenizer(tiny.make("qwen2", tmp_path))
    texts = texts_for(tokenizer)
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert token in texts
        assert any(f"b{token}c" in text for text in texts)
    assert any(
        text.startswith("<|im_start|>user\nWhat is 2 + 2?") for text in texts
    )  # its template
    assert any(text.startswith("<|im_start|>system\nBe brief.") for text in texts)


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """483 ids and 481 rows: <|im_start|> and <|im_end|> have none."""
    return tiny.make("qwen2", tmp_path_factory.mktemp("rows") / "m", vocab_size=481)


def change(folder: Path, tmp_path: Path, name: str, **keys: object) -> Path:
    import shutil

    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    path = copy / name
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return copy


FAST = ("-r", "int4-fast", "--no-verify")


def test_tokens_beyond_the_embedding_that_a_template_needs(longer: Path, tmp_path: Path):
    model = change(longer, tmp_path, "tokenizer_config.json", eos_token="<|endoftext|>")
    (model / "generation_config.json").unlink()
    keys = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(keys | {"eos_token_id": 480}))
    for formats in (("-f", "gguf"), ("-f", "onnx"), ("-f", "coreml", "--dry-run")):
        done = packlight("build", model, *FAST, *formats, "-o", "out", cwd=tmp_path)
        assert done.returncode == 2
        assert (
            "the tokenizer has 2 tokens beyond the 481 rows of the embedding, first "
            "'<|im_start|>' (481); the chat template needs '<|im_start|>' (481)"
        ) in done.stderr
        assert "hint: model.resize_token_embeddings" in done.stderr
    (model / "chat_template.jinja").unlink()
    done = packlight("build", model, *FAST, "-f", "gguf", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "first '<|im_start|>' (481): these are left out" in done.stdout


def test_tokens_beyond_the_embedding_that_end_generation(longer: Path, tmp_path: Path):
    done = packlight("build", longer, *FAST, "-f", "onnx", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2
    assert "the end of generation needs '<|im_end|>' (482)" in done.stderr


def test_texts_with_such_tokens_are_read_without_them(longer: Path):
    tokenizer = Tokenizer(longer, rows=481)
    text = "a river<|im_end|>the sea"
    whole = Tokenizer(longer).encode(text)
    assert 482 in whole
    assert tokenizer.encode(text) == [index for index in whole if index != 482]
    assert "<|im_end|>" not in texts_for(tokenizer)


@pytest.mark.parametrize("family", ["llama", "llama3", "phi4-mini"])
def test_a_child_process_finds_the_same(family: str, tmp_path: Path):
    folder = tiny.make(family, tmp_path)
    here, there = TokenizerFacts.of(Tokenizer(folder)), facts_from_child(folder)
    assert vars(here) == vars(there)
    parsed = parse(here.text)
    assert parsed.document["model"]["type"] == "BPE" and len(parsed.ids) > 480
    assert here.last_id == max(parsed.ids.values())


def test_refusals_of_the_child_are_ours(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no tokenizer in") as caught:
        facts_from_child(tmp_path)
    assert caught.value.hint.startswith("expected one of")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        facts_from_child(tmp_path)
