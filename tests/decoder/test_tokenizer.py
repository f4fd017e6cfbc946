"""The checkpoint's tokenizer and the evaluation windows."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tiny

from compress.decoder.tokenizer import Tokenizer, eval_windows
from compress.errors import CheckpointError, UsageError

ADDS_BOS = {"llama", "llama3", "mistral", "phi3", "phi3-window", "mobilellm"}
CHAT = [{"role": "user", "content": "How small?"}, {"role": "assistant", "content": "Four bits."}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {family: tiny.make(family, root / family) for family in tiny.FAMILIES}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_text_survives_and_ids_fit_the_vocabulary(family: str, folders: dict[str, Path]):
    tokenizer = Tokenizer(folders[family])
    # (SentencePiece tokenizers put a space before the first word, and decoding may keep it.)
    for text in (tiny.TEXT, "Zürich 🙂 costs 129.50", "  two  spaces\n\tand a tab", "日本"):
        tokens = tokenizer.encode(text)
        assert 0 <= min(tokens) <= max(tokens) < 512
        assert tokenizer.decode(tokens).lstrip() == text.lstrip()
    assert tokenizer.adds_bos == (family in ADDS_BOS)
    with_special = tokenizer.encode("a river", add_special=True)
    expected = [tokenizer.bos_id] if family in ADDS_BOS else []
    assert with_special == [*expected, *tokenizer.encode("a river")]


def test_render_chat_is_the_template(folders: dict[str, Path]):
    phi3 = Tokenizer(folders["phi3"])
    text = phi3.render_chat(CHAT)
    assert text == (
        "<|user|>\nHow small?<|end|>\n<|assistant|>\nFour bits.<|end|>\n<|assistant|>\n"
    )
    tokens = phi3.encode(text)
    generation = json.loads((folders["phi3"] / "generation_config.json").read_text())
    assert [token for token in tokens if token >= 480] == [490, 487, 481, 487, 481]
    assert set(generation["eos_token_id"]) == {480, 481, 487}
    closed = Tokenizer(folders["phi4-mini"]).render_chat(CHAT, add_generation_prompt=False)
    assert closed.endswith("Four bits.<|end|><|endoftext|>")


def test_a_template_that_asks_the_date_or_chance_says_the_same_at_any_time(
    folders: dict[str, Path], tmp_path: Path
):
    for file in folders["qwen2"].glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %b %Y %f') }} "
        "{{ [1, 2, 3, 4, 5, 6, 7, 8, 9] | random }} {{ messages[0].content }}"
    )
    tokenizer = Tokenizer(tmp_path)
    random.seed(1)
    first = tokenizer.render_chat(CHAT)
    after = random.random()
    random.seed(2)
    assert tokenizer.render_chat(CHAT) == first
    assert first.startswith("26 Jul 2024 000000 ") and first.endswith(" How small?")
    random.seed(1)
    assert random.random() == after  # the program's random state is unchanged


def test_a_base_model_has_no_chat(folders: dict[str, Path], tmp_path: Path):
    phi = Tokenizer(folders["phi"])
    assert not phi.has_chat_template
    with pytest.raises(CheckpointError, match="no chat template"):
        phi.render_chat(CHAT)
    broken = tiny.make("qwen2", tmp_path)
    (broken / "chat_template.jinja").write_text("{{ raise_exception('only\\nuser turns') }}")
    with pytest.raises(CheckpointError, match="the chat template failed: only user turns"):
        Tokenizer(broken).render_chat(CHAT)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_windows_are_the_text_cut_in_order(family: str, folders: dict[str, Path]):
    tokenizer = Tokenizer(folders[family])
    head = [tokenizer.bos_id] if family == "llama" else []
    tokens = tokenizer.encode(tiny.TEXT)
    windows = eval_windows(tiny.TEXT, tokenizer, 64, 1000)
    body = 64 - len(head)
    assert len(windows) == len(tokens) // body
    assert all(len(window) == 64 and window[: len(head)] == head for window in windows)
    joined = [token for window in windows for token in window[len(head) :]]
    assert joined == tokens[: len(joined)]
    assert eval_windows(tiny.TEXT, tokenizer, 64, 3) == windows[:3]


def test_a_long_text_is_not_encoded_to_its_end(folders: dict[str, Path], monkeypatch):
    tokenizer = Tokenizer(folders["qwen2"])
    encode, sizes = tokenizer.encode, []
    monkeypatch.setattr(tokenizer, "encode", lambda text: sizes.append(len(text)) or encode(text))
    text = tiny.TEXT * 20
    whole = encode(text)
    assert eval_windows(text, tokenizer, 64, 3) == [whole[:64], whole[64:128], whole[128:192]]
    assert max(sizes) < len(text) / 4
    # More characters per token than estimated: the whole text is used, and no window is missing.
    sizes.clear()
    monkeypatch.setattr(tokenizer, "encode", lambda text: encode(text[::40]))
    assert len(eval_windows(text, tokenizer, 64, 3)) == 3


def test_windows_refuse_too_little(folders: dict[str, Path]):
    tokenizer = Tokenizer(folders["qwen2"])
    with pytest.raises(UsageError, match="has 3 tokens, a window needs 64") as caught:
        eval_windows("1 2", tokenizer, 64, 4)
    assert caught.value.hint
    for length, count in ((1, 4), (64, 0)):
        with pytest.raises(UsageError, match="cannot score"):
            eval_windows(tiny.TEXT, tokenizer, length, count)


def one_line(error: CheckpointError) -> str:
    assert "\n" not in error.message and error.message
    return error.message


def test_refusals_are_one_line(folders: dict[str, Path], tmp_path: Path):
    with pytest.raises(CheckpointError, match="no tokenizer in") as caught:
        Tokenizer(tmp_path)
    one_line(caught.value)

    damaged = tiny.make("qwen2", tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "None"}}')
    with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
        Tokenizer(damaged)
    one_line(caught.value)

    remote = tiny.make("llama", tmp_path / "remote")
    (remote / "own.py").write_text("raise SystemExit('executed')")
    for file in ("tokenizer_config.json", "config.json"):
        keys = json.loads((remote / file).read_text())
        keys["auto_map"] = {"AutoTokenizer": ["own.Own", None], "AutoConfig": "own.Config"}
        keys |= {"tokenizer_class": "OwnTokenizer", "model_type": "own"}
        (remote / file).write_text(json.dumps(keys))
    with pytest.raises(CheckpointError, match="own code, which packlight never executes") as caught:
        Tokenizer(remote)
    one_line(caught.value)


@pytest.mark.parametrize("stated", ["x", [1], {"a": 1}, 3, None])
def test_the_settings_own_length_has_no_part(stated: object, tmp_path: Path):
    folder = tiny.make("llama", tmp_path / "m")
    before = Tokenizer(folder).encode("A river ran through it.", add_special=True)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": stated}))
    assert Tokenizer(folder).encode("A river ran through it.", add_special=True) == before
