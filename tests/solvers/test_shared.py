"""Codes that targets share: the bytes of each written alone, and every weight solved once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

from compress.build import write
from compress.build.write import write_artifacts
from compress.calibration.step import CalibrationStep, Importance
from compress.checkpoint.checkpoint import Checkpoint
from compress.console import Console
from compress.grids import get_grid
from compress.plan.job import Job, prepare
from compress.recipe import load
from compress.solvers import scale_search
from compress.solvers.shared import Solutions

SETTINGS = ("calibration.tokens=2048", "calibration.sequence_length=64")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tiny.make("phi3", tmp_path_factory.mktemp("models") / "tiny-phi3")
    return Checkpoint.open(folder)


def job_of(model: Checkpoint, formats: list[str], *settings: str) -> Job:
    return prepare(model, load("phone-4bit", (*SETTINGS, *settings), formats), transforms={})


def files(folder: Path, format: str) -> dict[str, bytes]:
    found = sorted(path for path in (folder / format).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def written(job: Job, folder: Path) -> dict[str, tuple[str, ...]]:
    folder.mkdir()
    step = CalibrationStep(job, Importance(), Console(), threads=1)
    return {a.format: a.notes for a in write_artifacts(job, step, folder, Console())}


def test_targets_of_one_grid_are_solved_once_and_have_the_bytes_of_each_alone(
    model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    solved: dict[str, int] = {}
    real = write.get_solver

    def counted(name):
        solve = real(name)

        def one(weight, grid, stats):
            solved[grid.name] = solved.get(grid.name, 0) + weight.size
            return solve(weight, grid, stats)

        return one

    monkeypatch.setattr(write, "get_solver", counted)
    alone, notes, sizes = {}, {}, {}
    for format in ("onnx", "coreml"):
        notes |= written(job_of(model, [format]), tmp_path / format)
        alone |= files(tmp_path / format, format)
        sizes[format] = solved.copy()
        solved.clear()
    together = job_of(model, ["onnx", "coreml"])
    assert written(together, tmp_path / "both") == notes
    assert any("as scale_search leaves them" in note for note in notes["coreml"])
    both = files(tmp_path / "both", "onnx") | files(tmp_path / "both", "coreml")
    assert both == alone
    assert solved["int4-g32"] == sizes["onnx"]["int4-g32"] == sizes["coreml"]["int4-g32"]


def test_rows_are_found_across_pieces_and_members_or_not_at_all(model: Checkpoint) -> None:
    job = job_of(model, ["onnx", "coreml"])
    solutions = Solutions(job.source.config, job.plans)
    rows, columns = job.source.config.weight_shape("q_proj")
    name, grid = "blocks.0.q_proj.weight", get_grid("int4-g32")
    both = list(solutions.members("blocks.0.qkv_proj.weight", slice(rows - 2, rows + 3)))
    assert both == [(name, slice(rows - 2, rows)), ("blocks.0.k_proj.weight", slice(0, 3))]

    weight = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    solutions.begin(name)
    for part in (slice(0, 5), slice(5, 9)):
        solutions.keep("onnx", name, part, scale_search(weight[part], grid))
    (first, second) = solutions.find(name, grid, slice(3, 8)) or ()
    np.testing.assert_array_equal(first.decode(), scale_search(weight[3:5], grid).decode())
    np.testing.assert_array_equal(second.decode(), scale_search(weight[5:8], grid).decode())
    assert solutions.find(name, grid, slice(7, 10)) is None
    assert solutions.find(name, get_grid("int4-g64"), slice(3, 8)) is None
    solutions.begin("blocks.1.q_proj.weight")
    assert solutions.find(name, grid, slice(3, 8)) is None


def test_nothing_is_held_beyond_a_share_of_the_memory(
    model: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.solvers.shared.available_memory", lambda: 1 << 10)
    job = job_of(model, ["onnx", "coreml"])
    solutions = Solutions(job.source.config, job.plans)
    name, grid = "blocks.0.q_proj.weight", get_grid("int4-g32")
    weight = np.ones(job.source.config.weight_shape("q_proj"), np.float32)
    solutions.begin(name)
    solutions.keep("onnx", name, slice(0, len(weight)), scale_search(weight, grid))
    assert solutions.find(name, grid, slice(0, 4)) is None
