"""Bytes of the demo's artifacts, rounded to nearest: the same in every version, on every machine.

They were equal in four software stacks and on two CPUs. gptq's bytes depend on the CPU, so those of
two versions are compared on one machine. ``--update-golden`` writes the current sums.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from compress import __main__ as cli
from compress.demo import model_path

GOLDEN = Path(__file__).parents[1].joinpath("golden") / "demo_rtn.json"
FORMATS = ("gguf", "onnx", "coreml")


@pytest.mark.parametrize("threads", [1, 2])
def test_the_demo_has_the_bytes_that_it_had(tmp_path, threads, request):
    out = tmp_path / "out"
    command = ["build", str(model_path()), "-r", "int4-fast", "--no-verify", "-o", str(out)]
    assert cli.main([*command, "--threads", str(threads)]) == 0
    files = sorted(path for name in FORMATS for path in (out / name).rglob("*") if path.is_file())
    files = [path for path in files if "Swift" not in path.parts]  # copies of exporters/swift
    found = {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    if request.config.getoption("--update-golden"):
        GOLDEN.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert found == json.loads(GOLDEN.read_text(encoding="utf-8"))
