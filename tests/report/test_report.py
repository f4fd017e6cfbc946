"""compress.report.report: the document, its schema, NaN, and the verdict."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sample_report
from jsonschema import Draft202012Validator

from compress.decoder.config import DecoderConfig
from compress.errors import ArtifactError
from compress.plan.shapes import Artifact, Plan, PlanEntry
from compress.report import describe, report
from compress.report.ci import markdown_summary
from compress.report.pages import model_card, render
from compress.verify.gates import METRICS, find, parse
from compress.verify.quality import Estimate


def check(document: dict[str, Any]) -> None:
    Draft202012Validator(sample_report.schema()).validate(document)
    text = json.dumps(document, allow_nan=False)
    assert json.loads(text) == document


def one_artifact(**changes: Any) -> report.ArtifactReport:
    """A small artifact by hand; ``changes`` go into its quality."""
    entries = (
        PlanEntry("embed_tokens.weight", "e", "Q4_0", (64, 32), 1152),
        PlanEntry("blocks.1.q_proj.weight", "q", "Q4_0", (32, 32), 576, "as asked"),
        PlanEntry("blocks.1.q_proj.bias", "qb", "F32", (32,), 128),
    )
    plan = Plan("gguf", "Q4_0", "m", entries, notes=("a", "b"))
    path = Path("out/gguf/m-Q4_0.gguf")
    artifact = Artifact("gguf", "Q4_0", path, 2000, 1856, 64, plan, notes=("b", "c"))
    found = sample_report.simulated(1, 0.03, 1e8, 10.0, "llama.cpp")
    found = replace(found, quality=replace(found.quality, **changes))
    return describe.describe_artifact(
        artifact, found, 4000, 100, parse({"perplexity_ratio": "<=9"}), Path("out"), None
    )


@pytest.mark.parametrize("verified", [True, False])
def test_a_report_obeys_its_schema(verified: bool) -> None:
    Draft202012Validator.check_schema(sample_report.schema())
    check(sample_report.make(verified=verified).to_dict())


def test_the_schema_can_say_no() -> None:
    validator = Draft202012Validator(sample_report.schema())
    for path, value in (
        (("verdict",), "perhaps"),
        (("artifacts", 0, "bytes"), 1.5),
        (("artifacts", 0, "path"), "/home/someone/model.gguf"),
        (("artifacts", 0, "extra"), 1),
        (("artifacts", 0, "kl_divergence", "mean"), "0.1"),
        (("schema_version",), 2),
    ):
        document: Any = sample_report.make().to_dict()
        node = document
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        assert list(validator.iter_errors(document)), path


def test_figures_by_hand() -> None:
    found = one_artifact(
        perplexity=Estimate(5.25, 0.5), perplexity_ratio=Estimate(1.0500000049, None)
    )
    assert found.path == "gguf/m-Q4_0.gguf"
    assert found.bits_per_weight == 2000 * 8 / 4000
    assert found.kv_cache_bytes == 6400
    assert (found.perplexity, found.perplexity_se) == (5.25, 0.5)
    assert (found.perplexity_ratio, found.perplexity_ratio_se) == (1.05, None)
    assert found.notes == ["a", "b", "c"]
    assert found.tensors[0].model_dump() == {
        "name": "embed_tokens.weight",
        "block": None,
        "role": "embed_tokens",
        "grid": "Q4_0",
        "shape": [64, 32],
        "bytes": 1152,
        "bits_per_weight": 4.5,
        "note": "",
    }
    assert [tensor.role for tensor in found.tensors[1:]] == ["q_proj", "q_proj.bias"]
    assert found.tensors[1].block == 1


def test_an_artifact_alone_has_its_name_for_a_path() -> None:
    plan = Plan("onnx", "int4-g32", "m", ())
    artifact = Artifact("onnx", "int4-g32", Path("some/onnx"), 9, 9, 9, plan)
    found = describe.describe_artifact(artifact, None, 4, 1, [], Path("some/onnx"), None)
    assert found.path == "onnx"


def test_every_gate_metric_is_in_the_report() -> None:
    artifact = sample_report.make().artifacts[0].model_copy(update={"tokenizer_agreement": 1.0})
    assert all(find(artifact, name) is not None for name in METRICS)
    flat = {key for key, value in artifact if type(value) in (int, float)}
    flat -= {"kv_cache_bytes", "max_context", "nonfinite_tokens", "startup_memory_bytes"}
    flat -= {"prefill_tokens", "decode_tokens"} | {key for key in flat if key.endswith("_se")}
    assert flat <= METRICS.keys()


def test_what_is_not_finite_becomes_null_and_fails() -> None:
    found = one_artifact(
        perplexity=Estimate(math.inf, None),
        perplexity_ratio=Estimate(math.nan, None),
        kl_max=math.inf,
        nonfinite_tokens=7,
    )
    assert found.perplexity is None and found.kl_divergence.max is None
    assert [gate.model_dump() for gate in found.gates] == [
        {"name": "perplexity_ratio", "limit": "<=9", "value": None, "passed": False}
    ]
    assert report.verdict([found]) == "failed"
    assert (
        report.verdict([found.model_copy(update={"gates": []})]) == "failed"
    )  # even without a gate


def test_verdicts() -> None:
    passing = {"kl_divergence": "<=0.2"}
    assert sample_report.make(gates=passing).verdict == "passed"
    assert sample_report.make(gates={}).verdict == "passed"
    assert sample_report.make(gates={"kl_divergence": "<=0.05"}).verdict == "failed"
    assert sample_report.make(gates=passing, verified=False).verdict == "not verified"
    assert report.verdict([]) == "not verified"


def test_an_evaluator_is_told_from_a_device() -> None:
    gguf, _, coreml = sample_report.make().artifacts
    assert gguf.notes == []
    assert coreml.notes == [
        "Run by the MIL evaluator (packlight 0.1.0), not by the device's own runtime: quality is "
        "the file's, speed and memory are not a device's."
    ]


def test_gates_are_judged_on_what_is_printed() -> None:
    found = one_artifact(perplexity_ratio=Estimate(9.00000000001, None))
    assert found.perplexity_ratio == 9.0
    assert found.gates[0].passed


def test_rounding() -> None:
    given = (1, 2.123456789, math.nan, True, None, -math.inf, 1932735283.0, 0.1 + 0.2)
    found = [report.rounded(value) for value in given]
    assert found == [1, 2.123457, None, True, None, None, 1932735283, 0.3]
    assert type(found[-2]) is int


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = sample_report.make()
    made.save(tmp_path / "report.json")
    read = report.Report.load(tmp_path / "report.json")
    assert read == made and read.to_dict() == made.to_dict()
    read.save(tmp_path / "again.json")
    again = (tmp_path / "again.json").read_bytes()
    assert again == (tmp_path / "report.json").read_bytes()
    assert json.loads(again) == made.to_dict()


def test_a_report_for_programs() -> None:
    made = sample_report.make()
    assert not made.passed and sample_report.make(gates={}).passed
    divergence = made["gguf"].kl_divergence
    assert divergence is not None and divergence.mean == pytest.approx(0.031, rel=0.1)
    assert made["coreml"].type == "lut4-g8"
    with pytest.raises(KeyError, match="no tflite in this report, only gguf, onnx, coreml"):
        made["tflite"]
    assert len(repr(made)) < 150 and "SmolThinker" in repr(made)
    assert len(repr(made["gguf"])) < 80


def test_a_report_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    document = sample_report.make().to_dict()
    del document["machine"], document["artifacts"][0]["tasks"]
    document["artifacts"][0]["bits_of_luck"] = 3
    read = report.Report.from_dict(document)
    assert read["gguf"].tasks == [] and "bits_of_luck" not in read["gguf"].model_dump()
    del document["model"]
    with pytest.raises(ArtifactError, match="not a report of packlight: 'model' is a required"):
        report.Report.from_dict(document, "last.json")


def test_model_facts() -> None:
    config = DecoderConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 100,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        }
    )
    facts = describe.model_facts(config, "acme/tiny", license="mit")
    linears = 32 * 32 * 2 + 2 * 16 * 32 + 3 * 32 * 64
    assert facts.parameters == 2 * 100 * 32 + 2 * (linears + 2 * 32) + 32
    assert (facts.name, facts.source, facts.license) == ("tiny", "acme/tiny", "mit")


@pytest.mark.parametrize("name", ["block_0_q_proj_weight", "blk.0.attn_q.weight"])
def test_a_tensor_that_was_read_back_keeps_its_name(name):
    found = describe.describe_tensor(PlanEntry("", name, "int4-g32", (64, 32), 1152))
    assert (found.name, found.block, found.role) == (name, None, name)
    assert found.bits_per_weight == 4.5


def test_pages_and_summaries_show_every_character_of_a_name() -> None:
    made = sample_report.make(
        name="a\x1b[31m\u202eb", command="x \x9b \u202e", notes=("\u2066\x07 note",)
    )
    made.artifacts[0].tensors[0].name = "\x1b]0;\u202etensor"
    for text in (render(made), model_card(made), markdown_summary(made)):
        assert all(char.isprintable() or char == "\n" for char in text)
