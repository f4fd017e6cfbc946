"""Statistics are those of the source; a transform changes the weights of its own target only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from compress.build.write import target_weights, write_artifacts
from compress.calibration.step import CalibrationStep, Importance
from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.checkpoint.sources import Source
from compress.console import Console
from compress.plan.job import Job, prepare
from compress.plan.transform import Changed, Transform
from compress.recipe import load

SETTINGS = (
    "quantize.solver=scale_search",
    "calibration.tokens=256",
    "calibration.sequence_length=64",
)


class LouderNorms(Stored):
    """Another model: the inputs of its q, k and v are twice as large."""

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        values = super().read(name, rows)
        return 2 * values if name.endswith("input_layernorm.weight") else values

    def fingerprint(self) -> str:
        return f"louder {super().fingerprint()}"


class Instead(Transform):
    """Another source in the place of a target's."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def apply(self, plan, source, statistics, windows, console) -> Changed:
        return Changed(self.source, statistics, "louder norms")


@pytest.fixture
def job(tmp_path, monkeypatch) -> Job:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    folder = tiny.make("llama", tmp_path / "model", tie_word_embeddings=False)
    recipe = load("phone-4bit", SETTINGS, ["gguf", "onnx"])
    return prepare(Checkpoint.open(folder), recipe, transforms={})


def step(job: Job) -> CalibrationStep:
    return CalibrationStep(job, Importance(), Console(), threads=1)


def walks(tmp_path: Path) -> int:
    return len(list((tmp_path / "cache" / "calibration").iterdir()))


def test_targets_of_one_source_share_its_walk(job, tmp_path):
    calibration = step(job)
    for plan in job.plans:
        ledger = tmp_path / f"{plan.format}.ledger"
        weights, _ = target_weights(plan, job, calibration, Console(), tmp_path, ledger)
        assert weights.source is job.source
        assert weights.statistics.for_weight("blocks.1.o_proj.weight").count == 256
        assert walks(tmp_path) == 1


def test_a_transform_changes_its_own_target_only(job, tmp_path):
    import onnx
    from gguf import GGUFReader

    louder = LouderNorms(job.checkpoint, job.config)
    job = replace(job, transforms={"onnx": [Instead(louder)]})
    folder = tmp_path / "out"
    folder.mkdir()
    artifacts = write_artifacts(job, step(job), folder, Console())
    assert ["louder norms" in artifact.notes for artifact in artifacts] == [False, True]
    gguf_file, onnx_folder = (artifact.path for artifact in artifacts)
    name = "blocks.0.input_layernorm.weight"
    stored = job.source.read(name)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(gguf_file).tensors}
    assert (tensors["blk.0.attn_norm.weight"] == stored).all()
    entry = next(e for e in job.plans[1].entries if e.name == name)
    (path,) = onnx_folder.glob("onnx/*.onnx")
    initializers = {i.name: i for i in onnx.load(path).graph.initializer}
    found = onnx.numpy_helper.to_array(initializers[entry.target_name])
    np.testing.assert_allclose(found.astype(np.float32), 2 * stored, rtol=1e-3)
