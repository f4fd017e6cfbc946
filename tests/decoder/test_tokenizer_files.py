"""What a tokenizer's files would make the library do is bounded before it loads them."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from compress.decoder.tokenizer import Tokenizer
from compress.decoder.tokenizer_facts import TokenizerFacts, facts_from_child
from compress.decoder.tokenizer_files import MOST_GROWTH, check_files, growth
from compress.demo import model_path
from compress.errors import CheckpointError

DOUBLES = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("tokenizer") / "m")


def changed(
    model: Path, folder: Path, change: Callable[[Any], object], name: str = "tokenizer.json"
) -> Path:
    """The tokenizer of ``model`` in ``folder``, with one of its files changed."""
    for file in model.glob("*token*"):
        shutil.copy(file, folder)
    document = json.loads((folder / name).read_text())
    change(document)
    (folder / name).write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["model"]["vocab"].update({"<0x4C>": 2**31 - 1}),
        lambda document: document["added_tokens"][0].update(id=2**31 - 1),
    ],
)
def test_an_id_that_takes_gigabytes(change: Callable[[Any], object], llama: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json has a token with the id 2,147,483"):
        Tokenizer(changed(llama, tmp_path, change))


def test_an_id_that_takes_gigabytes_in_older_files(tmp_path: Path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 10**30}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(CheckpointError, match=r"vocab\.json has a token with the id "):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("key", "step"),
    [
        ("normalizer", {"type": "Sequence", "normalizers": [DOUBLES] * 40}),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 5000}),
        ("normalizer", {"type": "Prepend", "prepend": "x" * 5000}),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 40}),
    ],
)
def test_text_that_grows_without_bound(key: str, step: Any, llama: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="replaces text by longer text so often"):
        Tokenizer(changed(llama, tmp_path, lambda document: document.update({key: step})))


@pytest.mark.parametrize(("text", "grows"), [("صلى", 6), ("a" * 5000, 5000)])
def test_the_longest_replacement_of_a_compiled_table_counts(text: str, grows: int):
    table = (4).to_bytes(4, "little") + bytes(4) + b"b\0" + text.encode() + b"\0"
    step = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
    assert growth({"type": "Sequence", "normalizers": [step, {"type": "NFKC"}]}) == grows


def test_usual_tokenizers_grow_little():
    document = json.loads((model_path() / "tokenizer.json").read_text())
    assert 1 < growth(document["normalizer"]) < MOST_GROWTH / 64


@pytest.mark.parametrize("key", ["content", "\0"])
def test_keys_that_the_library_does_not_know_are_not_printed(
    key: str, llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    token = {key: "<unk>", "special": True, "lstrip": False, "evil\x1b[31m": 1}
    folder = changed(
        llama, tmp_path, lambda settings: settings.update(added_tokens_decoder={"0": token}),
        "tokenizer_config.json",
    )  # fmt: skip
    here = Tokenizer(folder)
    assert capfd.readouterr().out == ""
    print("after")
    assert capfd.readouterr().out == "after\n"
    assert vars(facts_from_child(folder)) == vars(TokenizerFacts.of(here))


def test_special_tokens_without_texts(
    llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    folder = changed(llama, tmp_path, dict.clear, "tokenizer_config.json")
    texts = {"bos_token": {"": ""}, "unk_token": {"": ""}}
    (folder / "special_tokens_map.json").write_text(json.dumps(texts))
    try:  # transformers 5 goes on without them
        Tokenizer(folder)
    except CheckpointError as error:
        assert error.message.startswith("the tokenizer cannot be loaded: ")
    assert capfd.readouterr().out == ""


def test_a_panic_of_the_library_is_an_error_of_ours(llama: Path, tmp_path: Path):
    split = {
        "type": "Split", "pattern": {"Regex": "(x+x+)+z"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    tokenizer = Tokenizer(
        changed(llama, tmp_path, lambda document: document.update(pre_tokenizer=split))
    )
    assert tokenizer.encode("short")
    with pytest.raises(CheckpointError, match=r"the tokenizer fails on a text: .*retry-limit"):
        tokenizer.encode("x" * 60)


@pytest.mark.parametrize("dropout", [0.1, 1, "x"])
def test_merges_that_are_left_out_at_random(dropout: object, llama: Path, tmp_path: Path):
    folder = changed(llama, tmp_path, lambda document: document["model"].update(dropout=dropout))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json leaves out merges at random"):
        Tokenizer(folder)


@pytest.mark.parametrize(
    "named",
    [
        lambda secret: {"vocab_file": secret},
        lambda secret: {"init_inputs": [secret]},
        lambda secret: {"tokenizer_file": secret},
        lambda secret: {"merges_file": secret},
        lambda secret: {"mecab_kwargs": {"mecab_dic": secret}},
    ],
)
@pytest.mark.parametrize("relative", [False, True])
def test_settings_name_no_file_of_the_users(
    named: Callable[[str], dict[str, object]], relative: bool, llama: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """transformers opens them: with ``BertTokenizer`` every line of a text becomes a token."""
    secret = tmp_path / "id_rsa"
    secret.write_text("TOPSECRET\n[UNK]\n")
    monkeypatch.chdir(tmp_path)
    settings = {"tokenizer_class": "BertTokenizer"} | named("id_rsa" if relative else str(secret))
    (folder := tmp_path / "m").mkdir()
    changed(llama, folder, lambda found: found.update(settings), "tokenizer_config.json")
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    with pytest.raises(CheckpointError, match="a file outside of the checkpoint"):
        Tokenizer(folder)


def test_settings_may_name_files_of_the_checkpoint(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    named = {"vocab_file": "tokenizer.json", "special_tokens_map_file": str(tmp_path / "x.json")}
    (tmp_path / "x.json").write_text("{}")
    (folder := tmp_path / "m").mkdir()
    changed(llama, folder, lambda found: found.update(named), "tokenizer_config.json")
    monkeypatch.chdir(folder)
    assert Tokenizer(folder).encode("a") == Tokenizer(llama).encode("a")


def test_a_token_may_read_dropout(tmp_path: Path):
    (tmp_path / "vocab.json").write_text(json.dumps({"dropout": 5}))
    assert not check_files(tmp_path)
