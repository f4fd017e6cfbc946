"""llama.cpp's tokenizer, from our file, against Hugging Face's, from the checkpoint."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import gguf_oracle
import pytest
import tiny
import tiny_tokenizers as patterns
from exported import Exports
from transformers import AutoTokenizer

from compress.checkpoint.checkpoint import Checkpoint
from compress.decoder.config import DecoderConfig
from compress.decoder.tokenizer_facts import facts_from_child
from compress.errors import CheckpointError, UnsupportedModelError
from exporters.gguf.inspection import describe
from exporters.gguf.runtime import open_runtime
from exporters.gguf.splitting import GPT2, LLAMA3, O200K, QWEN2, classify
from exporters.gguf.tokenizer import (
    missing_merges,
    read_vocabulary,
    strips_after_special,
    token_table,
)

# One of each kind: SentencePiece (fast, Phi-3's with stripping, slow files only), and the
# byte-level ones with the patterns of Llama 3, GPT-2, Qwen2 and GPT-4o.
FAMILIES = ("llama", "demo", "phi3-longrope", "mobilellm", "llama3", "phi", "qwen2", "phi4-mini")

STRINGS = (
    "",
    "Hello world",
    " leading space",
    "trailing space ",
    "two  spaces   three    four",
    "line\nbreak\n\n\ntwo more",
    "windows\r\nline\r\n",
    "\ttab\tbed\n\t\tindented",
    "def f(x):\n    return x ** 2  # squared\n",
    "if (a[0] != b->c) { return !d && e::f; }",
    "0 12 345 6789 1234567890 3.14159 1,000,000",
    "It's they've we'll I'D YOU'RE 'twas",
    "naïve café, größere Wörter, Привет мир",
    "你好世界。こんにちは",
    "🙂🚀 emoji 👩‍👩‍👧 family",
    "CamelCase snake_case kebab-case SHOUTING",
    "https://example.org/a?b=c&d=%20#e",
    "a<b>c</b> <not|special> <0x41>",
    "\u00a0no-break\u2003em\u200bzero",
    "<|endoftext|> in the middle <|endoftext|>of it",
    "x" * 70 + " " * 70 + "y",
)


@functools.cache
def pair(exported: Exports, family: str) -> tuple[Any, Any]:
    """The checkpoint's tokenizer, and llama.cpp with our file of it."""
    made = exported("gguf", family, type="Q8_0")
    runtime = open_runtime(made.path, context=64, threads=1)
    return AutoTokenizer.from_pretrained(made.checkpoint.path), runtime


