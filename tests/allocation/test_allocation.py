"""Costs of tensors on grids against plain calculation, and builds within a budget."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from commands import packlight, refused

from compress.allocation import effort
from compress.allocation.budget import Target
from compress.allocation.costs import CostTable, measure_errors, members
from compress.allocation.effort import effort_for
from compress.allocation.feasible import check_budget
from compress.allocation.sensitivity import GROUP, LEVEL, Sensitivity, measure, pieces_of
from compress.allocation.tensor_error import relative_error, sample_rows
from compress.calibration.statistics import LayerStats, Statistics
from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import DecoderConfig
from compress.decoder.decoder import Decoder
from compress.demo import model_path
from compress.errors import UsageError
from compress.grids import Float32, get_grid
from compress.plan.job import describe_model, prepare
from compress.recipe import load
from compress.solvers import get_solver
from compress.verify.baseline import log_softmax

DEMO = model_path()
ROOM = tempfile.TemporaryDirectory(prefix="packlight-budget-")  # deleted at exit


@cache
def source(family: str, **options: Any) -> Stored:
    folder = tempfile.mkdtemp(dir=ROOM.name)
    checkpoint = Checkpoint.open(str(tiny.make(family, folder, **options)))
    return Stored(checkpoint, describe_model(checkpoint))


def kl(config: DecoderConfig, read: Any, changed: Any, windows: list[list[int]]) -> float:
    """Mean KL of the model with changed weights, by the whole decoder."""
    pairs = zip(
        Decoder(config, read).stream_logits(windows),
        Decoder(config, changed).stream_logits(windows),
        strict=True,
    )
    found = []
    for logits, others in pairs:
        log_p, log_q = log_softmax(logits), log_softmax(others)
        found.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
    return float(np.concatenate(found).mean())


WINDOWS = [[int(t) for t in np.random.default_rng(i).integers(3, 450, 24)] for i in range(2)]


def noise_like(weight: Float32, seed: int) -> Float32:
    """A tenth of ``LEVEL``: small enough for the second order to be all there is."""
    groups = weight.reshape(len(weight), -1, GROUP)
    sizes = np.sqrt(np.square(groups).mean(axis=2, keepdims=True))
    drawn = np.random.default_rng(seed).standard_normal(groups.shape)
    return (LEVEL / 10 * sizes * drawn).astype(np.float32).reshape(weight.shape)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *(("phi", {}), ("qwen3", {}), ("gemma2", {}), ("mobilellm", {"layer_sharing": True})),
        ("lfm2", {}),
    ],
)
def test_sensitivity_is_the_divergence_of_the_model_with_noise(
    family: str, options: dict[str, Any]
) -> None:
    weights = source(family, **options)
    config = weights.config
    found = measure(weights, WINDOWS, Statistics.of(config, {}), samples=100)
    assert all(entry.divergence > 0 for entry in found.values())
    last = config.num_hidden_layers - config.block_repeat
    first = "in_proj" if family == "lfm2" else "q_proj"
    for name in (
        "embed_tokens.weight", f"blocks.0.{first}.weight", f"blocks.{last}.down_proj.weight",
        "lm_head.weight",
    ):  # fmt: skip
        measured = []
        for seed in range(6):
            noise = noise_like(weights.read(name), seed)

            def changed(asked: str, name: str = name, noise: Float32 = noise) -> Float32:
                block, _, rest = asked.partition(".")[2].partition(".")
                stored = asked
                if asked.startswith("blocks."):
                    stored = f"blocks.{int(block) - int(block) % config.block_repeat}.{rest}"
                values = weights.read(asked)
                return values + noise if stored == name else values

            untied = replace(config, tie_word_embeddings=False)  # else the head is the embedding
            measured.append(kl(untied, weights.read, changed, WINDOWS))
        assert found[name].divergence == pytest.approx(100 * np.mean(measured), rel=0.2), name
        assert found[name].error == pytest.approx(LEVEL**2, rel=1e-4)


def test_the_error_of_a_sensitivity_is_that_of_noise_at_its_inputs() -> None:
    weights = source("llama3")
    name = "blocks.0.down_proj.weight"
    columns = weights.config.intermediate_size
    importance = np.random.default_rng(0).gamma(0.3, size=columns).astype(np.float32)
    statistics = Statistics.of(weights.config, {"blocks.0.down_proj": LayerStats(9, importance)})
    weight, stats = weights.read(name), statistics.for_weight(name)
    assert stats is not None
    errors = [relative_error(weight, noise_like(weight, seed), stats) for seed in range(6)]
    found = measure(weights, WINDOWS, statistics, samples=1)[name]
    assert found.error == pytest.approx(100 * np.mean(errors), rel=0.05)


def test_pieces_of_text_have_the_tokens_that_are_asked_for() -> None:
    windows = [list(range(start, start + 512)) for start in (0, 512)]
    pieces = pieces_of(windows, 512)
    assert [len(piece) for piece in pieces] == [128] * 4
    assert [piece[0] for piece in pieces] == [0, 512, 128, 640]
    assert pieces_of(windows, 100) == [list(range(128))]
    assert pieces_of([[1, 2, 3]], 512) == [[1, 2, 3]]


def test_large_models_are_looked_at_less() -> None:
    raw = {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "vocab_size": 32064,
        "hidden_size": 3072, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "intermediate_size": 8192, "max_position_embeddings": 4096,
        "hidden_act": "silu",
    }  # fmt: skip
    config = DecoderConfig.from_hf(raw)
    assert effort_for(source("phi3").config, "gptq").tokens == 0  # all there are
    sampled = effort_for(config, "gptq")
    assert sampled.tokens == 1024 and sampled.scored == 256
    assert sampled.solver == "scale_search"  # no second moments
    assert effort_for(config, "rtn").solver == "rtn"


def test_relative_error_is_that_of_the_outputs() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4000, 48)) @ rng.standard_normal((48, 48))).astype(np.float32)
    weight = rng.standard_normal((16, 48)).astype(np.float32)
    change = (weight * rng.uniform(-0.1, 0.1, weight.shape)).astype(np.float32)
    outputs = float(np.square(x @ change.T).sum() / np.square(x @ weight.T).sum())
    hessian = (x.T @ x / len(x)).astype(np.float32)
    stats = LayerStats(len(x), np.diagonal(hessian).copy(), hessian=(hessian,))
    assert relative_error(weight, change, stats) == pytest.approx(outputs, rel=1e-4)
    split = LayerStats(len(x), stats.importance, hessian=(hessian[:32, :32], hessian[32:, 32:]))
    assert relative_error(weight, change, split) != pytest.approx(outputs, rel=1e-4)
    plain = LayerStats(len(x), stats.importance)
    by_column = np.square(change) @ plain.importance
    expected = by_column.sum() / (np.square(weight) @ plain.importance).sum()
    assert relative_error(weight, change, plain) == pytest.approx(float(expected), rel=1e-5)
    unweighted = float(np.square(change).sum() / np.square(weight).sum())
    assert relative_error(weight, change, None) == pytest.approx(unweighted, rel=1e-5)
    assert relative_error(np.zeros_like(weight), change, None) == 0.0


def test_sampled_rows() -> None:
    assert sample_rows(256, 768) == [slice(0, 256)]
    runs = sample_rows(32064, 3072)
    assert sum(run.stop - run.start for run in runs) * 3072 <= 1 << 19
    assert len(runs) > 3
    assert all(run.start % 32 == 0 and run.stop - run.start == 32 for run in runs)
    assert runs[-1].stop == 32064
    fewer = sample_rows(32064, 3072, 1 << 18)
    assert sum(run.stop - run.start for run in fewer) * 3072 <= 1 << 18


def test_a_mix_goes_by_the_bits_of_the_whole_model() -> None:
    """Its name has the figure of the column of bits per weight, pruned or not."""
    checkpoint = source("llama3").checkpoint
    for prune in ("none", "depth"):
        changes = [f"prune={{method: {prune}{', blocks: 1' if prune == 'depth' else ''}}}"]
        recipe = load("phone-4bit", changes, ["gguf"])
        (plan,) = prepare(checkpoint, recipe, transforms={}).plans
        choices = {"gguf": {plan.entries[-1].name: "Q8_0"}}
        job = prepare(checkpoint, recipe, transforms={}, choices=choices)
        bits = 8 * job.plans[0].weights_bytes / job.config.num_parameters
        assert job.plans[0].type_name == f"mix-{bits:.2f}bpw"


def test_costs_add_up_over_fused_tensors() -> None:
    config = source("phi3").config
    assert members(config, "blocks.1.qkv_proj.weight") == [
        f"blocks.1.{role}.weight" for role in ("q_proj", "k_proj", "v_proj")
    ]
    names = members(config, "blocks.1.gate_up_proj.weight")
    table = CostTable(
        config,
        {names[0]: Sensitivity(0.02, 0.01), names[1]: Sensitivity(0.01, 0.01)},
        {names[0]: {"Q4_K": 0.005}, names[1]: {"Q4_K": 0.004}},
    )
    assert table.cost("blocks.1.gate_up_proj.weight", "Q4_K") == pytest.approx(0.014)
    wanted = [(names[0], "Q4_K"), (names[0], "Q6_K"), (names[0], "Q6_K")]
    assert table.missing(wanted) == {names[0]: ["Q6_K"]}


def test_errors_are_those_of_the_solver() -> None:
    weights = source("llama3")  # tied
    errors: dict[str, dict[str, float]] = {}
    statistics = Statistics.of(weights.config, {})
    names = ("blocks.0.down_proj.weight", "lm_head.weight")
    measure_errors(
        weights, statistics, get_solver("rtn"), {n: ["Q4_K", "int4-g32"] for n in names}, errors,
        effort_for(weights.config, "rtn"), lambda done, total: None,
    )  # fmt: skip
    for name in names:
        weight = weights.read(name)
        change = get_grid("Q4_K").quantize(weight).decode() - weight
        expected = float(np.square(change).sum() / np.square(weight).sum())
        assert errors[name]["Q4_K"] == pytest.approx(expected, rel=1e-4)


def test_what_gptq_leaves_is_a_share_of_what_a_search_leaves() -> None:
    """Of a large model: it changes expectations, but no choice."""
    weights = source("llama3")  # tied
    columns = weights.config.hidden_size
    plain = LayerStats(64, np.ones(columns, np.float32))
    stats = Statistics.of(weights.config, {"blocks.0.q_proj": plain, "lm_head": plain})
    found: dict[str, dict[str, dict[str, float]]] = {}
    for solver in ("scale_search", "gptq"):
        how, errors = effort_for(weights.config, solver, large=0), found.setdefault(solver, {})
        wanted = {name: ["int4-g32"] for name in ("blocks.0.q_proj.weight", "lm_head.weight")}
        solve = get_solver(how.solver)
        measure_errors(weights, stats, solve, wanted, errors, how, lambda done, total: None)
    for name, errors in found["scale_search"].items():
        share = found["gptq"][name]["int4-g32"] / errors["int4-g32"]
        assert share == pytest.approx(effort.GPTQ_LEAVES)


@pytest.mark.parametrize("format", ["gguf", "onnx", "coreml"])
def test_no_file_is_larger_than_its_budget(format: str) -> None:
    """Budgets are exact to the byte, although the graph of a mix may be larger."""
    weights = source("phi3")
    recipe = load("phone-4bit", [], [format])
    job = prepare(weights.checkpoint, recipe, transforms={})
    target = Target(job, job.plans[0])
    rng = np.random.default_rng(0)
    table = CostTable(weights.config)
    for name, grid in target.wanted():
        table.sensitivities[name] = Sensitivity(float(rng.random()), 1.0)
        table.errors.setdefault(name, {})[grid] = float(rng.random())
    span = target.largest_bytes - target.smallest_bytes
    for share in (0.0, 0.1, 0.3331, 0.5, 0.75):
        budget = target.smallest_bytes + int(share * span)
        assert target.allocate(budget, table).plan.file_bytes <= budget


# --- the command ---------------------------------------------------------------------------------


# Few tokens and windows, so that the cost table is measured quickly.
FEW = (
    "--set", "quantize.candidates=[Q2_K, Q4_K, Q6_K, Q8_0, int4-g32, int4-g256, int8-g32]",
    "--set", "quantize.solver=scale_search",
    "--set", "calibration.tokens=1024", "--set", "calibration.sequence_length=256",
)  # fmt: skip


def build(folder: Path, *options: object) -> Any:
    return packlight(
        "build", DEMO, "-o", folder, "--no-verify", *FEW, *options,
        env={"PACKLIGHT_CACHE": ROOM.name},
    )  # fmt: skip


def test_a_budget_is_filled_and_its_plan_builds_the_same(tmp_path: Path) -> None:
    formats = ("-f", "gguf", "-f", "onnx")
    done = build(tmp_path / "a", "--budget", "3.5MB", *formats)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "a" / "plan.json").read_text())
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["budget_bytes"] == 3_500_000
    for artifact in report["artifacts"]:
        assert 0.99 * 3_500_000 < artifact["bytes"] <= 3_500_000
        target = plan["targets"][artifact["format"]]
        assert artifact["bytes"] == target["file_bytes"]
        assert target["type"] == artifact["type"]
        assert target["type"].startswith("mix-4.")
        assert 0 < target["expected_kl_divergence"] < 0.1
        assert len({row["grid"] for row in target["tensors"]}) > 2
    locked = build(tmp_path / "b", "--plan", tmp_path / "a" / "plan.json", *formats)
    assert locked.returncode == 0, locked.stderr
    for name in (
        "plan.json",
        f"gguf/model-{plan['targets']['gguf']['type']}.gguf",
        "onnx/onnx/model_q4.onnx",
        "onnx/onnx/model_q4.onnx_data",
    ):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_dry_run_tells_the_plan(tmp_path: Path) -> None:
    done = build(
        tmp_path / "x", "--budget", "3.5MB", "-f", "gguf", "--dry-run",
        "--set", 'quantize.keep={lm_head: ">=8"}',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "x").exists()
    assert "expected KL" in done.stdout
    assert "smallest" in done.stdout
    assert "recommended" in done.stdout
    assert "lm_head.weight is Q8_0: the recipe keeps it at 8 bits or more" in done.stdout


def test_where_everything_fits_nothing_is_measured(tmp_path: Path) -> None:
    cache = {"PACKLIGHT_CACHE": str(tmp_path / "cache")}
    formats = ("-f", "gguf", "-f", "coreml")
    done = packlight("build", DEMO, "--budget", "1GB", *formats, "--dry-run", env=cache)
    assert done.returncode == 0, done.stderr
    assert "gguf: every tensor has its largest grid; nothing was measured" in done.stdout
    assert not list((tmp_path / "cache").rglob("*.npz"))


def test_an_infeasible_budget_names_the_smallest_sizes(tmp_path: Path) -> None:
    told = refused(build(tmp_path / "x", "--budget", "1MB", "-f", "gguf", "-f", "onnx"))
    assert "gguf: no choice of grids fits in 1.00 MB" in told
    assert "smallest feasible sizes: gguf 2.08 MB (1.99 MiB), onnx 3.31 MB" in told
    assert "neither grids nor pruning reach it" in told
    assert list(tmp_path.iterdir()) == []


GROUPS = "a larger group or fewer bits: int4-g256"


@pytest.mark.parametrize(
    ("budget", "formats", "changes", "advice"),
    [
        # The smallest number of removed blocks that fits.
        ("3MB", ["onnx"], [], "--prune depth:1 would reach the budget"),
        ("2.6MB", ["onnx", "gguf"], [], "--prune depth:2 would reach the budget"),
        ("2.6MB", ["onnx"], ["prune={method: depth, blocks: 1}"], "--prune depth:2 would"),
        ("3MB", ["onnx"], ["prune={method: ffn, width: 736}"], "neither grids nor pruning"),
        # Keys that the recipe does not set.
        (
            "3.4MB", ["onnx"], ["quantize.candidates=[int4-g32]"],
            f"--set quantize.candidates=auto ({GROUPS}) or --prune depth:1 would reach the budget",
        ),
        (
            "3.4MB", ["onnx"], ['quantize.keep={lm_head: ">=8"}'],
            f"--set quantize.keep={{}} ({GROUPS}) or --prune depth:1 would reach the budget",
        ),
        (
            "3.4MB", ["onnx"], ["quantize.candidates=[int4-g32, int8-g32]",
                                'quantize.keep={lm_head: ">=8"}'],
            f"auto --set quantize.keep={{}} ({GROUPS}) or --prune depth:2 would reach the budget",
        ),
        ("2.5MB", ["gguf"], ["quantize.candidates=[Q4_K]"], "(a larger group or fewer bits: Q2_K)"),
    ],
)  # fmt: skip
def test_an_infeasible_budget_names_what_would_reach_it(
    budget: str, formats: list[str], changes: list[str], advice: str
) -> None:
    checkpoint = Checkpoint.open(DEMO)

    def check(*more: str) -> None:
        wanted = load("phone-4bit", [f"budget.weights={budget}", *changes, *more], formats)
        replan = partial(prepare, checkpoint, recipe=wanted, transforms={})
        found = check_budget(replan(), replan)
        assert list(found) == formats

    with pytest.raises(UsageError, match="no choice of grids fits") as caught:
        check()
    hint = caught.value.hint
    assert advice in hint
    if pruning := re.search(r"--prune depth:(\d+)", hint):
        count = int(pruning[1])
        check(f"prune={{method: depth, blocks: {count}}}")
        if count > 1:
            with pytest.raises(UsageError, match="no choice of grids fits"):
                check(f"prune={{method: depth, blocks: {count - 1}}}")
    if "quantize." in hint:
        check(*re.findall(r"quantize\.(?:candidates=auto|keep={})", hint))


def test_memory_budgets_say_which_part_is_which(tmp_path: Path) -> None:
    options = ("--context", 256, "-f", "gguf", "--dry-run")
    done = build(tmp_path / "x", "--budget-memory", "20MB", *options)
    assert done.returncode == 0, done.stderr
    # 6 layers, 4 heads of 64, keys and values in float16
    assert f"{6 * 2 * 256 * 2 * 256 / 1e6:.2f} MB" in done.stdout
    assert "KV cache at 256 positions" in done.stdout
    assert "activations" in done.stdout
    told = refused(build(tmp_path / "x", "--budget-memory", "2MB", *options))
    assert "nothing is left for weights of 2.00 MB" in told
    told = refused(build(tmp_path / "x", "--device", "iphone-1", *options))
    assert "unknown device 'iphone-1'" in told


def test_plans_that_do_not_belong(tmp_path: Path) -> None:
    made = build(tmp_path / "a", "-f", "gguf")
    assert made.returncode == 0, made.stderr
    plan = tmp_path / "a" / "plan.json"
    assert "the plan has no onnx" in refused(build(tmp_path / "b", "--plan", plan))
    document = json.loads(plan.read_text())
    document["model"]["parameters"] += 1
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    told = refused(build(tmp_path / "b", "--plan", other, "-f", "gguf"))
    assert "for a model of 6,163,713 parameters" in told
    document["targets"]["gguf"]["tensors"][0]["grid"] = 4
    other.write_text(json.dumps(document))
    told = refused(build(tmp_path / "b", "--plan", other, "-f", "gguf"))
    assert "targets.gguf.tensors.0.grid: 4 is not of type 'string'" in told
    other.write_text("{}")
    assert "not a plan of packlight" in refused(build(tmp_path / "b", "--plan", other))
    assert "is not JSON" in refused(build(tmp_path / "b", "--plan", DEMO / "README.md"))
    again = build(tmp_path / "c", "--plan", plan, "-f", "gguf")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "c" / "gguf" / "model-Q4_K_M.gguf").exists()  # a preset keeps its name
    told = refused(build(tmp_path / "b", "--plan", plan, "--budget", "4MB"))
    assert "exclude each other" in told


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget.weights=lots", "budget.weights: 'lots' is not a size"),
        ("quantize.keep.lm_heat='>=6'", "unknown key quantize.keep.lm_heat"),
        ("quantize.keep.lm_head='>=60'", "quantize.keep.lm_head: '>=60' is not allowed"),
        ("quantize.candidates=[Q9_K]", "there is no grid 'Q9_K'"),
    ],
)
def test_bad_keys_are_refused(tmp_path: Path, override: str, message: str) -> None:
    options = ("--budget", "4MB") if "candidates" in override else ()
    assert message in refused(build(tmp_path / "x", "--set", override, *options))
