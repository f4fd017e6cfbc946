"""What a CI system reads, by its linters: actionlint, shellcheck and hadolint, where installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PLACES = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def lint(tool: str, *arguments: str | Path, cwd: Path = ROOT, text: str | None = None) -> str:
    """What a linter says."""
    found = shutil.which(tool, path=PLACES)
    if found is None:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run(
        [found, *map(str, arguments)], cwd=cwd, env=os.environ | {"PATH": PLACES},
        input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout
    return done.stdout


def test_the_workflow_of_the_docs(tmp_path: Path) -> None:
    docs = (ROOT / "docs" / "ci.md").read_text("utf-8")
    (block,) = re.findall(r"<!-- workflow:begin -->\n```yaml\n(.*?)```", docs, re.DOTALL)
    # The action as one of the repository, so that its inputs are known.
    (tmp_path / ".git").mkdir()
    folder = tmp_path / ".github" / "workflows"
    folder.mkdir(parents=True)
    file = folder / "artifacts.yml"
    assert "packlight/packlight@main" in block
    file.write_text(block.replace("packlight/packlight@main", "./packlight"), "utf-8")
    (tmp_path / "packlight").mkdir()
    shutil.copy(ROOT / "action.yml", tmp_path / "packlight")
    assert lint("actionlint", "-no-color", file, cwd=tmp_path) == ""
    file.write_text(file.read_text("utf-8").replace("push-token:", "push-tokens:"), "utf-8")
    assert 'input "push-tokens" is not defined' in lint(
        "actionlint", "-no-color", file, cwd=tmp_path
    )


@pytest.mark.parametrize("name", ["action.yml", "examples/gitlab-ci.yml"])
def test_scripts(name: str) -> None:
    document = yaml.safe_load((ROOT / name).read_text("utf-8"))
    if name == "action.yml":
        steps = document["runs"]["steps"]
        scripts = [
            "".join(f"export {key}\n" for key in step.get("env", {})) + step["run"]
            for step in steps if "run" in step
        ]  # fmt: skip
    else:
        names = [*document["variables"], "PUSH_TO", "PUSH_TOKEN"]
        exports = "".join(f"export {key}\n" for key in names)
        scripts = [exports + "\n".join(document["packlight"]["script"])]
    for script in scripts:
        assert lint("shellcheck", "--shell=bash", "-", text=script) == ""


def test_the_dockerfile() -> None:
    assert lint("hadolint", "Dockerfile") == ""
