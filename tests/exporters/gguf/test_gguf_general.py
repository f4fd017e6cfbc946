"""``general.*`` as llama.cpp's converter writes it for the same folder, and no word of a bug."""

from __future__ import annotations

import ctypes as c
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from exported import Exports
from writing import plan_for, write

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import DecoderConfig
from compress.demo import model_path
from compress.plan.weights import Weights
from compress.solvers import rtn
from exporters.gguf import runtime
from exporters.gguf.tokenizer import CONTROL_BY_TEXT

WARNING = 3  # ggml_log_level
OWN = ("name", "quantized_by", "architecture", "type", "file_type", "quantization_version")

CARDS = {
    "none": "",
    "without a head": "# A model\n",
    "phi": "---\nlicense: mit\nlicense_link: https://huggingface.co/x/y/LICENSE\nlanguage:\n- en\n"
    "- no\npipeline_tag: text-generation\ntags:\n- nlp\n- code\n---\n\n# Card\n",
    "a finetune": "---\nbase_model: meta-llama/Llama-3.2-1B-Instruct\nlicense: other\n"
    "license_name: llama3.2\ndatasets: [org/some-data]\nmodel_creator: someone\n---\n",
    "a merge": "---\nbase_model:\n- a/First-7B-v0.1\n- https://huggingface.co/b/Second-7B\n"
    "license: [mit, apache-2.0]\ntags: single\n---\n",
    "empty": "---\ntags: []\nlicense: ''\n---\n",
}


def fields(path: Path) -> dict[str, Any]:
    found = {
        name: field.contents()
        for name, field in gguf.GGUFReader(path).fields.items()
        if name.startswith("general.")
    }
    return {name: value for name, value in found.items() if name.partition(".")[2] not in OWN}


def converted(folder: Path, parameters: int, path: Path) -> dict[str, Any]:
    """As ``prepare_metadata`` and ``set_gguf_meta_model`` of llama.cpp's converter."""
    writer = gguf.GGUFWriter(path, "llama")
    metadata = gguf.Metadata.load(None, folder, None, parameters)
    if metadata.size_label is None:
        metadata.size_label = gguf.size_label(parameters, 0, 0, 0)
    metadata.set_gguf_meta_model(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return fields(path)


def built(folder: Path, path: Path) -> Path:
    checkpoint = Checkpoint(folder)
    source = Stored(checkpoint, DecoderConfig.from_hf(checkpoint.config))
    plan = plan_for("gguf", source.config, {"type": "Q4_0"}, model_name=folder.name)
    path.mkdir()
    return write(plan, Weights(source, rtn), path).path


@pytest.fixture
def model(exported: Exports, tmp_path: Path) -> Path:
    folder = tmp_path / "Phi-tiny-1.5-4k-instruct"
    shutil.copytree(exported.checkpoint("llama"), folder)
    return folder


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS.keys())
@pytest.mark.parametrize("name", [None, "some-org/Llama-3-8B-Chat"])
def test_keys_are_those_of_the_converter(model, tmp_path, card, name):
    if card:
        (model / "README.md").write_text(card)
    config = json.loads((model / "config.json").read_text()) | {"_name_or_path": name}
    (model / "config.json").write_text(json.dumps(config))
    (model / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 1, "top_k": 20}')
    parameters = DecoderConfig.from_hf(config).num_parameters
    found = fields(built(model, tmp_path / "out"))
    assert found == converted(model, parameters, tmp_path / "converted.gguf")
    assert found["general.finetune"] and found["general.sampling.top_k"] == 20
    if "license: mit" in card:
        assert found["general.license"] == "mit"
        assert found["general.tags"] == ["nlp", "code", "text-generation"]
        assert found["general.languages"] == ["en", "no"]
    if "Instruct" in card:
        assert found["general.base_model.0.repo_url"].endswith("/Llama-3.2-1B-Instruct")


@pytest.mark.parametrize(
    "head",
    [
        "license: {a: b}\ntags: [{a: 1}]\nbase_model: {x: [1]}\nlanguage: [[en]]",
        "license: [1, 2]\nversion: 2.0\nname: [a]\nbase_model: [null, 3]\n1: 2",
        f"license: {'x' * 5000}\ntags: [{', '.join(['a'] * 5000)}]",
        'license: "\\x1b[31mred\\ud800"\nlicense_link: "a\\nb"',
        "license: [unclosed",
        "a: &a [x]\nlicense: *a",
    ],
)
def test_a_hostile_card_leaves_no_trace(model, tmp_path, head):
    before = fields(built(model, tmp_path / "before"))
    (model / "README.md").write_text(f"---\n{head}\n---\n")
    assert fields(built(model, tmp_path / "after")) == before


def warnings_of(path: Path) -> list[str]:
    """What llama.cpp complains of while it loads a file."""
    functions = runtime.load_library().functions
    lines: list[str] = []

    @runtime._LOG_CALLBACK
    def keep(level: int, text: bytes, _data: object) -> None:
        if level >= WARNING:
            lines.append(text.decode("utf-8", "replace"))

    functions.llama_log_set(keep, None)
    try:
        model = functions.llama_model_load_from_file(
            str(path).encode(), functions.llama_model_default_params()
        )
        assert model
        functions.llama_model_free(c.c_void_p(model))
    finally:
        functions.llama_log_set(runtime.load_library()._log, None)
    return lines


def test_llama_cpp_calls_nothing_of_a_phi3_a_bug(tmp_path):
    """Its ``</s>`` is not special, and llama.cpp takes it for a control token all the same."""
    path = built(model_path(), tmp_path / "out")
    assert not [line for line in warnings_of(path) if "bug" in line]
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.token_type"].contents()[2] == 3


@pytest.mark.parametrize("text", sorted(CONTROL_BY_TEXT))
def test_tokens_are_control_tokens_where_llama_cpp_makes_them_so(model, tmp_path, text):
    document = json.loads((model / "tokenizer.json").read_text())
    rows = document["added_tokens"]
    if any(row["content"] == text for row in rows):
        pytest.skip("it is there already")
    number = max(max(row["id"] for row in rows), *document["model"]["vocab"].values()) + 1
    rows.append(rows[0] | {"id": number, "content": text, "special": False})
    (model / "tokenizer.json").write_text(json.dumps(document))
    path = built(model, tmp_path / "out")
    assert not [line for line in warnings_of(path) if "bug" in line]
