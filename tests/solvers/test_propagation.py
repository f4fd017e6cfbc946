"""Blocks with inputs from quantized blocks: the statistics are those of transformers' model with
the decoded weights, and the codes those of the solver for these statistics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import writing
from commands import packlight
from hooked import Model, distance, draw_windows, hooked, parameter_rows

from compress.calibration.statistics import LayerStats, Statistics
from compress.calibration.walk import walk_beside
from compress.decoder.config import split_name, stored_block
from compress.decoder.decoder import reader
from compress.grids import get_grid
from compress.plan.shapes import Plan
from compress.plan.weights import Ledger
from compress.solvers import get_solver
from compress.solvers.propagation import DAMPING, SHARE, PropagatedWeights, shifts

# Family, format, settings: fused and separate tensors, one and two runs of a stored block, norms in
# float32 and float16, groups along columns, of rows, and of the whole tensor.
CASES = [
    ("llama", "gguf", {"type": "Q3_K_M"}),
    ("phi3", "gguf", {"type": "Q4_0"}),
    ("phi", "onnx", {"bits": 4, "group_size": 32}),
    ("mobilellm", "gguf", {"type": "Q4_K_M"}),
    ("mobilellm", "coreml", {"grid": "lut4-g8"}),
    ("qwen3", "coreml", {"grid": "lut3-tensor"}),
]
NAMES = [f"{family}-{target}-{next(iter(s.values()))}" for family, target, s in CASES]


class Case:
    """A tiny model, its plan for one target, and every tensor as its artifact has it."""

    def __init__(self, family: str, target: str, settings: dict, solver: str, folder: Path) -> None:
        more = {"layer_sharing": True} if family == "mobilellm" else {}
        self.model = Model(family, folder, **more)
        self.config = self.model.config
        self.plan: Plan = writing.plan_for(target, self.config, settings)
        self.solver, self.windows = solver, draw_windows(6)
        self.weights = PropagatedWeights(self.model, self.plan, solver, self.windows)
        self.solved, self.decoded = {}, {}
        for entry in self.plan.entries:
            if entry.name.startswith("rope."):
                continue
            grid = get_grid(entry.grid)
            if len(entry.shape) == 2:
                self.solved[entry.name] = self.weights.quantize(entry.name, grid)
                self.decoded[entry.name] = self.solved[entry.name].decode()
            else:
                self.decoded[entry.name] = grid.quantize(self.model.read(entry.name)).decode()

    def decoded_weight(self, name: str) -> np.ndarray:
        """A weight under the decoder's names; repeats that the plan leaves out are the block's."""
        block, role, kind = split_name(name)
        read = reader(self.config, self.decoded)
        try:
            return read(name)
        except KeyError:
            return read(f"blocks.{stored_block(self.config, block)}.{role}.{kind}")

    def statistics(self, *, exact: bool = False) -> dict[str, LayerStats]:
        stats: dict[str, LayerStats] = {}
        walked = walk_beside(
            self.config, self.model.read, self.decoded_weight, self.windows, exact=exact
        )
        for found in walked:
            stats |= found
        return stats


@pytest.fixture(scope="module", params=CASES, ids=NAMES)
def case(request, tmp_path_factory) -> Case:
    return Case(*request.param, "gptq", tmp_path_factory.mktemp("model"))


def test_statistics_are_those_of_a_model_with_decoded_weights(case):
    """Weights are replaced block by block: a block's inputs come of decoded weights before it, and
    of its own float weights."""
    import torch

    found = case.statistics(exact=True)
    reference = tiny.reference(case.model.folder)
    parameters = dict(reference.named_parameters())
    names = [name for name in case.model.map.names() if not name.startswith("lm_head")]

    def replace(block: int | None) -> None:
        for name in names:
            at, role, _ = split_name(name)
            at = None if at is None else stored_block(case.config, at)
            if at == block and (at is not None or role == "embed_tokens" or block is None):
                path, rows = parameter_rows(case.model, name)
                with torch.no_grad():
                    parameters[path][rows] = torch.from_numpy(case.decoded_weight(name).copy())

    replace(None)
    expected: dict[str, np.ndarray] = {}
    for block in range(0, case.config.num_hidden_layers, case.config.block_repeat):
        inputs = hooked(case.model, reference, case.windows)
        expected |= {k: x for k, x in inputs.items() if k.startswith(f"blocks.{block}.")}
        replace(block)
    expected["lm_head"] = hooked(case.model, reference, case.windows)["lm_head"]
    assert list(found) == list(expected)
    floats = hooked(case.model, tiny.reference(case.model.folder), case.windows)
    for key, x in expected.items():
        assert distance(found[key].importance, (x * x).mean(0)) < 1e-4, key
        assert distance(found[key].mean, x.mean(0)) < 1e-4, key
        (hessian,) = found[key].hessian
        assert distance(hessian, x.T @ x / len(x)) < 1e-4, key
        drift = floats[key] - x
        assert np.abs(drift).max() > 1e-3 * np.abs(x).max(), key
        assert distance(found[key].drift[0], drift.T @ x / len(x)) < 1e-3, key


def test_codes_are_the_solvers_on_those_statistics(case):
    stats = case.statistics()
    statistics = Statistics.of(case.config, stats)
    solve = get_solver(case.solver)
    for entry in case.plan.entries:
        if entry.name not in case.solved:
            continue
        weight = case.model.read(entry.name)
        known = statistics.for_weight(entry.name)
        if known is not None:  # nearer to the float model's outputs
            weight = weight + SHARE * (weight @ shifts(known)[0])
        again = solve(weight, get_grid(entry.grid), known)
        assert (again.codes == case.solved[entry.name].codes).all(), entry.name
        for key, values in again.params.items():
            assert (values == case.solved[entry.name].params[key]).all(), (entry.name, key)


def test_leaning_weights_meet_the_float_outputs_best():
    """The full shift is the least-squares fit of the float model's outputs."""
    draw = np.random.default_rng(2)
    floats = draw.standard_normal((400, 24)) @ draw.standard_normal((24, 24))
    x = floats @ (np.eye(24) + 0.2 * draw.standard_normal((24, 24)))
    x += draw.standard_normal(x.shape)
    weight = draw.standard_normal((5, 24))
    hessian, drift = x.T @ x / 400, (floats - x).T @ x / 400
    stats = LayerStats(
        400, np.float32(np.diagonal(hessian)), None, (np.float32(hessian),), None,
        (np.float32(drift),),
    )  # fmt: skip
    ridge = np.sqrt(400 * DAMPING * np.diagonal(hessian).mean()) * np.eye(24)
    # Rows that pull the answer to the float weights stand for the damping.
    rows, target = np.concatenate([x, ridge]), np.concatenate([floats @ weight.T, ridge @ weight.T])
    expected, *_ = np.linalg.lstsq(rows, target)
    found = weight + weight @ shifts(stats)[0]
    np.testing.assert_allclose(found, expected.T, rtol=0, atol=1e-3)
    assert (shifts(replace(stats, hessian=(-stats.hessian[0],)))[0] == 0).all()


