"""AWQ: finds folds where columns were scaled on purpose, and none without a gain."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from compress import __main__ as cli
from compress.build.write import write_artifacts
from compress.calibration.statistics import LayerStats, Statistics
from compress.calibration.step import CalibrationStep, Importance
from compress.calibration.walk import walk
from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.checkpoint.sources import Source
from compress.console import Console
from compress.decoder.config import DecoderConfig, WeightMap
from compress.errors import RecipeError, UsageError
from compress.grids import get_grid
from compress.plan.job import prepare
from compress.plan.shapes import Plan, PlanEntry
from compress.pruning.transforms import transforms_of
from compress.recipe import load
from compress.solvers import get_solver
from compress.solvers.awq import Found, search
from compress.solvers.folding import Folded, fold_statistics
from compress.solvers.half_blocks import HalfTrial, HeadTrial, halves, some_rows

LENGTH = 32


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Source and statistics of a tiny model, by family; 32 windows, two of them held back."""
    made: dict[str, tuple[Stored, dict[str, LayerStats]]] = {}

    def get(family: str) -> tuple[Stored, Statistics]:
        if family not in made:
            folder = tiny.make(family, tmp_path_factory.mktemp(family), tokenizer=False)
            checkpoint = Checkpoint.open(folder)
            source = Stored(checkpoint, DecoderConfig.from_hf(checkpoint.config))
            windows = np.random.default_rng(0).integers(0, 480, (32, LENGTH)).tolist()
            stats: dict[str, LayerStats] = {}
            for found in walk(source.config, source.read, windows, hessian=True):
                stats |= found
            made[family] = source, stats
        source, stats = made[family]
        return source, Statistics.of(source.config, stats)

    return get


def plan_of(config: DecoderConfig, grid: str, *, blocks: int = 1) -> Plan:
    """Every linear of the first blocks, and the head, on one grid."""
    entries = []
    for name in WeightMap(config).names():
        shape = WeightMap(config).shape(name)
        inside = name.startswith(tuple(f"blocks.{block}." for block in range(blocks)))
        if len(shape) == 2 and (inside or name == "lm_head.weight"):
            size = get_grid(grid).nbytes((shape[0], shape[1]))
            entries.append(PlanEntry(name, name, grid, shape, size))
    return Plan("test", grid, "tiny", tuple(entries))


def spoil(source: Source, statistics: Statistics) -> tuple[Folded, Statistics]:
    """The same function with columns of very different size."""
    random = np.random.default_rng(1)
    config = source.config

    def scales(count: int) -> np.ndarray:
        return (8.0 ** random.uniform(-1, 1, count)).astype(np.float32)

    folds = {
        "blocks.0.q_proj": scales(config.hidden_size),
        "blocks.0.o_proj": scales(config.num_key_value_heads * config.head_dim),
        "blocks.0.gate_proj": scales(config.hidden_size),
        "blocks.0.down_proj": scales(config.intermediate_size),
        "lm_head": scales(config.hidden_size),
    }
    if config.tie_word_embeddings:
        del folds["lm_head"]
    return Folded(source, folds), fold_statistics(config, statistics, folds)


def look(source: Source, statistics: Statistics, plan: Plan, solver: str) -> Found:
    return search(source, statistics, plan, solver, length=LENGTH)


@pytest.mark.parametrize(
    ("family", "solver"), [("llama", "scale_search"), ("llama", "gptq"), ("qwen3", "scale_search")]
)
def test_scales_that_were_spoilt_are_found(known, family, solver):
    source, statistics = spoil(*known(family))
    plan = plan_of(source.config, "int4-g64")
    found = look(source, statistics, plan, solver)
    places = 4 + (not source.config.tie_word_embeddings)
    assert len(found.folds) == places
    for before, after in found.errors:
        assert after < 0.6 * before
    # The folds are what makes the difference: rounded with them, the head or the weight is nearer.
    for name in ("blocks.0.gate_proj.weight", "blocks.0.o_proj.weight"):
        folded = Folded(source, found.folds)
        after = fold_statistics(source.config, statistics, found.folds)
        errors = []
        for some, known_of in ((source, statistics), (folded, after)):
            weight, stats = some.read(name), known_of.for_weight(name)
            codes = get_solver(solver)(weight, get_grid("int4-g64"), stats)
            left = weight - codes.decode()
            held_back = stats.held_back
            errors.append(np.mean((held_back @ left.T) ** 2))
        assert errors[1] < 0.6 * errors[0]


