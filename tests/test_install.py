"""`pip install .` without constraints: today's newest versions pass the demo."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from trees import copy_sources

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
NO_INDEX = ("NewConnectionError", "Temporary failure in name", "Network is unreachable")


def test_the_page_has_the_ranges_that_are_declared():
    page = (ROOT / "docs" / "versions.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \| `([^`]+)` \|", page, re.MULTILINE))
    declared = [Requirement(line) for line in PROJECT["dependencies"]]
    capped = {
        one.name: one.specifier
        for one in declared
        if any(spec.operator in ("<", "==") for spec in one.specifier)
    }
    assert rows.keys() == capped.keys()
    for name, specifier in capped.items():
        assert Requirement(f"{name}{rows[name]}").specifier == specifier
    for line in PROJECT["classifiers"]:
        if found := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line):
            assert found[1] in page


@pytest.mark.slow
def test_a_fresh_environment_passes_the_demo(tmp_path: Path):
    source = tmp_path / "source"
    copy_sources(source)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    bin = tmp_path / "venv" / "bin"
    # The newest torch would install gigabytes of CUDA; everything else is pip's choice.
    pinned = (ROOT / "constraints.txt").read_text("utf-8")
    torch = next(line for line in pinned.splitlines() if line.startswith("torch=="))
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    install = [bin / "pip", "install", "--quiet", "--no-compile", torch, source]
    done = subprocess.run(install, env=kept, capture_output=True, text=True)
    if done.returncode and any(word in done.stderr for word in NO_INDEX):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    for command in (("doctor",), ("demo", "--output", "out", "--quiet")):
        done = subprocess.run(
            [bin / "packlight", *command], cwd=tmp_path, env=kept, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "report.json").is_file()