def test_slabs_are_rows_of_the_whole(case):
    entry = next(e for e in case.plan.entries if "q" in e.name and len(e.shape) == 2)
    grid = get_grid(entry.grid)
    rows = entry.shape[0]
    step = rows if entry.grid.endswith("-tensor") else rows // 4  # such a table is for all rows
    parts = [
        case.weights.quantize(entry.name, grid, slice(start, start + step)).pack()
        for start in range(0, rows, step)
    ]
    for key, whole in case.solved[entry.name].pack().items():
        assert (np.concatenate([part[key] for part in parts]) == whole).all()


def test_one_walk_feeds_a_writer(monkeypatch, tmp_path):
    """Writers read blocks in order; a second pass restarts the walk, with the same result."""
    model = Model("llama", tmp_path)
    starts = []
    original = PropagatedWeights._start

    def start(self) -> None:
        starts.append(self)
        original(self)

    monkeypatch.setattr(PropagatedWeights, "_start", start)
    for target in ("gguf", "onnx", "coreml"):
        plan = writing.plan_for(target, model.config, {}, model_name="m")
        weights = PropagatedWeights(model, plan, "scale_search", draw_windows(2))
        written = []
        for folder in (tmp_path / f"{target}-1", tmp_path / f"{target}-2"):
            folder.mkdir()
            starts.clear()
            writing.write(plan, weights, folder)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            written.append([path.read_bytes() for path in files if path.suffix != ".json"])
            assert len(starts) == len(written) - 1, target
        assert written[0] == written[1]