def test_nothing_is_kept_that_does_not_help(known):
    """What stays float is not even tried, and no error grows."""
    source, statistics = known("llama")
    found = look(source, statistics, plan_of(source.config, "F16"), "gptq")
    assert found.folds == {} and found.errors == () and "0.0 %" in found.note()
    plan = plan_of(source.config, "int4-g32")
    found = look(source, statistics, plan, "gptq")
    assert all(after <= before for before, after in found.errors)


def test_a_half_is_measured_as_it_is_written_down(known):
    source, statistics = known("llama")
    config, grid = source.config, get_grid("int4-g32")
    entries = {f"blocks.0.{role}.weight": grid for role in ("gate_up_proj", "down_proj", "q_proj")}
    half = list(halves(config, 0))[1]
    trial = HalfTrial(source, statistics, half, entries, "scale_search", LENGTH)
    x = statistics.for_weight("blocks.0.gate_proj.weight").held_back.astype(np.float64)

    def mlp(read) -> np.ndarray:
        gate, up, down = (read(f"blocks.0.{r}_proj.weight") for r in ("gate", "up", "down"))
        inner = x @ gate.T
        return (inner / (1 + np.exp(-inner)) * (x @ up.T)) @ down.T

    def rounded(name: str) -> np.ndarray:
        solve, stats = get_solver("scale_search"), statistics.for_weight(name)
        return solve(source.read(name), grid, stats).decode()

    expected = np.mean((mlp(rounded) - mlp(source.read)) ** 2) / np.mean(mlp(source.read) ** 2)
    assert trial.error({}) == pytest.approx(expected, rel=1e-3)
    # A fold without rounding errors to gain from is no change: all in float.
    none = HalfTrial(source, statistics, half, {}, "scale_search", LENGTH)
    scale = np.linspace(0.5, 2, 512).astype(np.float32)
    assert none.error({"blocks.0.down_proj": scale}) < 1e-10
    head = HeadTrial(source, statistics, grid, "scale_search")
    x = statistics.for_weight("lm_head.weight").held_back
    left = rounded("lm_head.weight") - source.read("lm_head.weight")
    exact = x.astype(np.float64) @ source.read("lm_head.weight").T
    p, q = (np.exp(y) / np.exp(y).sum(1, keepdims=True) for y in (exact, exact + x @ left.T))
    assert head.error({}) == pytest.approx(np.mean(np.sum(p * np.log(p / q), 1)), rel=1e-3)


def test_a_parallel_block_is_one_half_with_one_input(known):
    source, statistics = known("phi")
    (half,) = halves(source.config, 1)
    assert half.sites == ("blocks.1.q_proj", "blocks.1.o_proj", "blocks.1.down_proj")
    plan = plan_of(source.config, "int4-g128")
    found = look(source, statistics, plan, "scale_search")
    assert "blocks.0.down_proj" not in found.folds  # GELU sits between
    assert len(found.errors) == 2  # the half of block 0, and the head


def test_rows_are_sampled_in_whole_palettes(known):
    source, _ = known("llama")
    weight = source.read("blocks.0.gate_proj.weight")
    found = some_rows(source, "blocks.0.gate_proj.weight", get_grid("lut4-g64"), 128)
    assert np.array_equal(found, np.concatenate([weight[:64], weight[-64:]]))
    whole = some_rows(source, "blocks.0.gate_proj.weight", get_grid("int4-g32"), 512)
    assert np.array_equal(whole, weight)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("solver", ["scale_search", "gptq"])
