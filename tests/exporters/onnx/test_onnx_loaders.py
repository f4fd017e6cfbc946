"""One folder, three runtimes: onnxruntime, Optimum and ORT GenAI give the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import Exported, Exports, greedy
from transformers import AutoTokenizer

from exporters.onnx.runtime import OnnxRuntime

COUNT = 16


def open_runtime(made: Exported) -> OnnxRuntime:
    return OnnxRuntime(made.path, context=made.config.max_context, threads=1)


def with_optimum(folder: Path, prompt: list[int]) -> list[int]:
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([prompt])
    generated = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=COUNT,
        do_sample=False,
        eos_token_id=None,
    )
    tokens: list[int] = generated[0].tolist()[len(prompt) :]
    return tokens


def with_genai(folder: Path, prompt: list[int]) -> list[int]:
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    length = len(prompt) + COUNT
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], np.int32))
    tokens = []
    while len(tokens) < COUNT:
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


# At accuracy_level 0, where a near-tie of two random logits cannot turn on a rounding to int8.
@pytest.mark.parametrize(
    "family",
    ["llama", "llama3", "mistral", "phi3-window", "phi3-longrope", "phi", "qwen2", "mobilellm"],
)
def test_same_tokens_in_every_runtime(exported: Exports, family: str) -> None:
    case = exported("onnx", family, accuracy_level=0, symmetric=family != "llama")
    prompt = case.tokens(9)
    ours = greedy(open_runtime(case), prompt, COUNT)
    assert with_optimum(case.path, prompt) == ours
    assert with_genai(case.path, prompt) == ours


# optimum-onnx 0.1.0 reads the shape of their cache wrongly, which the plan's notes say.
@pytest.mark.parametrize("family", ["phi4-mini", "qwen3"])
def test_same_tokens_in_genai(exported: Exports, family: str) -> None:
    case = exported("onnx", family, accuracy_level=0)
    assert "optimum" in " ".join(case.plan.notes)
    prompt = case.tokens(9)
    assert with_genai(case.path, prompt) == greedy(open_runtime(case), prompt, COUNT)


def test_same_tokens_with_the_default_settings(exported: Exports) -> None:
    for settings in ({}, {"bits": 8}):
        case = exported("onnx", "phi3", **settings)
        prompt = case.tokens(9)
        ours = greedy(open_runtime(case), prompt, COUNT)
        assert with_optimum(case.path, prompt) == ours
        assert with_genai(case.path, prompt) == ours


def read(case: Exported, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((case.path / name).read_text())
    return value


def test_configs(exported: Exports) -> None:
    case = exported("onnx", "phi3")
    files = {file.name for file in case.path.iterdir()}
    assert files >= {"config.json", "generation_config.json", "genai_config.json", "onnx"}
    assert files >= {"tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in (case.path / "onnx").iterdir()} == {
        "model_q4.onnx",
        "model_q4.onnx_data",
    }
    config = read(case, "config.json")
    assert config["architectures"] == ["Phi3ForCausalLM"]
    assert config["transformers.js_config"] == {
        "dtype": "q4",
        "kv_cache_dtype": {"q4": "float32"},
        "use_external_data_format": {"model_q4.onnx": 1},
    }
    genai = read(case, "genai_config.json")
    assert genai["model"]["type"] == "phi3"
    assert genai["model"]["context_length"] == genai["search"]["max_length"] == 256
    assert genai["model"]["decoder"]["filename"] == "onnx/model_q4.onnx"
    stops = list(case.config.eos_token_ids)
    assert len(stops) == 3
    assert genai["model"]["eos_token_id"] == stops
    assert read(case, "generation_config.json")["eos_token_id"] == stops


def test_eight_bits_have_the_suffix_of_their_dtype(exported: Exports) -> None:
    case = exported("onnx", "llama", bits=8)
    assert (case.path / "onnx/model_int8.onnx_data").exists()
    config = read(case, "config.json")["transformers.js_config"]
    assert config["dtype"] == "int8"
    assert config["use_external_data_format"] == {"model_int8.onnx": 1}


def test_mobilellm_travels_as_a_llama(exported: Exports) -> None:
    case = exported("onnx", "mobilellm", {"layer_sharing": True})
    config = read(case, "config.json")
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["num_hidden_layers"] == 4
    assert not {"auto_map", "share_embedding", "layer_sharing"} & set(config)


@pytest.mark.parametrize("family", ["phi3", "qwen2", "mobilellm"])
def test_tokenizers_agree(exported: Exports, family: str) -> None:
    import onnxruntime_genai as genai

    case = exported("onnx", family)
    original = AutoTokenizer.from_pretrained(case.checkpoint.path)
    copied = AutoTokenizer.from_pretrained(case.path)
    native = genai.Tokenizer(genai.Model(str(case.path)))
    for text in ("The river goes down to the sea.", "for i in range(10):\n    print(i)\n"):
        ids = original.encode(text)
        assert copied.encode(text) == ids
        # GenAI leaves the BOS to the chat template.
        assert native.encode(text).tolist() == original.encode(text, add_special_tokens=False)
    assert (case.path / "tokenizer.json").exists()


def test_without_a_tokenizer(exported: Exports) -> None:
    case = exported("onnx", "phi", {"tokenizer": False})
    assert not (case.path / "tokenizer.json").exists()
    assert len(greedy(open_runtime(case), [3, 4], 2)) == 2
