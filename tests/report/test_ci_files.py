"""JUnit XML and the Markdown summary: their structure, and agreement with the report."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import sample_report
import tiny
from commands import packlight, refused

from compress.errors import UsageError
from compress.report.ci import ANSWERS, CiFiles, junit_xml, markdown_summary
from compress.report.words import HEADERS, table_row

# junit-10.xsd of Jenkins' xunit plugin: element → children, attributes that must and that may be.
# (The rerun and flaky elements, which only Surefire writes, are left out.)
TEXT = (set(), set(), {"type", "message"})
SCHEMA: dict[str, tuple[set[str], set[str], set[str]]] = {
    "testsuites": ({"testsuite"}, set(), {"name", "time", "tests", "failures", "errors"}),
    "testsuite": (
        {"testsuite", "properties", "testcase", "system-out", "system-err"},
        {"name", "tests", "failures", "errors"},
        {"group", "time", "skipped", "timestamp", "hostname", "id", "package", "file", "log"},
    ),
    "properties": ({"property"}, set(), set()),
    "property": (set(), {"name", "value"}, set()),
    "testcase": (
        {"skipped", "error", "failure", "system-out", "system-err"},
        {"name"},
        {"time", "classname", "group"},
    ),
    "failure": TEXT,
    "error": TEXT,
    "skipped": TEXT,
}


def parse(text: bytes) -> ET.Element:
    """A document that the schema accepts, with totals that add up."""
    root = ET.fromstring(text)
    assert root.tag == "testsuites"
    for element in root.iter():
        children, needed, optional = SCHEMA[element.tag]
        assert {child.tag for child in element} <= children
        assert needed <= set(element.attrib) <= needed | optional
        if element.tag not in ("failure", "skipped"):
            assert not (element.text or "").strip()
    for suite in root:
        cases = suite.findall("testcase")
        assert int(suite.attrib["tests"]) == len(cases)
        for key, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            assert int(suite.attrib[key]) == sum(case.find(tag) is not None for case in cases)
    for key in ("tests", "failures", "errors"):
        assert int(root.attrib[key]) == sum(int(suite.attrib[key]) for suite in root)
    return root


def test_junit_has_a_suite_per_artifact_and_a_case_per_gate():
    report = sample_report.make()
    root = parse(junit_xml({"SmolThinker-1.1B": report}))
    assert [suite.attrib["name"] for suite in root] == [
        "SmolThinker-1.1B GGUF Q4_K_M",
        "SmolThinker-1.1B ONNX int4-g32",
        "SmolThinker-1.1B Core ML lut4-g8",
    ]
    for suite, artifact in zip(root, report.artifacts, strict=True):
        names = [case.attrib["name"] for case in suite.findall("testcase")]
        gates = [f"{name} {limit}" for name, limit in sample_report.GATES.items()]
        assert names == [ANSWERS, *gates]
        for case, gate in zip(suite.findall("testcase")[1:], artifact.gates, strict=True):
            assert (case.find("failure") is None) == gate.passed
        facts = {p.attrib["name"]: p.attrib["value"] for p in suite.iter("property")}
        assert int(facts["bytes"]) == artifact.bytes
        assert int(facts["peak_memory_bytes"]) == artifact.peak_memory_bytes
        assert float(facts["kl_divergence"]) == artifact.kl_divergence.mean
        assert facts["recipe"] == "phone-4bit"


def test_a_failure_tells_the_measured_value_and_the_limit():
    report = sample_report.make()
    assert report.verdict == "failed"  # the third artifact's KL is above its gate
    kl = report.artifacts[2].kl_divergence.mean
    failures = [
        failure
        for failure in parse(junit_xml({"SmolThinker-1.1B": report})).iter("failure")
        if failure.attrib["message"].startswith("kl_divergence ")
    ]
    (failure,) = failures
    assert failure.attrib["message"] == f"kl_divergence is {kl:.4g}, the gate is <=0.06"
    assert failure.text == f"measured: {kl}\nlimit: <=0.06"


def test_what_was_not_run_is_skipped_and_what_is_not_a_number_fails():
    root = parse(junit_xml({"model": sample_report.make(verified=False)}))
    assert [len(suite.findall("testcase")) for suite in root] == [1, 1, 1]
    assert len(list(root.iter("skipped"))) == 3
    report = sample_report.make(gates={}, artifacts=1)
    report.artifacts[0].perplexity_ratio = None
    (failure,) = parse(junit_xml({"SmolThinker-1.1B": report})).iter("failure")
    assert failure.attrib["message"].endswith("its answers are not numbers")


def test_several_reports_make_one_document_and_the_same_one_again():
    reports = {"a/one": sample_report.make("a"), "a/two": sample_report.make("a", artifacts=1)}
    text = junit_xml(reports, {"b/one": "model.safetensors is truncated"})
    root = parse(text)
    assert [suite.attrib["name"].split()[0] for suite in root] == [*["a/one"] * 3, "a/two", "b/one"]
    assert root.attrib["errors"] == "1"
    (error,) = root.iter("error")
    assert error.attrib["message"] == "model.safetensors is truncated"
    assert text == junit_xml(reports, {"b/one": "model.safetensors is truncated"})


def test_hostile_names_stay_text():
    name = 'a<b>&"\x00\x1b[31m]]>\ud800| x'
    report = sample_report.make(artifacts=1)
    (suite,) = parse(junit_xml({name: report}))
    assert suite.attrib["name"] == 'a<b>&"��[31m]]>�| x GGUF Q4_K_M'
    report.model.name = "<script>|`$(x)`"
    heading = markdown_summary(report).splitlines()[0]
    assert heading.startswith("### packlight: \\<script\\>\\|\\`\\$(x)\\`, recipe")


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_summary_is_the_table_of_the_terminal():
    report = sample_report.make()
    text = markdown_summary(report)
    header, rule, *body = rows(text)
    assert header == list(HEADERS)
    assert rule == ["---", "---", *["---:"] * (len(HEADERS) - 2)]
    assert body == [table_row(artifact) for artifact in report.artifacts]
    assert "**failed**" in text
    kl = report.artifacts[2].kl_divergence.mean
    told = text.replace("\\", "")
    assert f"- Core ML lut4-g8: kl_divergence is {kl:.4g}, the gate is <=0.06" in told
    assert "not verified" in markdown_summary(sample_report.make(verified=False))
    assert "no gate was set" in markdown_summary(sample_report.make(gates={}))
    assert "**passed**" in markdown_summary(sample_report.make(gates={"bytes": "<1TB"}))


def test_places_that_cannot_be_written_are_refused_before_the_work(tmp_path):
    out = tmp_path / "out"
    CiFiles(tmp_path / "junit.xml", tmp_path / "summary.md").check(out)
    with pytest.raises(UsageError, match="inside the output"):
        CiFiles(junit=out / "junit.xml").check(out)
    with pytest.raises(UsageError, match="there is no folder"):
        CiFiles(summary=tmp_path / "no" / "summary.md").check(out)
    with pytest.raises(UsageError, match="is a folder"):
        CiFiles(junit=tmp_path).check(out)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


def test_build_and_verify_write_them_for_a_failed_gate_too(model, tmp_path):
    short = ["--set", "verify.windows=2", "--set", "verify.sequence_length=32"]
    arguments = ["-r", "int4-fast", "-f", "gguf", *short, "-o", "out", "-q"]
    files = ["--junit", "junit.xml", "--summary", "summary.md"]
    gate = ["--set", "verify.gates={kl_divergence: '<=0.000001'}"]
    refused(packlight("build", model, *arguments, "--junit", "out/junit.xml", cwd=tmp_path))
    (tmp_path / "summary.md").write_text("before\n")
    done = packlight("build", model, *arguments, *gate, *files, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    (suite,) = parse((tmp_path / "junit.xml").read_bytes())
    assert suite.attrib["failures"] == "1"
    text = (tmp_path / "summary.md").read_text()
    assert text.startswith("before\n### packlight: tiny-llama, recipe int4-fast\n")
    assert "**failed**" in text

    done = packlight(
        "verify", "out", "--baseline", model, "--windows", "2", "--sequence-length", "32",
        "--gate", "bytes<1GB", *files, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (suite,) = parse((tmp_path / "junit.xml").read_bytes())
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("3", "0")
    added = (tmp_path / "summary.md").read_text().removeprefix(text)
    assert "**passed**" in added