@pytest.mark.parametrize("silent", ["v_proj", "o_proj", "down_proj", "input_layernorm"])
def test_a_block_that_is_silent_has_no_folds_and_no_warnings(silent, solver, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tiny.make("llama", tmp_path, tokenizer=False)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if ".layers.0." in name and f".{silent}." in name:
            tensor.zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    source = Stored(checkpoint, DecoderConfig.from_hf(checkpoint.config))
    windows = np.random.default_rng(0).integers(0, 480, (16, LENGTH)).tolist()
    stats: dict[str, LayerStats] = {}
    for step in walk(source.config, source.read, windows, hessian=True):
        stats |= step
    plan = plan_of(source.config, "int4-g32")
    found = look(source, Statistics.of(source.config, stats), plan, solver)
    assert np.isfinite(found.errors).all()
    assert all(np.isfinite(scale).all() for scale in found.folds.values())
    assert "output error" in found.note()


def test_too_few_windows_are_told(known):
    source, _ = known("llama")
    windows = np.random.default_rng(0).integers(0, 480, (4, LENGTH)).tolist()
    stats: dict[str, LayerStats] = {}
    for found in walk(source.config, source.read, windows, hessian=True):
        stats |= found
    statistics = Statistics.of(source.config, stats)
    with pytest.raises(UsageError, match="too few calibration windows"):
        look(source, statistics, plan_of(source.config, "int4-g32"), "gptq")


# --- in a build -------------------------------------------------------------------------------


@pytest.mark.parametrize("propagate", ["float", "quantized"])
def test_a_folded_build_is_told_and_the_same_twice(tmp_path, monkeypatch, propagate):
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    folder = tiny.make("phi3", tmp_path / "model")
    settings = ["quantize.solver=scale_search", "quantize.fold=awq"]
    settings += ["calibration.tokens=1024", "calibration.sequence_length=32"]
    settings += [f"calibration.propagate={propagate}"]
    written = []
    for number in range(2):
        recipe = load("phone-4bit", settings, ["gguf"])
        job = prepare(Checkpoint.open(folder), recipe, transforms=transforms_of(recipe))
        step = CalibrationStep(job, Importance(), Console(), threads=1)
        (tmp_path / str(number)).mkdir()
        (artifact,) = write_artifacts(job, step, tmp_path / str(number), Console())
        written.append(artifact.path.read_bytes())
        assert sum("leaves the float model as it is" in note for note in artifact.notes) == 1
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("settings", "imatrix", "message"),
    [
        (["quantize.fold=awq"], None, "rtn does not"),
        (["quantize.solver=scale_search", "quantize.fold=awq"], Path("a.gguf"), "less than"),
    ],
)
def test_what_folds_cannot_go_by_is_refused(settings, imatrix, message):
    with pytest.raises(UsageError, match=message):
        Importance(imatrix).check(load("int4-fast", settings), [])


def test_the_plan_tells_of_folds(tmp_path, capsys):
    folder = tiny.make("llama", tmp_path / "model")
    line = ["build", str(folder), "-f", "onnx", "--dry-run"]
    line += ["--set", "quantize.solver=gptq", "--set", "quantize.fold=awq"]
    assert cli.main(line) == 0
    text = capsys.readouterr().out
    assert "channels: rescaled (awq)" in text
    assert cli.main([*line, "--json"]) == 0
    quantize = json.loads(capsys.readouterr().out)["quantize"]
    assert quantize["fold"] == "awq"


@pytest.mark.parametrize("override", ["quantize.permute=true", "targets.coreml.rotate=r1"])
def test_a_key_that_was_there_once_is_unknown(override):
    with pytest.raises(RecipeError, match=f"unknown key {override.partition('=')[0]}"):
        load("phone-4bit", [override])
