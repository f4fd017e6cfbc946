"""Every family in mlx-lm itself; skipped where there is no mlx-lm (``PACKLIGHT_MLX_PYTHON``)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tiny
from exported import Exports, greedy
from tiny_families import ROWS

from compress.errors import ArtifactError, RuntimeMissingError
from compress.formats import get_format
from exporters.mlx.card import runtime_python
from exporters.mlx.models import MODELS

try:
    PYTHON = runtime_python()
except RuntimeMissingError as error:
    pytest.skip(f"no mlx-lm: {error.message}", allow_module_level=True)

FAMILIES = [
    *tiny.FAMILIES,
    *(
        name
        for name, row in ROWS.items()
        if str(row.config["model_type"]) in MODELS and name != "llama4_text-nope"
    ),
]
# What the class lacks (test_mlx_folder.py) is left out here.
OTHERS = {
    "gpt_neox": {"intermediate_size": 1024},
    "gpt_neox-serial": {"intermediate_size": 1024},
    "glm": {"partial_rotary_factor": 1.0},
}
DEFAULT = ("llama", "phi3", "gemma3_text", "granite4")


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in DEFAULT else pytest.mark.slow) for f in FAMILIES],
)
def test_mlx_lm_agrees(exported: Exports, family: str) -> None:
    made = exported("mlx", family, make=OTHERS.get(family), bits=4, group_size=32)
    context = min(64, made.plan.max_context)
    runtime = get_format("mlx").open_runtime(made.path, context=context, threads=1)
    tokens = made.tokens(min(40, context))
    whole = runtime.logits(tokens)
    assert runtime.name.startswith("mlx 0.") and "whole and cached" in runtime.name
    assert np.isfinite(whole).all()
    sequence = tokens[:4]
    for token in greedy(runtime, sequence, min(12, context - 5)):  # of the reference decoder
        sequence.append(token)
    runtime.close()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_mlx_lm_reads_mxfp4(exported: Exports, family: str) -> None:
    """With 8-bit affine matrices among them; decoded bit for bit, or the runtime refuses."""
    made = exported("mlx", family, mode="mxfp4", embedding_bits=8)
    grids = {entry.grid.partition("-")[0] for entry in made.plan.entries}
    assert grids >= {"mxfp4", "affine8"}
    runtime = get_format("mlx").open_runtime(made.path, context=32, threads=1)
    runtime.logits(made.tokens(32))
    assert "whole and cached" in runtime.name
    runtime.close()


def test_a_difference_is_noticed(exported: Exports) -> None:
    """mlx-lm has no window for mistral, so beyond the window it is another model."""
    made = exported("mlx", "mistral", make={"sliding_window": 8}, bits=4, group_size=32)
    assert made.plan.max_context == 8
    opened = get_format("mlx").open_runtime
    assert np.isfinite(opened(made.path, context=8, threads=1).logits(made.tokens(8))).all()
    with pytest.raises(ArtifactError, match=r"logits \(whole\) are .* nats from the reference"):
        opened(made.path, context=30, threads=1).logits(made.tokens(30))


def test_a_folder_that_mlx_lm_refuses(exported: Exports, tmp_path: Path) -> None:
    made = exported("mlx", "llama", bits=4, group_size=32)
    for path in made.path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    keys = json.loads((tmp_path / "config.json").read_text())
    keys["quantization"]["model.norm"] = {"bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    runtime = get_format("mlx").open_runtime(tmp_path, context=32, threads=1)
    with pytest.raises(ArtifactError, match="mlx-lm cannot run it: ValueError: Unable to quantize"):
        runtime.feed(made.tokens(8))


def test_a_committed_file_is_what_mlx_makes(tmp_path: Path) -> None:
    here = Path(__file__).resolve().parents[2]
    made = tmp_path / "made.npz"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    script = here / "mlx_oracle.py"
    subprocess.run([PYTHON, str(script), str(made)], check=True, env=environment)
    with np.load(made) as now, np.load(here / "data" / "mlx_affine.npz") as before:
        assert set(now) == set(before)
        for name in now:
            assert np.array_equal(now[name], before[name]), name
