"""The gate ``tokenizer_agreement``: an artifact that tokenizes differently from its checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from commands import packlight

from compress.report.report import TokenizerDifference
from compress.report.words import tokenizes_otherwise
from compress.verify.agreement import compare, encode_all


def test_a_text_differs_with_or_without_what_stands_around_it():
    texts = ["one", "two", "three"]
    expected = encode_all(lambda text, special: [1] * special + [len(text)], texts)
    assert expected == [[3], [1, 3], [3], [1, 3], [5], [1, 5]]
    assert compare(texts, expected, expected).share == 1
    found = [list(ids) for ids in expected]
    found[3], found[5] = [1, 9], [5]
    agreement = compare(texts, expected, found)
    assert (agreement.texts, agreement.differing, agreement.share) == (3, 2, pytest.approx(1 / 3))
    first = agreement.first
    assert (first.text, first.add_special) == ("two", True)
    assert (first.expected, first.found) == ((1, 3), (1, 9))


def test_the_difference_in_words():
    ids = list(range(100, 120))
    others = [*ids[:10], 7, 8, *ids[11:]]
    difference = TokenizerDifference(
        text="a\nb", add_special=True, expected=ids, found=others, texts=40, differing=3
    )
    assert tokenizes_otherwise(difference) == (
        "3 of 40 texts have other token ids, first 'a\\nb' with BOS and EOS: "
        "[…, 108, 109, 7, 8, 111, 112, 113, 114, …], and "
        "[…, 108, 109, 110, 111, 112, 113, 114, 115, …] by Hugging Face"
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a token that llama.cpp finds where Hugging Face does not."""
    folder = tiny.make("qwen2", tmp_path_factory.mktemp("agreement") / "m")
    document = json.loads((folder / "tokenizer.json").read_text())
    last = document["added_tokens"][-1]
    word = {"content": "<word>", "id": last["id"] + 1, "single_word": True, "special": False}
    document["added_tokens"].append(last | word)
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder


SHORT = ("--windows", "2", "--sequence-length", "64")
QUICK = (
    "-r", "int4-fast", "--set", "verify.windows=2", "--set", "verify.sequence_length=64",
    "--gate", "perplexity_ratio=<=9", "--gate", "kl_divergence=<=9", "--gate", "top1_agreement=>=0",
)  # fmt: skip


def test_a_difference_fails_the_gate_of_a_build_and_of_verify(model, tmp_path):
    done = packlight("build", model, "-f", "gguf", "-f", "onnx", *QUICK, "-o", "out", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "gguf: tokenizer_agreement is 0.9" in done.stderr
    assert "texts have other token ids, first 'a <word> b<word>c" in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    ours, beside = report["artifacts"]
    assert 0.9 < ours["tokenizer_agreement"] < 1
    assert ours["tokenizer_difference"]["differing"] == 1
    gate = next(gate for gate in ours["gates"] if gate["name"] == "tokenizer_agreement")
    assert gate["limit"] == ">=1" and not gate["passed"]
    # The files beside the graph are Hugging Face's own.
    assert beside["tokenizer_agreement"] == 1 and beside["tokenizer_difference"] is None
    assert "other token ids" in (tmp_path / "out" / "report.html").read_text()
    assert "other token ids" in (tmp_path / "out" / "README.md").read_text()

    verify = ("verify", "out/gguf", "--baseline", model, *SHORT)
    done = packlight(*verify, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "texts have other token ids" in done.stderr
    done = packlight(*verify, "--gate", "tokenizer_agreement=>=0.9", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_without_verification_nothing_is_compared(model, tmp_path):
    done = packlight("build", model, "-f", "gguf", *QUICK, "--no-verify", "-o", "o", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "o" / "report.json").read_text())["artifacts"]
    assert found["tokenizer_agreement"] is None and found["gates"] == []
    assert any("single_word" in note for note in found["notes"])


def test_a_tokenizer_beside_the_graph_that_is_another(model, tmp_path):
    done = packlight("build", model, "-f", "onnx", *QUICK, "--no-verify", "-o", "o", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    other = tiny.make("llama", tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(other / name, tmp_path / "o" / "onnx")
    done = packlight("verify", "o/onnx", "--baseline", model, *SHORT, cwd=tmp_path)
    assert done.returncode == 1 and "onnx: tokenizer_agreement is 0" in done.stderr
