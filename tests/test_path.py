"""How much of the house one build runs through: a ratchet, lowered when the path gets shorter.

``python tests/path.py gguf rtn`` has the functions by name, and the deepest stack.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Functions, files and frames of ours at most: of the whole build, of plan and write alone.
BARS = {
    ("gguf", "rtn"): ([277, 49, 13], [150, 28]),
    ("coreml", "rtn"): ([316, 49, 14], None),
    ("gguf", "gptq"): ([415, 64, 22], None),  # with the walk; 375, 62 and 14 where it is cached
}


@pytest.mark.parametrize(("name", "solver"), list(BARS))
def test_the_path_of_a_build(name, solver):
    script = str(Path(__file__).with_name("path.py"))
    done = subprocess.run(
        [sys.executable, script, name, solver], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    whole, part = BARS[name, solver]
    assert all(a <= b for a, b in zip(found["all"], whole, strict=True)), found["all"]
    if part:
        assert all(a <= b for a, b in zip(found["plan and write"], part, strict=True)), found
