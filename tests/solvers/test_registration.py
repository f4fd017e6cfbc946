"""A grid or a solver of another package: a file and a row, without editing packlight."""

from __future__ import annotations

import doctest
import json
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from commands import packlight

from compress import __main__ as cli
from compress import grids, recipe, solvers
from compress.allocation.effort import effort_for
from compress.decoder.config import DecoderConfig
from compress.errors import GridError, UsageError
from compress.grids import Grid, Quantized, get_grid, register_grid
from compress.solvers import quantize, register_solver

ROOT = Path(__file__).resolve().parents[2]
TERNARY = '''
"""ternary-g16: w = scale * (code - 1), one float32 scale for 16 columns."""

from dataclasses import dataclass

import numpy as np

from compress.errors import GridError
from compress.grids import BaseGrid


@dataclass(frozen=True)
class Ternary(BaseGrid):
    group_size: int
    bits: int = 2
    symmetric: bool = True

    @property
    def name(self):
        return f"ternary-g{self.group_size}"

    def check(self, shape):
        if shape[1] % self.group_size:
            raise GridError(f"{self.name}: {shape[1]} columns")

    def nbytes(self, shape):
        return shape[0] * shape[1] // 4 + 4 * shape[0] * shape[1] // self.group_size

    def fit(self, weight, importance=None):
        groups = np.abs(weight).reshape(len(weight), -1, self.group_size)
        shares = 1 if importance is None else importance.reshape(-1, self.group_size)
        scale = np.average(groups, axis=2, weights=np.broadcast_to(shares, groups.shape))
        return {"scale": scale.astype(np.float32)}

    def encode(self, weight, params):
        scale = np.repeat(params["scale"], self.group_size, axis=1)
        return (np.clip(np.rint(weight / scale), -1, 1) + 1).astype(np.uint8)

    def decode(self, codes, params):
        scale = np.repeat(params["scale"], self.group_size, axis=1)
        return (codes.astype(np.float32) - 1) * scale

    def pack(self, codes, params):
        return {"codes": codes, **params}


def make(name):
    return Ternary(int(name.removeprefix("ternary-g")))
'''
SOLVERS = """
from compress.grids import Quantized

def same(weight, grid, stats):
    assert stats is None
    return grid.quantize(weight)

def searching(weight, grid, stats):
    return grid.quantize(weight, None if stats is None else stats.importance)

searching.needs = "importance"

def crooked(weight, grid, stats):
    found = grid.quantize(weight)
    return Quantized(found.codes, found.params, grid, (1, 1))
"""
# "broken" cannot be imported; rtn is packlight's own whatever others call so.
POINTS = """
[packlight.solvers]
same = others_solvers:same
searching = others_solvers:searching
crooked = others_solvers:crooked
broken = others_solvers_that_are_not_there:solve
rtn = others_solvers_that_are_not_there:solve
"""


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory) -> dict[str, bytes]:
    """What rtn writes."""
    return built(model, tmp_path_factory.mktemp("plain"), "rtn")


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """The tables as they were."""
    kept = dict(grids.GRIDS), dict(recipe.SOLVERS)
    yield
    for rows, before in zip((grids.GRIDS, recipe.SOLVERS), kept, strict=True):
        rows.clear()
        rows.update(before)


def built(model: Path, out: Path, solver: str, *options: str) -> dict[str, bytes]:
    """The files of a build in this process, by name."""
    command = ["build", str(model), "-f", "gguf", "-f", "onnx", "-o", str(out / "out"), "-q"]
    chosen = ["--no-verify", "--set", f"quantize.solver={solver}", *options]
    assert cli.main([*command, *chosen]) == 0
    return artifacts(out / "out")


