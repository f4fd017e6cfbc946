"""Gates as JUnit XML, which GitLab, Jenkins and their like show beside the tests of the code.

The elements and attributes are those of ``junit-10.xsd`` of Jenkins' xunit plugin
(https://github.com/jenkinsci/xunit-plugin), the strictest of the dialects in use: whatever reads
JUnit reads it. There are no times and no host in it: the same report gives the same bytes.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Any

from compress.report.report import artifact_label
from compress.report.summary import gate_failure
from compress.verify.gates import METRICS, find

Json = Mapping[str, Any]

ANSWERS = "answers are numbers"
"""The test case that every artifact has: it loads in its runtime, which answers in numbers."""

# All that XML 1.0 cannot hold, not even escaped (its production 2, Char).
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(reports: Mapping[str, Json], errors: Mapping[str, str] | None = None) -> bytes:
    """One test suite per artifact of the reports, one test case per gate, UTF-8.

    A suite's properties are the figures that gates can be set on, as far as they were measured. The
    document holds a failure if and only if the verdict of a report is ``failed``; what was not run
    is skipped.

    Args:
        reports: documents that obey ``report.schema.json``, by the names of what was built.
        errors: why other builds of the same batch could not run, by their names.
    """
    suites = [
        artifact_suite(name, report, artifact)
        for name, report in reports.items()
        for artifact in report["artifacts"]
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
    """A build that could not be done."""
    counts = {"tests": "1", "failures": "0", "errors": "1", "skipped": "0"}
    suite = ET.Element("testsuite", {"name": clean(name), **counts})
    case = ET.SubElement(suite, "testcase", {"name": "build", "classname": clean(name)})
    ET.SubElement(case, "error", {"type": "build", "message": clean(message)})
    return suite


def artifact_suite(built: str, report: Json, artifact: Json) -> ET.Element:
    """One artifact: its figures, that it answers, and its gates."""
    name = f"{built} {artifact_label(artifact)}"
    cases = [answers_case(artifact), *(gate_case(gate) for gate in artifact["gates"])]
    for case in cases:
        case.set("classname", clean(name))
    suite = ET.Element(
        "testsuite",
        {
            "name": clean(name),
            "tests": str(len(cases)),
            "failures": str(sum(case.find("failure") is not None for case in cases)),
            "errors": "0",
            "skipped": str(sum(case.find("skipped") is not None for case in cases)),
        },
    )
    properties = ET.SubElement(suite, "properties")
    facts = {
        "recipe": report["recipe"]["name"],
        "verdict": report["verdict"],
        "path": artifact["path"],
        **{metric: find(artifact, metric) for metric in METRICS},
    }
    for key, value in facts.items():
        if value is not None:
            text = value if isinstance(value, str) else f"{value:.7g}"
            if isinstance(value, float) and value.is_integer():
                text = str(int(value))  # bytes, to the last one
            ET.SubElement(properties, "property", {"name": key, "value": clean(text)})
    suite.extend(cases)
    return suite


def answers_case(artifact: Json) -> ET.Element:
    """Whether the artifact was run, and answered in numbers."""
    case = ET.Element("testcase", {"name": ANSWERS})
    if artifact["failure"]:
        ET.SubElement(case, "failure", {"type": "runtime", "message": clean(artifact["failure"])})
    elif artifact["runtime"] is None:
        ET.SubElement(case, "skipped", {"message": "not verified"})
    elif artifact["perplexity_ratio"] is None:
        message = f"{artifact['runtime']} ran it, and its answers are not numbers"
        ET.SubElement(case, "failure", {"type": "answers", "message": clean(message)})
    return case


def gate_case(gate: Json) -> ET.Element:
    """One gate; a failure tells what was measured and the limit."""
    case = ET.Element("testcase", {"name": clean(f"{gate['name']} {gate['limit']}")})
    if not gate["passed"]:
        message = clean(gate_failure(gate))
        failure = ET.SubElement(case, "failure", {"type": "gate", "message": message})
        failure.text = clean(f"measured: {gate['value']}\nlimit: {gate['limit']}")
    return case


def clean(text: str) -> str:
    """Text without what XML cannot hold."""
    return NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
