"""compress.report.against: regressions since an earlier report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import packlight, refused
from jsonschema import validate
from sample_report import change, make, schema

from compress.console import Console
from compress.demo import model_path
from compress.errors import UsageError
from compress.report.against import DEFAULT, Previous, parse_regressions
from compress.report.report import KlDivergence, Report


def sample() -> Report:
    return make(gates={})


def previous(tmp_path: Path, report: Report, limits: str = DEFAULT) -> Previous:
    path = tmp_path / "last.json"
    report.save(path)
    return Previous(path, parse_regressions([limits]))


def changed(report: Report, **figures: Any) -> Report:
    """A copy whose first artifact has other figures."""
    new = report.model_copy(deep=True)
    for artifact in new.artifacts:
        artifact.gates = []
    change(new.artifacts[0], **figures)
    return new


@pytest.mark.parametrize(
    ("limits", "factor", "passed"),
    [
        ("kl=5%", 1.049, True),
        ("kl=5%", 1.051, False),
        ("kl=5%", 0.5, True),
        ("bytes=1%", 1.0099, True),
        ("bytes=1%", 1.0101, False),
        ("bytes=0", 1.0, True),
        ("bytes=10KB", 1.0101, False),
        ("top1=0.5%", 0.996, True),
        ("top1=0.5%", 0.994, False),
        ("top1=0.5%", 1.1, True),
        ("decode_tokens_per_second=10%", 0.91, True),
        ("tokens/s=10%", 0.89, False),
        ("memory=0.1%", 1.002, False),
    ],
)
def test_a_regression_is_a_gate(tmp_path: Path, limits: str, factor: float, passed: bool) -> None:
    old = sample()
    (limit,) = parse_regressions([limits])
    first = old.artifacts[0]
    if limit.name == "kl_divergence":
        kl = first.kl_divergence
        assert kl is not None and kl.mean is not None
        value: Any = kl.model_copy(update={"mean": kl.mean * factor})
    else:
        before = getattr(first, limit.name)
        value = type(before)(before * factor)
    new = changed(old, **{limit.name: value})
    previous(tmp_path, old, limits).apply(new, Console("quiet"))
    gate = new.artifacts[0].gates[-1]
    assert gate.name == f"regression: {limit.name}" and gate.passed is passed, gate
    assert " before, " in gate.limit
    assert (new.verdict == "failed") is not passed
    validate(new.to_dict(), schema())


def test_an_absolute_amount(tmp_path: Path) -> None:
    old = sample()
    mean = old.artifacts[0].kl_divergence.mean
    for more, passed in ((0.0009, True), (0.0011, False)):
        new = changed(old, kl_divergence=KlDivergence(mean=mean + more))
        judged, _ = previous(tmp_path, old, "kl=0.001").judge(new)
        assert judged[0][0].passed is passed


def test_what_is_missing_before_is_told_and_what_is_missing_now_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = sample()
    first, *others = old.artifacts
    bare = changed(old, kl_divergence=None)
    bare.artifacts = bare.artifacts[:1]
    new = changed(old)
    previous(tmp_path, bare).apply(new, Console())
    assert [gate.name for gate in new.artifacts[0].gates] == ["regression: bytes"]
    assert all(artifact.gates == [] for artifact in new.artifacts[1:])
    told = capsys.readouterr().err
    assert f"last.json has no kl_divergence of {first.format} {first.type}" in told
    for artifact in others:
        assert f"last.json has no {artifact.format} {artifact.type}" in told
    previous(tmp_path, old).apply(bare, Console())
    assert bare.verdict == "failed"
    assert f"{others[0].format} {others[0].type}, this build has not" in capsys.readouterr().err


def test_another_type_of_the_same_format_is_compared_and_told(tmp_path: Path) -> None:
    old = sample()
    new = changed(old, type="IQ4_XS")
    judged, notes = previous(tmp_path, old).judge(new)
    assert len(judged[0]) == 2 and "IQ4_XS is compared with" in notes[0]


def test_reports_of_another_text_are_refused(tmp_path: Path) -> None:
    old = sample()
    baseline = old.baseline
    tokens = baseline.tokens // baseline.windows + 1
    same = [[0] * tokens] * baseline.windows
    last = previous(tmp_path, old)
    last.check_text(baseline.text, same)
    for text, windows in (("novel.txt", same), (baseline.text, same[1:])):
        with pytest.raises(UsageError, match=r"last.json scored \d+ windows"):
            last.check_text(text, windows)
    previous(tmp_path, old, "bytes=1%").check_text("novel.txt", same[1:])  # any text does
    new = changed(old)
    new.baseline.perplexity *= 1.01
    with pytest.raises(UsageError, match="another text or another checkpoint"):
        last.judge(new)


def test_another_machine_is_told_where_it_matters(tmp_path: Path) -> None:
    old = sample()
    new = changed(old)
    new.machine.processor = "riscv64"
    assert previous(tmp_path, old).judge(new)[1] == []
    (note,) = previous(tmp_path, old, "tokens/s=10%,kl=5%").judge(new)[1]
    assert note.startswith("decode_tokens_per_second of last.json")


@pytest.mark.parametrize(
    ("limits", "message", "hint"),
    [
        ("kl", "'kl': write METRIC=AMOUNT", "kl=5%,bytes=1%"),
        ("kl_divergance=5%", "kl_divergance: unknown metric", "kl_divergence?"),
        ("kl=five", "kl_divergence: 'five' is not an amount", "0.002"),
        ("kl=-1%", "is not an amount", ""),
        ("kl=10MB", "is not an amount", ""),
        ("bytes=1parsec", "is not an amount", "10MB"),
        ("kl=1%,kl_divergence=2%", "gives kl_divergence twice", ""),
    ],
)
def test_limits_that_are_none(limits: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_regressions([limits])
    assert message in str(caught.value) and hint in caught.value.hint


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema_version": 1, "artifacts": []}'])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "last.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"last.json is not (JSON|a report)"):
        Previous(path, [])
    with pytest.raises(UsageError, match="No such file"):
        Previous(tmp_path / "none.json", [])


def test_a_build_and_a_verification_against_the_last_build(tmp_path: Path) -> None:
    build = ("build", model_path(), "-r", "int4-fast", "-f", "gguf", "--threads", 1)
    short = ("--set", "verify.windows=2", "--set", "verify.sequence_length=64")
    done = packlight(*build, *short, "-o", "a", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / "a" / "report.json").read_text())
    last["artifacts"][0]["kl_divergence"]["mean"] *= 0.9
    (tmp_path / "last.json").write_text(json.dumps(last))
    verify = ("verify", "a/gguf", "--baseline", model_path(), "--windows", 2, "--threads", 1)
    limits = ("--against", "last.json", "--max-regression", "kl=5%, bytes=1%")
    done = packlight(*verify, "--sequence-length", 64, *limits, "--json", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    validate(report, schema())
    found = {gate["name"]: gate["passed"] for gate in report["artifacts"][0]["gates"]}
    worse = {"regression: kl_divergence": False, "regression: bytes": True}
    assert found == worse | {"tokenizer_agreement": True}
    larger = ("--set", "targets.gguf.type=Q5_0", "-o", "b", "--no-verify")
    said = refused(packlight(*build, *larger, "--against", "last.json", cwd=tmp_path))
    assert "--no-verify measures nothing" in said
    limits = ("--against", "last.json", "--max-regression", "bytes=1%")
    done = packlight(*build, *larger, *limits, cwd=tmp_path)
    assert done.returncode == 1 and "regression: bytes is " in done.stderr, done.stderr
