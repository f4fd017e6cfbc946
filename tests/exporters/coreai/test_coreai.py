"""The Core AI program of every family, run as its float32 twin in Apple's CPU runtime, against the
reference decoder on the same constants.

Constants are float16 in both, so that only the order of sums differs: 1e-4 on logits of standard
deviation 2 (measured: 3e-5).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from exported import CONTEXT, Exports, reference

pytest.importorskip("coreai", reason="needs the extra packlight[coreai]")
from exporters.coreai.runtime import open_runtime

ROOT = Path(__file__).resolve().parents[3]
# Every family, on a grid of each kind in turn.
CASES = [
    (family, ("int4-g32", "lut4-g8", "int8-channel-asym")[i % 3], {})
    for i, family in enumerate(tiny.FAMILIES)
] + [("mobilellm", "lut6-g16", {"layer_sharing": True})]
TOKENS = np.random.default_rng(5).integers(3, 480, CONTEXT).tolist()


@pytest.mark.parametrize(("family", "grid", "overrides"), CASES)
def test_logits_of_every_family(
    exported: Exports, family: str, grid: str, overrides: dict[str, Any]
) -> None:
    made = exported("coreai", family, overrides, grid=grid)
    runtime = open_runtime(made.path, context=CONTEXT, slots=16)
    expected = reference(made, halves=True).logits(TOKENS)
    found = runtime.logits(TOKENS)
    assert found.shape == (CONTEXT, 512) and found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-4
    runtime.reset()  # through caches that grow from 16 slots to 64
    pieces = [runtime.extend(TOKENS[:13])]
    pieces += [runtime.extend([token]) for token in TOKENS[13:20]]
    pieces.append(runtime.extend(TOKENS[20:]))
    assert np.abs(np.concatenate(pieces) - found).max() < 2e-5
    runtime.close()


def sums(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def test_two_processes_write_the_same_bytes(exported: Exports, tmp_path: Path) -> None:
    made = exported("coreai", "phi3", grid="int4-g32")
    script = (
        "import sys; sys.path[:0] = sys.argv[3:]; import exporters; from pathlib import Path\n"
        "from exported import Exports\n"
        "Exports(Path(sys.argv[2])).write('coreai', Path(sys.argv[1]), {'grid': 'int4-g32'},"
        " name='phi3', folder=Path(sys.argv[2]))"
    )
    paths = [str(ROOT), str(ROOT / "tests")]
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        command = [sys.executable, "-c", script, str(made.checkpoint.path), str(folder), *paths]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        assert sums(folder) == sums(made.path)


def test_the_bundle_is_what_apples_runner_reads(exported: Exports) -> None:
    made = exported("coreai", "llama3", grid="int4-g32")
    metadata = json.loads((made.path / "metadata.json").read_text())
    assert (metadata["metadata_version"], metadata["kind"]) == ("0.2", "llm")
    assert metadata["assets"] == {"main": "llama3.aimodel"}
    language = metadata["language"]
    assert language["vocab_size"] == 512 and language["max_context_length"] == CONTEXT
    assert language["embedded_tokenizer"] and language["function_map"] == {"main": ["main"]}
    assert (made.path / "tokenizer" / "tokenizer.json").is_file()
    program = made.path / "llama3.aimodel" / "main.mlirb"
    digest = hashlib.sha256(program.read_bytes()).digest()
    assert program.with_name("main.hash").read_bytes() == digest

    from coreai.authoring import AIModelAsset

    assert AIModelAsset.is_valid(program.parent)
    summary = AIModelAsset.load(program.parent).summary()
    assert summary is not None and list(summary.function_names) == ["main"]
    inputs = dict(summary.function_inputs("main"))
    assert list(inputs)[:2] == ["input_ids", "position_ids"]
    assert {"keyCache", "valueCache"} <= set(inputs) | set(summary.function_states("main"))