def artifacts(out: Path) -> dict[str, bytes]:
    files = [p for name in ("gguf", "onnx") for p in (out / name).rglob("*") if p.is_file()]
    assert any(path.suffix == ".gguf" for path in files)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def test_a_grid_is_a_file_and_a_row(weight, tmp_path, monkeypatch):
    (tmp_path / "others_grid.py").write_text(TERNARY)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(GridError, match="no grid 'ternary-g16'"):
        get_grid("ternary-g16")
    register_grid(r"ternary-g\d+", "others_grid")
    grid = get_grid("ternary-g16")
    assert isinstance(grid, Grid)
    assert (grid.bits, grid.group_size, grid.group_rows, grid.symmetric) == (2, 16, 1, True)
    found = quantize(weight, "ternary-g16")
    assert found.bits_per_weight == 2 + 32 / 16 and found.grid == grid
    scale = np.abs(weight).reshape(32, 4, 16).mean(axis=2)
    steps = np.clip(np.rint(weight.reshape(32, 4, 16) / scale[..., None]), -1, 1)
    np.testing.assert_allclose(
        found.decode().reshape(32, 4, 16), steps * scale[..., None], rtol=1e-6
    )
    weighted = quantize(weight, grid, importance=np.arange(64))
    assert not np.array_equal(weighted.params["scale"], found.params["scale"])
    with pytest.raises(GridError, match="ternary-g16: 40 columns"):
        quantize(weight[:, :40], "ternary-g16")


def test_a_registered_grid_takes_no_name_of_ours():
    register_grid(r"int4-.*|mine", lambda name: get_grid("F16"))
    assert get_grid("int4-g32").bits == 4
    assert get_grid("mine").bits == 16
    register_grid(r"int4-.*|mine", lambda name: get_grid("F32"))  # the row again
    assert get_grid("mine").bits == 32


def test_a_registered_solver_builds_by_its_name(model, plain, tmp_path):
    seen = []

    def copy(weight, grid, stats):
        seen.append(stats)
        return grid.quantize(weight)

    with pytest.raises(UsageError, match="unknown solver 'copy'"):
        solvers.get_solver("copy")
    register_solver("copy", copy)
    assert built(model, tmp_path, "copy") == plain
    assert len(seen) > 10 and set(seen) == {None}


def test_a_registered_solver_is_given_what_it_needs(model, plain, tmp_path, monkeypatch):
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    seen = []

    def look(weight, grid, stats):
        seen.append(stats)
        return grid.quantize(weight)

    register_solver("look", look, needs="importance")
    texts = ("--set", "calibration.tokens=256", "--set", "calibration.sequence_length=32")
    files = built(model, tmp_path, "look", *texts, "--set", "calibration.propagate=float")
    assert files.keys() == plain.keys()
    some = [stats for stats in seen if stats is not None]
    assert some and all(stats.importance.min() >= 0 and stats.hessian is None for stats in some)


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """The folder where another package of solvers is installed."""
    place = tmp_path / "site"
    place.mkdir()
    (place / "others_solvers.py").write_text(SOLVERS)
    info = place / "others_solvers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others-solvers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(textwrap.dedent(POINTS))
    monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, "others_solvers", raising=False)
    return place


def test_an_installed_solver_builds_by_its_name(model, plain, installed, tmp_path):
    chosen = ("-f", "gguf", "-f", "onnx", "--no-verify", "--set", "quantize.solver=same")
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{installed}"}
    done = packlight("build", model, "-o", "out", *chosen, cwd=tmp_path, env=path)
    assert done.returncode == 0, done.stderr
    assert artifacts(tmp_path / "out") == plain
    assert "solver: same" in (tmp_path / "out" / "recipe.yaml").read_text()


