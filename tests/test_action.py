"""action.yml: its steps are run on a tiny checkpoint, from an installation of its own."""

from __future__ import annotations

import json
import os
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from action_runner import Result, Runner
from container import copy_sources

from compress.verify.gates import parse_option

ROOT = Path(__file__).resolve().parents[1]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))

# Commits of releases that run on Node 24, the only one of GitHub's runners, and their inputs.
KNOWN = {
    "actions/setup-python@ece7cb06caefa5fff74198d8649806c4678c61a1": (
        "v6.3.0", {"python-version", "cache", "architecture"},
    ),
    "actions/cache@27d5ce7f107fe9357f9df03efb73ab90386fccae": (
        "v5.0.5", {"path", "key", "restore-keys", "lookup-only"},
    ),
    "actions/upload-artifact@bbbca2ddaa5d8feaa63e36b76fdaad77386f024f": (
        "v7.0.0", {"name", "path", "if-no-files-found", "retention-days", "compression-level"},
    ),
    "actions/checkout@3d3c42e5aac5ba805825da76410c181273ba90b1": (
        "v7.0.1", {"persist-credentials"},
    ),
}  # fmt: skip
SHORT = "verify.windows=2\nverify.sequence_length=32\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("models") / "tiny llama")


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Of a runner without a network whose `packlight` is this tree's."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GITHUB_", "PIP_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | {"PATH": path, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def use(folder: Path, environment: dict[str, str], source: Path = ROOT, **inputs: str) -> Result:
    given = {key.replace("_", "-"): value for key, value in inputs.items()}
    return Runner(source, folder, {"recipe": "int4-fast"} | given, environment).run()


def test_inputs_reach_the_shell_through_env_only():
    for step in ACTION["runs"]["steps"]:
        assert "${{" not in step.get("run", ""), step["name"]
        for name, value in step.get("env", {}).items():
            assert f"${name}" in step["run"] or f"${{{name}" in step["run"], (name, value)


def test_other_actions_and_what_they_are_given_exist():
    used = [step for step in ACTION["runs"]["steps"] if "uses" in step]
    assert len(used) == 5
    text = (ROOT / "action.yml").read_text("utf-8")
    for step in used:
        version, inputs = KNOWN[step["uses"]]
        assert set(step["with"]) <= inputs
        assert f"uses: {step['uses']} # {version}\n" in text


def test_tokens_reach_the_steps_that_need_them_only():
    texts = {step["name"]: json.dumps(step) for step in ACTION["runs"]["steps"]}
    assert {name for name, text in texts.items() if "token" in text.lower()} == {
        "Build and run the artifacts", "Push to the Hub",
    }  # fmt: skip
    assert "push-token" not in texts["Build and run the artifacts"]


def test_every_input_is_explained_and_used():
    text = (ROOT / "action.yml").read_text("utf-8")
    docs = (ROOT / "docs" / "ci.md").read_text("utf-8")
    for name, spec in ACTION["inputs"].items():
        assert spec["description"]
        assert f"inputs.{name}" in text
        assert f"`{name}`" in docs


def workflow() -> str:
    docs = (ROOT / "docs" / "ci.md").read_text("utf-8")
    (block,) = re.findall(r"<!-- workflow:begin -->\n```yaml\n(.*?)```", docs, re.DOTALL)
    return block


def test_the_workflow_of_the_docs_gives_what_the_action_takes():
    text = workflow()
    document = yaml.safe_load(text)
    assert document["permissions"] == {"contents": "read"}
    (job,) = document["jobs"].values()
    assert job["timeout-minutes"]
    steps = {step["uses"].partition("/")[0]: step for step in job["steps"] if "uses" in step}
    assert set(steps) == {"actions", "packlight"}
    assert set(steps["actions"]["with"]) <= KNOWN[steps["actions"]["uses"]][1]
    step = steps["packlight"]
    assert set(step["with"]) <= set(ACTION["inputs"])
    assert text.count("secrets.") == 1  # not in the environment of the job
    for gate in step["with"]["gates"].splitlines():
        parse_option(gate)


def keys_of(environment: dict[str, str], place: Path, **inputs: str) -> dict[str, str]:
    place.mkdir()
    done = use(place, environment, install="false", **inputs)
    return done.step("Name the caches").outputs


def test_a_cache_is_named_by_what_it_was_made_with(environment, tmp_path):
    command = tmp_path / "bin" / "packlight"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\nexit 2\n")
    command.chmod(0o755)
    mine = environment | {"PATH": f"{command.parent}{os.pathsep}{environment['PATH']}"}
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\n")
    given = {"model": "some/one", "recipe": str(recipe)}
    first = keys_of(mine, tmp_path / "1", **given)
    assert set(first) == {"libraries", "model", "recipe"}
    assert keys_of(mine, tmp_path / "2", **given) == first
    recipe.write_text("name: other\n")
    found = keys_of(mine, tmp_path / "3", **given)
    assert found["model"] == first["model"] and found["recipe"] != first["recipe"]
    found = keys_of(mine, tmp_path / "4", **given, revision="v2")
    assert found["model"] != first["model"]
    shipped = keys_of(mine, tmp_path / "5", model="some/one", recipe="int4-fast")
    other = keys_of(mine, tmp_path / "6", model="some/one", recipe="int4-balanced")
    assert shipped["recipe"] != other["recipe"]
    assert shipped["model"].startswith("0.")