@pytest.mark.parametrize(
    ("target", "solver"), [("gguf", "gptq"), ("onnx", "scale_search"), ("coreml", "scale_search")]
)
def test_a_walk_that_was_cut_off_goes_on_with_the_block_that_it_was_at(target, solver, tmp_path):
    model = Model("phi3", tmp_path, num_hidden_layers=3)
    windows = draw_windows(4)
    plan = writing.plan_for(target, model.config, {}, model_name="m")
    solved: list[str] = []

    class CutOff(Exception):
        pass

    class Counted(PropagatedWeights):
        def _solve_block(self, statistics: Statistics) -> None:
            solved.append(f"block {self._block}")
            super()._solve_block(statistics)

        def quantize(self, name, grid, rows=None):
            found = super().quantize(name, grid, rows)
            if name.startswith(stop):
                raise CutOff
            return found

    def write(name: str) -> list[bytes]:
        folder, state = tmp_path / name, tmp_path / f"{name}-state"
        for each in (folder, state):
            each.mkdir(exist_ok=True)
        weights = Counted(
            model, plan, solver, windows,
            ledger=Ledger(state / "ledger", "t"), states=state / "states",
        )  # fmt: skip
        writing.write(plan, weights, folder)
        return [path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()]

    stop = "none"
    whole = write("whole")
    assert solved == ["block 0", "block 1", "block 2"]
    # Within a block, at the first matrix of the next, and in the head.
    for stop, done, left in (
        ("blocks.1.down_proj", 2, ["block 1", "block 2"]),
        ("blocks.2.", 3, ["block 2"]),
        ("lm_head", 3, []),
    ):
        solved.clear()
        with pytest.raises(CutOff):
            write(stop)
        assert len(solved) == done
        cut_off, stop = stop, "none"
        assert write(cut_off) == whole
        assert solved[done:] == left
        solved.clear()
        assert write(cut_off) == whole  # nothing is left to do, so nothing is walked
        assert solved == []


def test_states_of_a_forgotten_target_are_not_gone_on_with(tmp_path):
    model = Model("llama", tmp_path)
    plan = writing.plan_for("gguf", model.config, {}, model_name="m")
    states, windows = tmp_path / "states", draw_windows(2)
    name = next(e.name for e in plan.entries if e.name.startswith("blocks.1") and len(e.shape) == 2)

    def codes(ledger: Ledger) -> bytes:
        weights = PropagatedWeights(
            model, plan, "scale_search", windows, ledger=ledger, states=states
        )
        return weights.quantize(name, get_grid("Q4_0")).codes.tobytes()

    expected = codes(Ledger())
    (kept,) = states.glob("block-*.bin")
    kept.write_bytes(bytes(kept.stat().st_size))  # of other weights
    assert codes(Ledger()) == expected


def test_a_build_says_how_its_blocks_were_fed(tmp_path):
    found, model = {}, tiny.make("phi3", tmp_path / "model")
    for propagate in ("float", "quantized"):
        done = packlight(
            "build", model, "-f", "gguf", "-o", propagate, "--json", "--no-verify",
            "--set", "quantize.solver=gptq", "--set", f"calibration.propagate={propagate}",
            "--set", "calibration.tokens=512", "--set", "calibration.sequence_length=64",
            "--threads", 1,
            cwd=tmp_path, env={"PACKLIGHT_CACHE": str(tmp_path / "cache")},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        found[propagate] = report["notes"][-1], next((tmp_path / propagate).glob("gguf/*.gguf"))
    line = "Codes chosen by gptq, calibrated on 512 tokens of builtin"
    assert found["float"][0] == line
    assert found["quantized"][0] == f"{line} through the quantized blocks before each"
    assert found["float"][1].read_bytes() != found["quantized"][1].read_bytes()
    assert not list((tmp_path / "quantized").glob("packlight-*"))
