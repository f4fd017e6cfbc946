"""examples/gitlab-ci.yml: keywords that GitLab has, and scripts that run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "examples" / "gitlab-ci.yml").read_text("utf-8")
JOBS: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)
STAGES = JOBS.pop("stages")
VARIABLES = JOBS.pop("variables")

# https://docs.gitlab.com/ci/yaml/
KEYWORDS = {
    "stage", "image", "before_script", "script", "cache", "artifacts", "timeout",
}  # fmt: skip


def test_it_has_keywords_and_names_that_gitlab_knows():
    for name, job in JOBS.items():
        assert set(job) <= KEYWORDS, name
        assert job["stage"] in STAGES
        assert all(isinstance(line, str) for key in ("before_script", "script") for line in
                   job.get(key, []))  # fmt: skip
    assert set(JOBS["packlight"]["artifacts"]) == {"when", "expire_in", "paths", "reports"}
    assert JOBS["packlight"]["artifacts"]["when"] == "always"
    used = set(re.findall(r"\$(\w+)", TEXT))
    assert used <= {*VARIABLES, "CI_PROJECT_DIR", "PUSH_TO", "PUSH_TOKEN"}


def test_its_image_is_that_of_the_container():
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    assert f"FROM {JOBS['packlight']['image']}\n" in dockerfile


@pytest.mark.slow  # the options are those of action.yml's steps
def test_its_script_leaves_what_it_says(tmp_path):
    model = tiny.make("llama", tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "schema: 1\nname: ci\nquantize: {solver: rtn}\ntargets: {onnx: {bits: 4}}\n"
        "verify: {windows: 2, sequence_length: 32, gates: {bytes: '<1GB'}}\n"
    )
    job = JOBS["packlight"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {"MODEL": str(model), "RECIPE": recipe.name, "FETCH": "streaming", "REVISION": ""}
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", "\n".join(job["script"])],
        cwd=tmp_path,
        env=os.environ | variables | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in job["artifacts"]["paths"]:
        assert (tmp_path / name).exists(), name
    junit = ET.parse(tmp_path / job["artifacts"]["reports"]["junit"]).getroot()
    assert junit.attrib["failures"] == "0"
