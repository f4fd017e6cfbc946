"""Files for a CI job: JUnit XML of the gates, and a summary in Markdown.

GitLab, Jenkins and others show JUnit XML with the tests of the code. The elements and attributes
are those of ``junit-10.xsd`` of Jenkins' xunit plugin (https://github.com/jenkinsci/xunit-plugin),
the strictest dialect in use, which every reader of JUnit accepts. It has no times and no host name:
the same report gives the same bytes.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import visible
from compress.files import check_place
from compress.report.words import (
    HARNESS_HEADERS,
    HEADERS,
    TASK_HEADERS,
    failures,
    gate_failure,
    harness_rows,
    label,
    no_verdict,
    pipe_table,
    sentence,
    table_row,
    task_rows,
)
from compress.verify.gates import METRICS, find

if TYPE_CHECKING:
    from compress.report.report import ArtifactReport, GateReport, Report

__all__ = ["CiFiles", "junit_xml", "markdown_summary"]

ANSWERS = "answers are numbers"
"""The test case of every artifact: its runtime loads it, and its logits are finite."""

# Characters that XML 1.0 cannot hold, not even escaped (its production 2, Char).
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class CiFiles:
    """The files of ``--junit`` and ``--summary``; None where not given.

    Attributes:
        junit: is replaced.
        summary: is appended to, as CI systems expect for ``$GITHUB_STEP_SUMMARY``.
    """

    junit: Path | None = None
    summary: Path | None = None

    def check(self, output: Path | None = None) -> None:
        """Refuse paths that cannot be written (``compress.files.check_place``)."""
        if self.junit is not None:
            check_place("--junit", self.junit, output, begins=b"<")
        if self.summary is not None:
            check_place("--summary", self.summary, output)

    def write(self, report: Report) -> None:
        """Write the files for one report, whatever the verdict."""
        if self.junit or self.summary:
            self.write_all({report.model.name: report}, {}, markdown_summary(report))

    def write_all(
        self, reports: Mapping[str, Report], errors: Mapping[str, str], summary: str
    ) -> None:
        """Write the files for several builds.

        Args:
            reports, errors: see ``junit_xml``.
            summary: Markdown.
        """
        if self.junit is not None:
            self.junit.write_bytes(junit_xml(reports, errors))
        if self.summary is not None:
            with self.summary.open("a", encoding="utf-8") as stream:
                stream.write(f"{summary}\n")


def markdown_summary(report: Report) -> str:
    """Verdict, table and failed gates as Markdown, for a CI job's page."""
    name = sentence(report.model.name)
    if report.tool.command:
        name += f", recipe {sentence(report.recipe['name'])}"
    passed = "✅ **passed**" if report.passed else "❌ **failed**"
    parts = [f"### packlight: {name}", no_verdict(report) or passed]
    if report.harness is None:
        rows = [[sentence(cell) for cell in table_row(found)] for found in report.artifacts]
        parts.append(pipe_table(HEADERS, rows, left=2))
    else:
        rows = [[sentence(cell) for cell in row] for row in harness_rows(report)]
        parts.append(pipe_table(HARNESS_HEADERS, rows, left=3))
    if tasks := task_rows(report):
        rows = [[sentence(cell) for cell in row] for row in tasks]
        parts.append(pipe_table(TASK_HEADERS, rows, left=2))
    lines = []
    for artifact in report.artifacts:
        failed = [f"could not be run: {artifact.failure}"] if artifact.failure else []
        failed += failures(artifact)
        lines += [f"- {sentence(f'{label(artifact)}: {line}')}" for line in failed]
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])]) + "\n"


def junit_xml(reports: Mapping[str, Report], errors: Mapping[str, str] | None = None) -> bytes:
    """One test suite per artifact of the reports, one test case per gate, UTF-8.

    A suite's properties are the measured figures that gates can be set on. The document holds a
    failure if and only if the verdict of a report is ``failed``; an artifact that was not run is
    skipped.

    Args:
        reports: by name of the build.
        errors: by name of the build, error messages of builds that could not run.
    """
    suites = [
        artifact_suite(name, report, artifact)
        for name, report in reports.items()
        for artifact in report.artifacts
    ]
    suites += [error_suite(name, message) for name, message in (errors or {}).items()]
    totals = {
        key: str(sum(int(suite.attrib[key]) for suite in suites))
        for key in ("tests", "failures", "errors")
    }
    root = ET.Element("testsuites", {"name": "packlight", **totals})
    root.extend(suites)
    ET.indent(root)
    text: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def error_suite(name: str, message: str) -> ET.Element:
    """The suite of a build that could not run."""
    counts = {"tests": "1", "failures": "0", "errors": "1", "skipped": "0"}
    suite = ET.Element("testsuite", {"name": xml_text(name), **counts})
    case = ET.SubElement(suite, "testcase", {"name": "build", "classname": xml_text(name)})
    ET.SubElement(case, "error", {"type": "build", "message": xml_text(message)})
    return suite


def artifact_suite(built: str, report: Report, artifact: ArtifactReport) -> ET.Element:
    """The suite of one artifact: its figures, whether it runs, and its gates."""
    name = f"{built} {label(artifact)}"
    cases = [answers_case(artifact), *(gate_case(gate) for gate in artifact.gates)]
    for case in cases:
        case.set("classname", xml_text(name))
    suite = ET.Element(
        "testsuite",
        {
            "name": xml_text(name),
            "tests": str(len(cases)),
            "failures": str(sum(case.find("failure") is not None for case in cases)),
            "errors": "0",
            "skipped": str(sum(case.find("skipped") is not None for case in cases)),
        },
    )
    properties = ET.SubElement(suite, "properties")
    facts: dict[str, str | float | None] = {
        "recipe": report.recipe["name"] if report.tool.command else None,
        "verdict": report.verdict,
        "path": artifact.path,
        **{metric: find(artifact, metric) for metric in METRICS},
    }
    for key, value in facts.items():
        if value is not None:
            text = value if isinstance(value, str) else f"{value:.7g}"
            if isinstance(value, float) and value.is_integer():
                text = str(int(value))  # bytes, to the last one
            ET.SubElement(properties, "property", {"name": key, "value": xml_text(text)})
    suite.extend(cases)
    return suite


def answers_case(artifact: ArtifactReport) -> ET.Element:
    """The test case whether the artifact was run and its logits were finite."""
    case = ET.Element("testcase", {"name": ANSWERS})
    if artifact.failure:
        ET.SubElement(case, "failure", {"type": "runtime", "message": xml_text(artifact.failure)})
    elif artifact.runtime is None:
        ET.SubElement(case, "skipped", {"message": "not verified"})
    elif artifact.perplexity_ratio is None and not artifact.harness:
        message = f"{artifact.runtime} ran it, and its answers are not numbers"
        ET.SubElement(case, "failure", {"type": "answers", "message": xml_text(message)})
    return case


def gate_case(gate: GateReport) -> ET.Element:
    """The test case of a gate; a failure has the measured value and the limit."""
    case = ET.Element("testcase", {"name": xml_text(f"{gate.name} {gate.limit}")})
    if not gate.passed:
        message = xml_text(gate_failure(gate))
        failure = ET.SubElement(case, "failure", {"type": "gate", "message": message})
        failure.text = xml_text(f"measured: {gate.value}\nlimit: {gate.limit}")
    return case


def xml_text(text: str) -> str:
    """Text without characters that XML cannot hold or that control a display."""
    return visible(NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text))
