"""compress.report.pages: the model card's metadata and text, and the escaping of strings."""

from __future__ import annotations

import ast
import json
import re
import shlex
from typing import Any

import sample_report
import yaml

from compress.report.pages import model_card
from compress.report.words import fenced, figure, sentence


def parse_head(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def blocks(card: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block, fences matched by length as CommonMark does."""
    found = re.findall(r"^(`{3,})(\w+)\n(.*?)\n\1$", card, re.S | re.M)
    return [(language, code) for _, language, code in found]


def test_head() -> None:
    assert parse_head(model_card(sample_report.make())) == {
        "base_model": "acme/SmolThinker-1.1B",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "onnx", "coreml", "quantized", "packlight"],
    }


def test_what_is_not_known_is_left_out() -> None:
    report = sample_report.make()
    sample_report.change(report.model, source="my-folder", license=None)
    head = parse_head(model_card(report))
    assert head.keys() == {
        "base_model", "base_model_relation", "library_name", "pipeline_tag", "tags"
    }  # fmt: skip
    assert head["base_model"] == "my-folder"


def test_the_table_has_the_reports_figures() -> None:
    report = sample_report.make()
    card = model_card(report)
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3 + 1
    assert {row.count("|") for row in rows} == {11}
    gguf = [cell.strip() for cell in rows[2].strip("|").split("|")]
    found = report.artifacts[0]
    assert gguf[0] == "GGUF Q4_K_M"
    assert gguf[1] == found.path
    assert gguf[2] == "740.48 MB (706.17 MiB)"
    assert float(gguf[3]) == round(found.bytes * 8 / report.model.parameters, 3)
    kl, se = (float(part) for part in gguf[6].split(" ± "))
    assert abs(kl - found.kl_divergence.mean) < 5e-5
    assert abs(se - found.kl_divergence.se) < 5e-5
    assert float(gguf[7].split(" ±")[0]) == round(found.top1_agreement * 100, 2)
    assert rows[5].startswith("| float, BF16 | – | 2.41 GB (2.24 GiB) | 16.000 | 6.21 ±")


def test_how_to_run_is_code_that_parses() -> None:
    card = model_card(sample_report.make())
    kinds = blocks(card)
    languages = [language for language, _ in kinds]
    assert languages == ["sh", "sh", "python", "js", "python", "sh", "sh"]
    assert shlex.split(kinds[0][1])[:3] == ["llama-cli", "-m", "gguf/SmolThinker-1.1B-Q4_K_M.gguf"]
    assert kinds[1][1].startswith("echo FROM ./gguf/SmolThinker-1.1B-Q4_K_M.gguf > Modelfile\n")
    assert "og.Model('onnx')" in ast.unparse(ast.parse(kinds[2][1]))
    assert '"./" + "onnx"' in kinds[3][1] and "{{" not in kinds[3][1]
    assert "from_pretrained('onnx')" in ast.unparse(ast.parse(kinds[4][1]))
    assert kinds[6][1] == "packlight build acme/SmolThinker-1.1B -r phone-4bit -o out"


def test_verdicts() -> None:
    assert "**Failed** its recipe's gates: GGUF Q4_K_M: bytes, " in model_card(sample_report.make())
    easy = {"kl_divergence": "<=1"}
    assert "**Passed** all 3 gates" in model_card(sample_report.make(gates=easy))
    assert "**Passed**." in model_card(sample_report.make(gates={}))
    unverified = model_card(sample_report.make(verified=False))
    assert "**Not verified**" in unverified and " nan" not in unverified.lower()
    assert "Over " not in unverified


def test_strings_stay_strings() -> None:
    evil = "x|y <script>alert(1)</script>\n---\nlicense: mit\n# big [a](http://b) `c` ```"
    report = sample_report.make(notes=(evil,), command=evil)
    sample_report.change(report.model, name=evil, license=evil, source=evil)
    report.recipe["name"] = report.baseline.text = report.baseline.dtype = evil
    for artifact in report.artifacts:
        sample_report.change(artifact, type=evil, path=evil, notes=[evil])
        sample_report.change(artifact.gates[0], name=evil, passed=False)
    card = model_card(report)
    assert parse_head(card)["license"] == " ".join(evil.split())
    assert "base_model" not in parse_head(card)
    body = card.split("---\n", 2)[2]
    code = [block for _, block in blocks(body)]
    assert code[-1] == evil
    assert shlex.split(code[0])[2] == evil
    assert json.dumps(evil) in code[3]
    calls = [node for node in ast.walk(ast.parse(code[4])) if isinstance(node, ast.Constant)]
    assert sum(node.value == evil for node in calls) == 2
    for block in code:
        body = body.replace(block, "")
    assert not re.search(r"(?<!\\)<|(?<!\\)\]\(http://b", body)
    assert {row.count("|") - row.count("\\|") for row in body.splitlines() if row[:1] == "|"} == {
        11
    }
    assert not re.search(r"^(license|# big)", body, re.M)


def test_escapes() -> None:
    assert sentence("a_b Q4_K_M _c_") == "a_b Q4_K_M \\_c\\_"
    assert sentence("a\n b | `c` \\") == "a b \\| \\`c\\` \\\\"
    assert fenced("a ```` b", "sh") == "`````sh\na ```` b\n`````"
    assert [figure(None), figure(3.14159), figure(0.5, 0.012, " %", 100)] == [
        "–",
        "3.142",
        "50.0 ± 1.2 %",
    ]
