"""Every row of the table of split patterns, with the published patterns, in llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from exported import Exports
from tokenizers import Regex, Tokenizer, decoders, models, trainers
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from compress.decoder.tokenizer_texts import TEXTS
from exporters.gguf.runtime import open_runtime
from exporters.gguf.splitting import (
    DEEPSEEK_LLM,
    DIGIT,
    FALCON,
    IGNORE_MERGES,
    LLAMA3,
    PATTERNS,
    escaped,
)

# What llama.cpp's own patterns do not do as the published ones: a vowel sign, and a small letter
# beside a capital with an accent, end a word; spaces outside ASCII are none.
CASES = {"naïve café, größere Wörter, ÅNGSTRÖM", "नमस्ते दुनिया สวัสดีชาวโลก"}
SPACES = {"\u00a0no-break\u2003em\u200bzero"}
OTHERWISE = {"gpt-4o": CASES, "tekken": CASES, "deepseek-coder": SPACES, "deepseek-llm": SPACES}


def tokenizer_of(patterns: tuple[str, ...], *, ignore_merges: bool) -> Any:
    """Byte-level BPE with these split patterns, whose merges cross all of them: a text that is
    split at another position has other ids."""
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    last = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = last
    core.decoder = decoders.ByteLevel()
    letters = pre.ByteLevel.alphabet()
    if patterns == DEEPSEEK_LLM:  # its numbers have no merges, and llama.cpp relies on that
        core.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), last])
    digits = [pre.Digits(individual_digits=False), pre.Split(Regex(FALCON[-1]), "isolated")]
    if patterns == FALCON:  # as its own: no merges across them
        core.pre_tokenizer = pre.Sequence([last, *digits])
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=letters, show_progress=False)
    core.train_from_iterator(TEXTS * 2, trainer)
    splits = [
        pre.Digits(individual_digits=True) if p == DIGIT else pre.Split(Regex(p), "isolated")
        for p in patterns
    ]
    core.pre_tokenizer = pre.Sequence([*splits, last])
    if patterns == FALCON:  # of tiiuae/falcon-7b
        words = pre.ByteLevel(add_prefix_space=False, use_regex=True)
        core.pre_tokenizer = pre.Sequence([pre.Punctuation("contiguous"), words, *digits])
    core.add_special_tokens(["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")


@pytest.mark.parametrize("patterns", list(PATTERNS), ids=list(PATTERNS.values()))
def test_a_row_is_llama_cpps_splitting(
    exported: Exports, tmp_path: Path, patterns: tuple[str, ...]
) -> None:
    name = PATTERNS[patterns]
    tokenizer = tokenizer_of(patterns, ignore_merges=name in IGNORE_MERGES)
    rows, sizes = len(tokenizer), {"hidden_size": 64, "intermediate_size": 64}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    folder = tiny.make("llama", tmp_path / "m", tokenizer=False, vocab_size=rows, **sizes, **heads)
    tokenizer.save_pretrained(folder)
    made = exported.write("gguf", folder, {"type": "Q8_0"}, folder=tmp_path)
    runtime = open_runtime(made.path, context=32, threads=1)
    assert runtime.tokenize
    differing = {
        text
        for text in TEXTS
        if runtime.tokenize(text, False) != tokenizer.encode(text, add_special_tokens=False)
    }
    assert differing == OTHERWISE.get(name, set())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lfm2", "falcon3"])
def test_names_of_llama_3s_splitting(
    exported: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Their converters write another name for the same pattern."""
    monkeypatch.setitem(PATTERNS, (LLAMA3,), name)
    monkeypatch.setitem(globals(), "IGNORE_MERGES", (name,))  # both imply it
    test_a_row_is_llama_cpps_splitting(exported, tmp_path, (LLAMA3,))


def test_line_ends_in_a_pattern_may_be_written_out_or_not() -> None:
    assert escaped("[\r\n]") == escaped(r"[\r\n]") == r"[\r\n]"
