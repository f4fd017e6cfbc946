"""Limits on the functions, files and frames of one build, lowered when the path gets shorter.

``python tests/path.py gguf rtn`` has the functions by name, and the deepest stack.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Functions, files and frames of ours at most: of the whole build, of plan and write alone. On one
# thread (as here) a slab is read a frame deeper than in a pool.
BARS = {
    ("gguf", "rtn"): ([266, 45, 13], [130, 25, 10]),
    ("coreml", "rtn"): (
        [310, 47, 14],
        [169, 26, 10],
    ),  # an app's files, and its devices in the report
    ("gguf", "gptq"): ([360, 54, 13], [217, 34, 10]),  # calibrated before
}


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("gguf", "rtn"),
        pytest.param("coreml", "rtn", marks=pytest.mark.slow),
        pytest.param("gguf", "gptq", marks=pytest.mark.slow),  # each call of its walk is traced
    ],
)
def test_the_path_of_a_build(name, solver):
    script = str(Path(__file__).with_name("path.py"))
    done = subprocess.run(
        [sys.executable, script, name, solver], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    for key, bars in zip(("all", "plan and write"), BARS[name, solver], strict=True):
        assert all(a <= b for a, b in zip(found[key], bars, strict=True)), (key, found[key])
