"""Each target is written from its own source, with the statistics of that source's inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny

from compress.build.write import prepare_target, write_artifacts
from compress.calibration.step import CalibrationStep, Importance
from compress.checkpoint.checkpoint import Checkpoint
from compress.checkpoint.sources import Source, Stored
from compress.console import Console
from compress.plan.job import Job, prepare
from compress.plan.transform import Transform
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

    def seen(self, source: Source) -> Source:
        return self.source


@pytest.fixture
def job(tmp_path, monkeypatch) -> Job:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    folder = tiny.make("llama", tmp_path / "model", tie_word_embeddings=False)
    recipe = load("phone-4bit", SETTINGS, ["gguf", "onnx"])
    return prepare(Checkpoint.open(folder), recipe)


def step(job: Job) -> CalibrationStep:
    return CalibrationStep(job, Importance(), Console(), threads=1)


def walks(tmp_path: Path) -> int:
    return len(list((tmp_path / "cache" / "calibration").iterdir()))


def test_targets_of_one_source_share_its_walk(job, tmp_path):
    calibration = step(job)
    for plan in job.plans:
        inputs = prepare_target(plan, job, calibration, Console())
        assert inputs.source is job.source
        assert inputs.statistics.for_weight("blocks.1.o_proj.weight").count == 256
        assert walks(tmp_path) == 1


def test_a_target_with_weights_of_its_own_has_their_statistics(job, tmp_path):
    louder = LouderNorms(job.checkpoint, job.config)
    job = replace(job, transforms={"onnx": [Instead(louder)]})
    calibration = step(job)
    common, own = (prepare_target(plan, job, calibration, Console()) for plan in job.plans)
    assert (common.source, own.source) == (job.source, louder)
    assert walks(tmp_path) == 2
    quiet, loud = (
        inputs.statistics.for_weight("blocks.0.q_proj.weight").importance
        for inputs in (common, own)
    )
    np.testing.assert_allclose(loud, 4 * quiet, rtol=0.02)  # states are in bfloat16


def test_each_artifact_holds_its_own_source(job, tmp_path):
    import onnx
    from gguf import GGUFReader

    louder = LouderNorms(job.checkpoint, job.config)
    job = replace(job, transforms={"onnx": [Instead(louder)]})
    folder = tmp_path / "out"
    folder.mkdir()
    gguf_file, onnx_folder = (a.path for a in write_artifacts(job, step(job), folder, Console()))
    name = "blocks.0.input_layernorm.weight"
    stored = job.source.read(name)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(gguf_file).tensors}
    assert (tensors["blk.0.attn_norm.weight"] == stored).all()
    entry = next(e for e in job.plans[1].entries if e.name == name)
    (path,) = onnx_folder.glob("onnx/*.onnx")
    initializers = {i.name: i for i in onnx.load(path).graph.initializer}
    found = onnx.numpy_helper.to_array(initializers[entry.target_name])
    np.testing.assert_allclose(found.astype(np.float32), 2 * stored, rtol=1e-3)