@pytest.mark.slow  # pip makes the wheel and an environment for it
def test_a_good_build_is_installed_built_verified_and_uploaded(model, environment, tmp_path):
    source = copy_sources(tmp_path / "source")  # what the container's Dockerfile copies is enough
    (source / "action.yml").write_bytes((ROOT / "action.yml").read_bytes())
    packages = Path(yaml.__file__).parents[1]
    offline = environment | {
        # The dependencies are those of this environment; packlight's own wheel is built and
        # installed, and the constraints are checked against the installed versions.
        "PYTHONPATH": str(packages),
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads "no isolation: 0" as "isolation: 0"
        "PYTHONSAFEPATH": "1",
    }
    done = use(
        tmp_path, offline, source,
        model=str(model), formats="onnx", set=SHORT,
        gates="bytes < 1GB\n\nperplexity_ratio<=9\nkl_divergence<9\ntop1_agreement>=0.01\n",
    )  # fmt: skip
    assert done.outcomes == {
        "Name the caches": "success",
        "Set up Python": "success",
        "Restore the wheels": "success",
        "Install packlight": "success",
        "Restore caches": "success",
        "Build and run the artifacts": "success",
        "Verify what will be uploaded": "success",
        "Upload the artifacts": "success",
        "Upload the reports": "success",
        "Push to the Hub": "skipped",
    }, done.log
    assert (tmp_path / "_temp" / "packlight" / "bin" / "packlight").is_file()
    assert done.outputs == {"verdict": "passed", "folder": "packlight-out"}
    key = done.step("Restore caches").given["key"]
    assert re.fullmatch(r"packlight-Linux-\d[\w.]*-[0-9a-f]{16}-[0-9a-f]{16}", key)
    assert key.startswith(done.step("Restore caches").given["restore-keys"])
    assert done.step("Upload the artifacts").given["path"] == "packlight-out"
    for path in done.step("Upload the reports").given["path"].split():
        assert (tmp_path / path).is_file()
    report = json.loads((tmp_path / "packlight-out" / "report.json").read_text())
    (artifact,) = report["artifacts"]
    limits = {gate["name"]: gate["limit"] for gate in artifact["gates"]}
    assert (artifact["format"], limits["bytes"]) == ("onnx", "< 1GB")
    assert limits["top1_agreement"] == ">=0.01"  # in place of the recipe's
    assert "**passed**" in done.summary
    assert "| onnx | int4-g32 |" in done.summary


def test_a_failed_gate_fails_the_job_and_is_told(model, environment, tmp_path):
    done = use(
        tmp_path, environment, model=str(model), formats="gguf, onnx", set=SHORT, install="false",
        gates="kl_divergence<=0.000001", push_to="someone/model",
    )  # fmt: skip
    assert done.outcomes == {
        "Name the caches": "success",
        "Set up Python": "skipped",
        "Restore the wheels": "skipped",
        "Install packlight": "skipped",
        "Restore caches": "success",
        "Build and run the artifacts": "failure",
        "Verify what will be uploaded": "success",
        "Upload the artifacts": "skipped",
        "Upload the reports": "success",
        "Push to the Hub": "skipped",
    }, done.log
    assert done.outputs["verdict"] == "failed"
    assert "**failed**" in done.summary
    assert "kl_divergence is" in done.summary
    junit = ET.parse(tmp_path / "packlight-junit.xml").getroot()
    gates = [suite.find("testcase[@name='kl_divergence <=0.000001']/failure") for suite in junit]
    assert len(gates) == 2 and None not in gates


def test_the_reports_of_a_build_whose_runtime_refused_an_artifact_are_kept(environment, tmp_path):
    command = tmp_path / "bin" / "packlight"  # which ends as such a build does
    command.parent.mkdir()
    command.write_text(
        '#!/bin/sh\n[ "$1" = build ] || exit 0\nmkdir packlight-out\n'
        "touch packlight-out/report.html packlight-out/report.json packlight-junit.xml\nexit 2\n"
    )
    command.chmod(0o755)
    mine = environment | {"PATH": f"{command.parent}{os.pathsep}{environment['PATH']}"}
    done = use(tmp_path, mine, model="m", install="false", cache="false", push_to="someone/model")
    assert {name for name, outcome in done.outcomes.items() if outcome == "success"} == {
        "Verify what will be uploaded",
        "Upload the reports",
    }, done.log
    assert done.outputs["verdict"] == "error"
    assert "could not build" not in done.summary


@pytest.mark.parametrize("names", ["formats model", "model gates set against budget revision"])
def test_inputs_are_never_code_and_an_error_is_told(names, environment, tmp_path):
    hostile = '"; touch pwned; $(touch pwned) `touch pwned` #'
    inputs = dict.fromkeys(names.split(), hostile)
    done = use(tmp_path, environment, install="false", cache="false", **inputs)
    outcomes = done.outcomes
    assert outcomes.pop("Build and run the artifacts") == "failure", done.log
    assert set(outcomes.values()) == {"skipped"}
    assert done.outputs["verdict"] == "error"
    assert "could not build, exit code 2" in done.summary
    assert not list(tmp_path.rglob("pwned*"))
    assert "Traceback" not in done.log