def test_an_installed_solver_says_what_it_needs(installed):
    assert recipe.needs_of("searching") == "importance"
    assert recipe.needs_of("same") is None
    assert recipe.needs_of("rtn") is None  # packlight's own, whatever others call so
    assert recipe.load("int4-fast", ["quantize.solver=searching"]).solver == "searching"
    weight = np.random.default_rng(2).standard_normal((4, 64)).astype(np.float32)
    importance = np.arange(64, dtype=np.float32)
    found, expected = (
        quantize(weight, "Q4_0", importance, "searching"),
        get_grid("Q4_0").quantize(weight, importance),
    )
    assert np.array_equal(found.codes, expected.codes)


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ("broken", "error: solver 'broken' cannot be loaded: No module named"),
        ("crooked", "error: solver 'crooked' returned something else than"),
        ("sime", "quantize.solver: 'sime' is not allowed"),
    ],
)
def test_a_solver_that_cannot_serve_is_one_line(
    model, installed, tmp_path, solver, message, capsys
):
    command = ["build", str(model), "-f", "gguf", "-o", str(tmp_path / "out"), "--no-verify"]
    assert cli.main([*command, "--set", f"quantize.solver={solver}"]) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
    if solver == "sime":
        assert "same" in told.partition("hint:")[2]  # installed ones are known, too
    assert not (tmp_path / "out").exists()


def test_costs_that_are_kept_by_name_are_those_of_our_solvers(model):
    config = DecoderConfig.from_hf(json.loads((model / "config.json").read_text()))
    register_solver("plain", lambda weight, grid, stats: grid.quantize(weight))
    register_solver("look", lambda weight, grid, stats: grid.quantize(weight), "hessian")
    assert effort_for(config, "plain").solver == "rtn"
    assert effort_for(config, "look").solver == "scale_search"
    assert effort_for(config, "gptq").solver == "gptq"


def test_solvers_that_cannot_be_registered():
    def solve(weight, grid, stats):
        return grid.quantize(weight)

    with pytest.raises(UsageError, match="'gptq' is packlight's own"):
        register_solver("gptq", solve)
    with pytest.raises(UsageError, match="needs 'fisher'"):
        register_solver("mine", solve, needs="fisher")
    with pytest.raises(UsageError, match="no function"):
        register_solver("mine", "solve")
    assert "mine" not in recipe.solver_names()


@pytest.mark.parametrize("name", ["Q4_K", "int4-g32", "lut4-g8", "F16"])
def test_quantize_is_what_a_build_does(name):
    draw = np.random.default_rng(1)
    weight = draw.standard_normal((16, 256)).astype(np.float32)
    importance = draw.lognormal(0, 1, 256)
    grid = get_grid(name)
    stats = solvers.LayerStats(1, importance.astype(np.float32))
    for found, expected in (
        (quantize(weight, name), solvers.rtn(weight, grid)),
        (quantize(weight.tolist(), grid, importance), solvers.scale_search(weight, grid, stats)),
        (quantize(weight, grid, importance, "rtn"), solvers.rtn(weight, grid)),
    ):
        assert isinstance(found, Quantized) and found.shape == (16, 256)
        assert np.array_equal(found.codes, expected.codes)
        assert np.array_equal(found.decode(), expected.decode())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros((2, 32)), "Q4_K"), GridError, "not whole blocks of 256"),
        ((np.zeros((2, 32)), "Q9_K"), GridError, "no grid 'Q9_K'"),
        ((np.full((2, 32), np.nan), "Q8_0"), GridError, "not finite"),
        ((np.zeros(32), "Q8_0"), UsageError, "not 1 dimensions"),
        ((np.zeros((2, 32)), "Q8_0", np.zeros(31)), UsageError, "not 32 numbers"),
        ((np.zeros((2, 32)), "Q8_0", np.full(32, np.nan)), UsageError, "not 32 numbers"),
        ((np.zeros((2, 32)), "Q8_0", None, "scale_search"), UsageError, "needs the importance"),
        ((np.zeros((2, 32)), "Q8_0", np.ones(32), "gptq"), UsageError, "needs second moments"),
        ((np.zeros((2, 32)), "Q8_0", None, "gptk"), UsageError, "unknown solver 'gptk'"),
    ],
)
def test_quantize_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        quantize(*arguments)


@pytest.mark.parametrize("module", [grids, solvers])
def test_examples_run(module):
    results = doctest.testmod(module)
    assert results.attempted >= 3 and results.failed == 0
