"""The bundled demo checkpoint is complete, small, and as good as its card says."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from compress.demo import heldout_path, model_path

FIGURES = json.loads(
    (Path(__file__).resolve().parents[2] / "benchmarks" / "demo_training.json").read_text(
        encoding="utf-8"
    )
)
CONTEXT = 512
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi there"}]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def windows(tokenizer):
    """[windows, 512]: consecutive pieces of 511 held-out tokens, each after <s> (see the card)."""
    text = heldout_path().read_text(encoding="utf-8")
    ids = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    ids = ids[: len(ids) // (CONTEXT - 1) * (CONTEXT - 1)].reshape(-1, CONTEXT - 1)
    return np.pad(ids, ((0, 0), (1, 0)), constant_values=tokenizer.bos_token_id)


@pytest.fixture(scope="module")
def perplexity(windows):
    """Float32 perplexity of the first windows, and the loading report of the checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(
        model_path(), dtype=torch.float32, output_loading_info=True
    )
    assert (
        not loading["missing_keys"]
        and not loading["unexpected_keys"]
        and not loading["mismatched_keys"]
    )
    batch = torch.from_numpy(windows[: FIGURES["subset_windows"]])
    with torch.inference_mode():
        logits = model.eval()(batch).logits[:, :-1]
        return (
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            .exp()
            .item()
        )


def unigram_perplexity(tokens):
    counts = np.array(FIGURES["unigram_counts"], dtype=np.float64) + 1
    return np.exp(-np.log(counts / counts.sum())[tokens].mean())


def test_files_are_complete_and_small():
    expected = {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert expected <= {path.name for path in model_path().iterdir()}
    assert (
        (model_path() / "model.safetensors").stat().st_size
        == FIGURES["weights_bytes"]
        <= 16 * 2**20
    )
    assert 100_000 <= heldout_path().stat().st_size == FIGURES["heldout_bytes"] <= 250_000
    assert (model_path() / "LICENSE-PYTHON.txt").exists()


def test_no_path_of_the_training_machine_is_shipped():
    for path in model_path().iterdir():
        assert not re.search(rb"/(root|home|tmp|work|Users)/", path.read_bytes()), path.name


def test_config_is_a_small_phi3():
    config = json.loads((model_path() / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Phi3ForCausalLM"] and config["model_type"] == "phi3"
    assert config["hidden_size"] % 256 == 0 and config["intermediate_size"] % 256 == 0
    assert (
        config["vocab_size"] == 2048
        and not config["tie_word_embeddings"]
        and config["sliding_window"] is None
    )
    assert (
        config["max_position_embeddings"] == config["original_max_position_embeddings"] == CONTEXT
    )
    assert "auto_map" not in config


@pytest.mark.parametrize(
    "text",
    [
        "Hello world",
        "  def f(x):\n\n\treturn x\n",
        "naïve 漢字 🙂 = 1234.5",
        " trailing ",
        "a\n    b  \n",
    ],
)
def test_tokenizers_agree_and_round_trip(tokenizer, text):
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_path() / "tokenizer.model"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == pieces.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer(text)["input_ids"] == [1, *ids]


def test_heldout_text_round_trips(tokenizer):
    text = heldout_path().read_text(encoding="utf-8")
    assert (
        tokenizer.decode(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        == text
    )


def test_chat_uses_phi3_tokens(tokenizer):
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|system|>\nBe brief.<|end|>\n<|user|>\nHi there<|end|>\n<|assistant|>\n"
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    assert [i for i in ids if i >= 2000] == [2006, 2007, 2010, 2007, 2001]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        1,
        2000,
        2000,
    )
    generation = json.loads((model_path() / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == [2000, 2001, 2007]


def test_perplexity_is_the_stated_one(windows, perplexity):
    assert len(windows) == FIGURES["heldout_windows"]
    assert perplexity == pytest.approx(FIGURES["subset_perplexity"], rel=0.01)
    card = (model_path() / "README.md").read_text(encoding="utf-8")
    assert f"**{FIGURES['perplexity']:.3f}**" in card


def test_model_is_at_least_five_times_better_than_a_unigram(windows, perplexity):
    assert sum(FIGURES["unigram_counts"]) == FIGURES["training_set_tokens"]
    assert unigram_perplexity(windows[:, 1:]) == pytest.approx(
        FIGURES["unigram_perplexity"], rel=1e-3
    )
    assert FIGURES["unigram_perplexity"] >= 5 * FIGURES["perplexity"]
    assert unigram_perplexity(windows[: FIGURES["subset_windows"], 1:]) >= 5 * perplexity