@pytest.mark.parametrize("family", FAMILIES)
def test_same_ids(exported: Exports, family: str) -> None:
    if family == "mobilellm" and tiny.MAJOR > 4:
        pytest.skip("transformers 5 by itself has another normalizer for tokenizer.model")
    tokenizer, runtime = pair(exported, family)
    for text in STRINGS:
        if family == "phi3-longrope" and "<|endoftext|>" in text:
            continue  # this one strips behind <|endoftext|> too: the note below says so
        expected = tokenizer(text)["input_ids"]
        assert gguf_oracle.tokenize(runtime, text) == expected, text
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert gguf_oracle.tokenize(runtime, text, add_special=False) == bare, text


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("phi", "mobilellm")])
def test_same_chat(exported: Exports, family: str) -> None:
    tokenizer, runtime = pair(exported, family)
    messages = [
        {"role": "user", "content": "What is 2 + 2?\n\n  Explain."},
        {"role": "assistant", "content": "4, because it isn't 5."},
        {"role": "user", "content": "Sure?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert gguf_oracle.tokenize(runtime, text, add_special=False) == ids
    fields = gguf.GGUFReader(exported("gguf", family, type="Q8_0").path).fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_ends_where_the_model_says(exported: Exports, family: str) -> None:
    opened = Checkpoint.open(exported.checkpoint(family))
    config = DecoderConfig.from_hf(opened.config, opened.generation_config)
    runtime = pair(exported, family)[1]
    assert config.eos_token_ids
    assert all(gguf_oracle.ends_generation(runtime, token) for token in config.eos_token_ids)
    assert not any(gguf_oracle.ends_generation(runtime, token) for token in range(3, 300))


def test_every_end_needs_a_place(exported: Exports) -> None:
    # <|assistant|> ends Phi-3's turns, and llama.cpp does not know it: it goes in as `eom`.
    described = describe(exported("gguf", "demo", type="Q8_0").path)["metadata"]
    ids = {kind: described[f"tokenizer.ggml.{kind}_token_id"] for kind in ("eos", "eot", "eom")}
    assert ids == {"eos": "2000", "eot": "2007", "eom": "2001"}


def test_notes_tell_what_differs(exported: Exports) -> None:
    def notes(family):
        return exported("gguf", family, type="Q8_0").artifact.notes

    assert notes("demo") == ()
    # llama.cpp drops whitespace behind all of Phi-3's tokens but three.
    ends = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|user|>", "<|end|>")
    by_text = {text: index for index, text in enumerate(ends)}
    added = {index: {"content": text, "rstrip": index > 2} for text, index in by_text.items()}
    strips, found = strips_after_special(added, by_text)
    assert strips and "'</s>'" in found[0] and "2 special token(s)" in found[0]
    assert any("normalizes (NFC)" in note for note in notes("qwen2"))


def byte_level(*steps: dict[str, Any], ignore_merges: bool = False) -> dict[str, Any]:
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    splitting = {"type": "Sequence", "pretokenizers": [*steps, last]}
    model = {"type": "BPE", "vocab": {}, "merges": [], "ignore_merges": ignore_merges}
    return {"model": model, "pre_tokenizer": splitting}


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert,
    }  # fmt: skip


def test_the_pattern_names_the_pre_tokenizer() -> None:
    assert (LLAMA3, QWEN2, O200K) == (
        patterns.LLAMA3_PATTERN,
        patterns.QWEN2_PATTERN,
        patterns.O200K_PATTERN,
    )
    assert classify(byte_level(split(QWEN2)))[1] == "qwen2"
    assert classify(byte_level(split(LLAMA3), ignore_merges=True))[1] == "llama-bpe"
    assert classify(byte_level(split(LLAMA3)))[1] == "smaug-bpe"  # the same without ignore_merges
    assert classify(byte_level(split(O200K, "Removed", True)))[1] == "gpt-4o"
    digits = {"type": "Digits", "individual_digits": True}
    assert classify(byte_level(digits, split(GPT2)))[1] == "smollm"
    plain = byte_level()
    plain["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    assert classify(plain) == ("gpt2", "gpt-2")


def test_unknown_tokenizers_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="packlight does not know this pre-tokenizer"):
        classify(byte_level(split(QWEN2 + "|x")))
    with pytest.raises(UnsupportedModelError, match="packlight does not know this pre-tokenizer"):
        classify(byte_level(split(QWEN2, "MergedWithNext")))
    with pytest.raises(UnsupportedModelError, match="would take this Unigram tokenizer"):
        classify({"model": {"type": "Unigram", "vocab": []}})
    with pytest.raises(
        UnsupportedModelError, match="would take this BPE tokenizer"
    ):  # no byte fallback
        classify({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})


def test_merges_that_score_order_would_invent() -> None:
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    complete = {("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")}
    assert not missing_merges(vocab, complete)
    assert missing_merges(vocab, complete - {("a", "bc")})


def test_a_token_of_a_megabyte_is_refused_at_once():
    with pytest.raises(CheckpointError, match="a token of 1,000,000 characters"):
        missing_merges({"x" * 1_000_000: 0}, set())


def test_rows_without_a_token_are_padding(exported: Exports) -> None:
    opened = Checkpoint.open(exported.checkpoint("demo"))
    config = DecoderConfig.from_hf(opened.config, opened.generation_config)
    vocabulary = read_vocabulary(facts_from_child(opened.path), config)
    assert len(vocabulary.tokens) == len(vocabulary.types) == config.vocab_size == 2048
    assert vocabulary.tokens[2011:] == [f"[PAD{i}]" for i in range(2011, 2048)]
    assert set(vocabulary.types[2011:]) == {5}
    # <unk> <s> </s> <0x00>: </s> is not special, and llama.cpp makes it a control token.
    assert vocabulary.types[:4] == [3, 3, 3, 6]


def test_sentencepiece_model_alone(exported: Exports, tmp_path: Path) -> None:
    source = exported.checkpoint("llama")
    config = DecoderConfig.from_hf(Checkpoint.open(source).config)
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path)
    alone = read_vocabulary(facts_from_child(tmp_path), config)
    both = read_vocabulary(facts_from_child(source), config)
    assert (alone.tokens, alone.scores, alone.types) == (both.tokens, both.scores, both.types)


def test_whitespace_runs_as_tokens(exported: Exports, tmp_path: Path) -> None:
    # phi-1, 1.5 and 2 have runs of spaces and tabs as ordinary added tokens.
    source = tiny.make("phi", tmp_path / "model")
    made = json.loads((source / "tokenizer.json").read_text())
    runs = [" " * n for n in range(2, 20)] + ["\t" * n for n in range(2, 6)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    made["added_tokens"] += [
        {"id": 481 + i, "content": run, "normalized": True, **flags} for i, run in enumerate(runs)
    ]
    (source / "tokenizer.json").write_text(json.dumps(made))
    path = exported.write("gguf", source, {"type": "Q8_0"}).path
    runtime = open_runtime(path, context=64, threads=1)
    tokenizer = AutoTokenizer.from_pretrained(source)
    for text in ("def f():\n    return  1\n\t\tx", "a" + " " * 45 + "b", " \t\t  x", " \n  \n   y"):
        assert gguf_oracle.tokenize(runtime, text) == tokenizer(text)["input_ids"], text


def test_missing_and_damaged(exported: Exports, tmp_path: Path) -> None:
    config = exported.config("llama")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        read_vocabulary(facts_from_child(tmp_path), config)


def test_duplicates_take_no_square_of_the_vocabulary() -> None:
    # Of two rows with one text, the text is the one that Hugging Face gives it.
    words = {f"word{i}": i for i in range(60_000)} | {"<x>": 60_001}
    tokens, types = token_table(words, {60_001: {"content": "<x>"}}, {}, "gpt2", 60_002)
    assert tokens[60_000:] == ["[PAD60000]", "<x>"]
    assert types[60_000:] == [5, 4]


def test_padding_is_never_the_text_of_a_token() -> None:
    tokens, _ = token_table({"[PAD1]": 0, "[PAD2]_": 3}, {}, {}, "gpt2", 4)
    assert tokens == ["[PAD1]", "[PAD1]_", "[PAD2]", "[PAD2]_"]
