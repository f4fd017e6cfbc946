"""What a failed gate suggests, and that the suggestions are commands that exist."""

from __future__ import annotations

import re

import pytest
import sample_report

from compress.console import Console, format_table
from compress.recipe import Recipe
from compress.report.advice import what_to_try
from compress.report.report import GateReport, Report
from compress.report.words import HEADERS, finish, judged, table_row


def failing(name: str, limit: str = "<=0.001", *, solver: str = "gptq", **facts: str) -> Report:
    report = sample_report.make(artifacts=2, gates={}, **facts)
    report.recipe["quantize"]["solver"] = solver
    report.artifacts[1].gates = [GateReport(name=name, limit=limit, value=1.0, passed=False)]
    report.verdict = "failed"
    return report


def test_rounding_is_followed_by_calibration():
    (line,) = what_to_try(failing("kl_divergence", solver="rtn"))
    assert "-r phone-4bit" in line
    for recipe in (Recipe.load("phone-4bit"), Recipe.load("int4-fast", [setting(line)])):
        assert recipe.solver == "gptq"


def setting(line: str) -> str:
    """The value of --set in a hint."""
    found = re.search(r"--set (\S+)", line)
    assert found, line
    return found[1]


def test_calibration_is_followed_by_an_embedding_of_eight_bits_and_then_by_bytes():
    report = failing("regression: kl_divergence")
    (line,) = what_to_try(report)
    assert Recipe.load("phone-4bit", [setting(line)]).targets["onnx"]["embedding_bits"] == 8
    for tensor in report.artifacts[1].tensors:
        if tensor.role == "embed_tokens":
            tensor.bits_per_weight = 8.5
    (line,) = what_to_try(report)
    size = re.fullmatch(r"more bytes: -f onnx --budget (\S+)", line)
    assert size and Recipe.load("phone-4bit", [f"budget.weights={size[1]}"]).budget_bytes
    assert Recipe.load("phone-4bit", [f"budget.weights={size[1]}"]).budget_bytes > (
        report.artifacts[1].bytes
    )
    # A GGUF's type has no setting for the embedding.
    report.artifacts[0].gates, report.artifacts[1].gates = report.artifacts[1].gates, []
    assert what_to_try(report)[0].startswith("more bytes: -f gguf --budget ")


@pytest.mark.parametrize(
    ("name", "limit", "says"),
    [
        ("bytes", "<=1.5MB", "--budget 1500000B "),
        ("bits_per_weight", "<=4", "--budget SIZE"),
        ("peak_memory_bytes", "<=1GB", "--context N"),
        ("kv_cache_bytes_per_token", "<=1", "--prune heads"),
        ("decode_tokens_per_second", ">=1000", "--threads"),
    ],
)
def test_other_gates_are_answered_by_what_moves_them(name, limit, says):
    (line,) = what_to_try(failing(name, limit))
    assert says in line


def test_what_no_setting_changes_has_no_hint():
    assert what_to_try(failing("tokenizer_agreement", ">=1")) == []
    assert what_to_try(sample_report.make(gates={"kl_divergence": "<=9"})) == []


def test_hints_come_after_the_verdict_and_each_once(capsys):
    report = failing("kl_divergence", solver="rtn")
    report.artifacts[0].gates = report.artifacts[1].gates
    assert finish(report, None, Console()) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].startswith("FAILED") and lines[-1].startswith("hint: calibrated codes: ")


def test_a_verification_names_no_recipe():
    report = failing("kl_divergence", command="")
    assert judged(report) == "1 gate of SmolThinker-1.1B"
    assert judged(failing("kl_divergence")) == "phone-4bit"
    assert "a calibrated recipe (-r phone-4bit)" in what_to_try(report)[0]


def test_notes_of_the_build_are_printed_unless_they_were_warnings(capsys):
    console = Console()
    console.warning("told")
    finish(sample_report.make(notes=("told", "not yet")), None, console)
    said = capsys.readouterr()
    assert "note: not yet" in said.out and "note: told" not in said.out


def test_the_table_fits_80_columns():
    report = sample_report.make()
    for artifact, kind in zip(
        report.artifacts, ("mix-4.04bpw", "int4-g128", "lut4-g16"), strict=True
    ):
        artifact.type, artifact.perplexity, artifact.perplexity_ratio = kind, 1234.567, 1.1234
        artifact.bytes, artifact.peak_memory_bytes = 740_481_234, 10_456_000_000
        artifact.decode_tokens_per_second = 12345.6
    rows = [table_row(artifact) for artifact in report.artifacts]
    lines = format_table(HEADERS, rows).splitlines()
    assert len(lines) == 4
    assert max(map(len, lines)) <= 80, lines
    assert rows[0][2] == "740 MB" and rows[0][4] == "1,235 +12.3%"
