"""Pruning: the algebra against brute force, the pruned model against transformers and itself."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import packlight, refused
from gguf import GGUFReader
from tiny_sources import stored, texts
from writing import plan_for

from compress.calibration.texts import CalibrationSet
from compress.calibration.walk import walk
from compress.checkpoint.checkpoint import Stored
from compress.checkpoint.save import write_checkpoint
from compress.console import Console
from compress.decoder.config import FUSED, DecoderConfig, WeightMap
from compress.decoder.decoder import Decoder
from compress.decoder.tokenizer import Tokenizer
from compress.demo import model_path
from compress.errors import RecipeError, UnsupportedModelError, UsageError
from compress.output.pruned_checkpoint import save_checkpoint
from compress.plan.cut import Cut, plan_cut, width_step
from compress.pruning.depth import Walks, choose_blocks
from compress.pruning.options import prune_option
from compress.pruning.pruned import Shallower
from compress.pruning.step import Pruned, prune_source
from compress.pruning.surgery import Remaining, choose, compensate
from compress.recipe import load
from compress.recipe.model import Prune

METHODS = {
    "depth": {"method": "depth", "blocks": 1},
    "ffn": {"method": "ffn", "width": 384},
    "heads": {"method": "heads", "ratio": 0.5},
}


CASES = [
    (family, method)
    for family, keys in tiny.CONFIGS.items()
    for method in METHODS
    if not (method == "heads" and keys.get("rope_scaling", {}).get("type") == "longrope")
]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))


def pruned(source: Stored, **settings) -> tuple[Cut, Pruned]:
    cut = plan_cut(source.config, Prune(**settings))
    assert cut is not None
    return cut, prune_source(source, cut, texts(source), Console("quiet", False))


def samples(columns: int, rows: int = 5, count: int = 400, seed: int = 0):
    """A weight, correlated inputs and their mean outer product."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((columns, columns)) + 2 * np.eye(columns)
    x = (random.standard_normal((count, columns)) @ mix).astype(np.float32)
    weight = random.standard_normal((rows, columns)).astype(np.float32)
    return weight, x, (x.T @ x / count).astype(np.float32)


# --- the algebra ------------------------------------------------------------------------------


def test_the_update_is_least_squares():
    weight, x, hessian = samples(9)
    kept = np.array([0, 2, 3, 6, 8])
    expected = np.linalg.lstsq(x[:, kept], x @ weight.T, rcond=None)[0].T
    np.testing.assert_allclose(compensate(weight, (hessian,), kept, damping=0), expected, atol=1e-3)


def test_the_ridge_pulls_to_the_old_weights():
    weight, x, hessian = samples(9)
    kept = np.array([0, 2, 3, 6, 8])
    ridge = 0.3 * np.diagonal(hessian).mean()
    pull = np.sqrt(ridge * len(x)) * np.eye(len(kept))
    inputs, outputs = (
        np.vstack([x[:, kept], pull]),
        np.vstack([x @ weight.T, pull @ weight[:, kept].T]),
    )
    expected = np.linalg.lstsq(inputs, outputs, rcond=None)[0].T
    found = compensate(weight, (hessian,), kept, damping=0.3)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    everything = np.arange(9)
    np.testing.assert_array_equal(compensate(weight, (hessian,), everything), weight)


def test_columns_make_up_for_those_of_their_own_block_of_a_wide_hessian():
    weight, x, hessian = samples(8)
    blocks = (hessian[:4, :4].copy(), hessian[4:, 4:].copy())
    kept = np.array([1, 2, 3, 4, 7])
    left = np.linalg.lstsq(x[:, [1, 2, 3]], x[:, :4] @ weight[:, :4].T, rcond=None)[0].T
    right = np.linalg.lstsq(x[:, [4, 7]], x[:, 4:] @ weight[:, 4:].T, rcond=None)[0].T
    found = compensate(weight, blocks, kept, damping=0)
    np.testing.assert_allclose(found, np.hstack([left, right]), atol=1e-3)
    # Removing all channels of a block is no error.
    np.testing.assert_array_equal(
        compensate(weight, blocks, np.arange(4), damping=0), weight[:, :4]
    )


@pytest.mark.parametrize("size", [1, 2])
def test_removing_step_by_step_is_one_least_squares(size):
    weight, _, hessian = samples(12)
    remaining = Remaining(weight, hessian, size, 0.01)
    for group in (3, 0, 5):
        remaining.remove(np.array([group]))
    kept = np.flatnonzero(np.repeat(remaining.alive, size))
    expected = compensate(weight, (hessian,), kept, damping=0.01)
    np.testing.assert_allclose(remaining._weight[:, kept], expected, atol=2e-3)


def left_over(weight, x, kept, update: bool) -> float:
    """Squared output error of the columns kept, by brute force."""
    old = weight[:, kept]
    best = np.linalg.lstsq(x[:, kept], x @ weight.T, rcond=None)[0].T if update else old
    return float(np.square(x @ weight.T - x[:, kept] @ best.T).sum())


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_near_the_best_of_all(seed):
    weight, x, hessian = samples(8, seed=seed)
    every = [left_over(weight, x, list(k), True) for k in itertools.combinations(range(8), 5)]
    found = choose(weight, (hessian,), 5, damping=1e-6)
    assert left_over(weight, x, found, True) <= 1.3 * min(every)
    assert left_over(weight, x, found, True) < np.median(every)


def test_of_two_twins_one_stays():
    weight, x, _ = samples(8)
    weight[:, [2, 5]] *= 3  # together they matter most
    x[:, 5] = x[:, 2]
    hessian = x.T @ x / len(x)
    kept = choose(weight, (hessian,), 7, damping=1e-4)
    assert len({2, 5} & set(kept.tolist())) == 1
    assert left_over(weight, x, kept, True) < 1e-3 * left_over(weight, x, kept, False)
    plain = choose(weight, (hessian,), 7, update=False)
    assert {2, 5} <= set(plain.tolist())


def test_without_update_the_cost_is_what_the_absence_costs():
    weight, x, hessian = samples(8)
    alone = [
        np.square(x[:, [2 * g, 2 * g + 1]] @ weight[:, [2 * g, 2 * g + 1]].T).sum()
        for g in range(4)
    ]
    kept = choose(weight, (hessian[:4, :4], hessian[4:, 4:]), 2, size=2, update=False)
    assert set(kept.tolist()) == set(np.argsort(alone)[2:].tolist())


def test_the_update_helps_on_inputs_of_the_demo_that_it_has_not_seen():
    source = stored(model_path())
    calibration = CalibrationSet.load(
        ["builtin"], Tokenizer(model_path()), tokens=16384, sequence_length=512, seed=0
    )
    first = replace(source.config, num_hidden_layers=1)
    stats = next(walk(first, source.read, calibration.windows, hessian=True, roles=("down_proj",)))[
        "blocks.0.down_proj"
    ]
    weight = source.read("blocks.0.down_proj.weight")
    assert stats.hessian is not None and stats.held_back is not None

    def error(kept, new) -> float:
        return float(np.square(stats.held_back @ weight.T - stats.held_back[:, kept] @ new.T).sum())

    plain = choose(weight, stats.hessian, 512, update=False)
    kept = choose(weight, stats.hessian, 512)
    dropped = error(plain, weight[:, plain])
    assert error(plain, compensate(weight, stats.hessian, plain)) < 0.6 * dropped
    assert error(kept, compensate(weight, stats.hessian, kept)) < 0.5 * dropped


# --- the shape --------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "method"), CASES)
def test_the_config_reads_back(family, method, tmp_path):
    source = stored(tiny.make(family, tmp_path, num_hidden_layers=3))
    cut = plan_cut(source.config, Prune(**METHODS[method]))
    assert cut is not None
    assert DecoderConfig.from_hf(cut.config.raw, source.checkpoint.generation_config) == cut.config
    assert cut.config.num_parameters < source.config.num_parameters


def test_widths_are_what_the_grids_take():
    source = stored(model_path())

    def step(target, **settings):
        return width_step(source.config, [plan_for(target, source.config, settings)])

    assert step("gguf", type="Q4_K_M") == 256
    assert step("gguf", type="Q4_0") == 32
    assert step("onnx", group_size=128) == 128
    assert step("coreml", grid="lut4-g8") == 32
    narrow = replace(source.config, intermediate_size=864)  # no K-quant has rows of this width
    assert width_step(narrow, [plan_for("gguf", narrow, {"type": "Q4_K_M"})]) == 32
    half = plan_cut(source.config, Prune(method="ffn", ratio=0.4))
    assert half is not None and half.retained == 448  # of 768, the nearest multiple of 32 to 460.8


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "depth", "blocks": 6}, "keep 0 of 6 blocks"),
        ({"method": "depth", "ratio": 0.05}, "keep 6 of 6 blocks"),
        ({"method": "ffn", "width": 768}, "keep 768 of 768"),
        ({"method": "ffn", "width": 600}, "600 is not a multiple of 32"),
        ({"method": "heads", "kv_heads": 9}, "keep 9 of 4"),
    ],
)
def test_amounts_that_cannot_be(settings, words):
    with pytest.raises(UsageError, match=words):
        plan_cut(stored(model_path()).config, Prune(**settings))


def test_longrope_keeps_its_heads(tmp_path):
    source = stored(tiny.make("phi4-mini", tmp_path))
    with pytest.raises(UnsupportedModelError, match="transformers counts its factors"):
        plan_cut(source.config, Prune(**METHODS["heads"]))


def test_words_of_the_command_line_and_the_recipe():
    assert prune_option("depth:3") == {"method": "depth", "blocks": 3}
    assert prune_option("ffn:10%") == {"method": "ffn", "ratio": 0.1}
    assert prune_option("heads:2") == {"method": "heads", "kv_heads": 2}
    for wrong in ("depth", "depth:", "depth:x%", "width:3", "none:1", "ffn:-3", "ffn:1.5", "auto"):
        with pytest.raises(UsageError, match="METHOD:AMOUNT"):
            prune_option(wrong)
    assert not load("phone-4bit").prunes
    assert load("phone-4bit", ["prune={method: depth, blocks: 2}"]).prunes
    for wrong in (
        "prune={method: depth}",
        "prune={method: depth, width: 512}",
        "prune={method: ffn, width: 512, ratio: 0.1}",
        "prune={ratio: 0.1}",
        "prune={method: ffn, ratio: 1.5}",
    ):
        with pytest.raises(RecipeError):
            load("phone-4bit", [wrong])
    with pytest.raises(RecipeError, match=r"prune\.method: 'auto' is not allowed"):
        load("phone-4bit", ["prune.method=auto", "budget.weights=3MB"])


# --- which blocks -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_an_idle_block(tmp_path_factory) -> Path:
    """Four blocks, of which the third adds nothing to the residual."""
    folder = tiny.make("llama", tmp_path_factory.mktemp("idle"), num_hidden_layers=4)
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.2.{name}.weight"].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_block_that_does_nothing_goes_first_and_changes_nothing(with_an_idle_block):
    source = stored(with_an_idle_block)
    windows = texts(source).windows
    first, second = choose_blocks(source, windows, 2)
    assert first.block == 2
    assert abs(first.kl) < 1e-6
    assert second.kl > 0.01
    _, found = pruned(source, method="depth", blocks=1)
    expected = Decoder(source.config, source.read).logits(windows[0])
    np.testing.assert_array_equal(
        Decoder(found.source.config, found.source.read).logits(windows[0]), expected
    )


def test_the_measure_is_the_divergence_of_the_model_without_the_block(with_an_idle_block):
    source = stored(with_an_idle_block)
    windows = texts(source).windows
    walks = Walks(source, windows, lambda done, total: None, 2)
    _, final = walks.survey()
    costs = walks.costs([0, 2, 3], {1}, final)
    assert set(costs) == {0, 2, 3}
    for block, cost in costs.items():
        kept = [index for index in range(4) if index not in (1, block)]
        config = replace(source.config, num_hidden_layers=2)
        short = Shallower(source, config, kept)
        whole = Decoder(source.config, source.read).stream_logits(windows)
        found = Decoder(config, short.read).stream_logits(windows)
        divergences = []
        for p, q in zip(whole, found, strict=True):
            a, b = (torch.from_numpy(x).double().log_softmax(-1) for x in (p, q))
            divergences.append(float((a.exp() * (a - b)).sum(-1).mean()))
        assert cost == pytest.approx(np.mean(divergences), rel=1e-4, abs=1e-6)


def test_shared_blocks_go_together(tmp_path):
    source = stored(tiny.make("mobilellm", tmp_path, num_hidden_layers=3, layer_sharing=True))
    cut, found = pruned(source, method="depth", blocks=1)
    assert (cut.total, cut.config.num_hidden_layers) == (3, 4)
    kept = found.source.retained
    for block in range(4):
        expected = source.read(f"blocks.{2 * kept[block // 2]}.q_proj.weight")
        np.testing.assert_array_equal(found.source.read(f"blocks.{block}.q_proj.weight"), expected)


# --- the pruned model -------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "phi3", "phi", "qwen3"])
def test_every_weight_has_the_shape_of_the_config(family, method, tmp_path):
    source = stored(tiny.make(family, tmp_path, num_hidden_layers=3))
    cut, found = pruned(source, **METHODS[method])
    shapes = WeightMap(cut.config)
    for name in shapes.names():
        values = found.source.read(name)
        assert values.shape == shapes.shape(name), name
        np.testing.assert_array_equal(found.source.read(name, slice(3, 11)), values[3:11])
        assert found.source.read(name, slice(5, 5)).shape == (0, *values.shape[1:])
    for fused, members in FUSED.items():
        if fused.startswith("gate") and not cut.config.gated_mlp:
            continue
        parts = [found.source.read(f"blocks.1.{member}.weight") for member in members]
        np.testing.assert_array_equal(
            found.source.read(f"blocks.1.{fused}.weight"), np.concatenate(parts)
        )


@pytest.mark.parametrize(("family", "method"), CASES)
def test_the_saved_checkpoint_is_the_pruned_model(family, method, tmp_path):
    folder = tiny.make(family, tmp_path / "whole", num_hidden_layers=3)
    source = stored(folder)
    cut, found = pruned(source, **METHODS[method])
    save_checkpoint(found.source, tmp_path / "saved")
    again = stored(tmp_path / "saved")  # which compares headers with the config
    assert again.config.num_parameters == cut.config.num_parameters
    for name in WeightMap(again.config).names():
        np.testing.assert_array_equal(again.read(name), found.source.read(name))
    step = again.checkpoint.config["packlight"]["steps"][-1]
    assert (step["method"], step["kept"], step["of"]) == (method, cut.retained, cut.total)
    tokens = texts(source).windows[0]
    ours = Decoder(found.source.config, found.source.read).logits(tokens)
    model = tiny.reference(tmp_path / "saved")
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_shared_blocks_are_saved_as_often_as_they_run(tmp_path):
    source = stored(
        tiny.make("mobilellm", tmp_path / "whole", num_hidden_layers=3, layer_sharing=True)
    )
    _, found = pruned(source, **METHODS["ffn"])
    save_checkpoint(found.source, tmp_path / "saved")
    tokens = texts(source).windows[0]
    ours = Decoder(found.source.config, found.source.read).logits(tokens)
    with torch.no_grad():
        theirs = tiny.reference(tmp_path / "saved")(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_found_once_then_read(tmp_path, monkeypatch):
    source = stored(tiny.make("llama", tmp_path, num_hidden_layers=3))
    cut, first = pruned(source, **METHODS["ffn"])
    monkeypatch.setattr("compress.pruning.step.measure", None)  # would fail if it were called
    _, second = pruned(source, **METHODS["ffn"])
    assert first.source.fingerprint() == second.source.fingerprint() != source.fingerprint()
    assert first.notes == second.notes
    name = "blocks.1.down_proj.weight"
    np.testing.assert_array_equal(first.source.read(name), second.source.read(name))
    assert cut.describe() == "128 of 512 MLP channels in every layer"


def test_a_damaged_cache_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    source = stored(tiny.make("llama", tmp_path / "m"))
    _, first = pruned(source, **METHODS["ffn"])
    weight = first.source.read("blocks.1.down_proj.weight")
    damages = {
        "found.json": lambda file: file.write_bytes(file.read_bytes()[:-9]),
        "blocks.0.down_proj.safetensors": lambda file: file.unlink(),
        "blocks.1.down_proj.safetensors": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    }
    for name, damage in damages.items():
        (file,) = (tmp_path / "cache").rglob(name)
        damage(file)
        _, again = pruned(source, **METHODS["ffn"])
        np.testing.assert_array_equal(again.source.read("blocks.1.down_proj.weight"), weight)


def test_large_checkpoints_are_saved_in_shards(tmp_path):
    source = stored(tiny.make("qwen2", tmp_path / "whole"))
    (tmp_path / "saved").mkdir()
    write_checkpoint(source, tmp_path / "saved", shard=300_000)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    again = stored(tmp_path / "saved")
    for name in WeightMap(again.config).names():
        np.testing.assert_array_equal(again.read(name), source.read(name))
    with pytest.raises(UsageError, match="exists"):
        save_checkpoint(source, tmp_path / "saved")


# --- builds -----------------------------------------------------------------------------------

QUICK = (
    "--set", "verify.windows=2", "--set", "verify.sequence_length=32",
    "--set", "calibration.tokens=256", "--set", "calibration.sequence_length=32",
)  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [
        "depth:1",
        *(pytest.param(method, marks=pytest.mark.slow) for method in ("ffn:50%", "heads:2")),
    ],
)
def test_three_artifacts_of_a_pruned_model_run(method, tmp_path):
    model = tiny.make("llama", tmp_path / "whole" / "m", num_hidden_layers=3)
    (tmp_path / "text.txt").write_text(tiny.TEXT * 3)
    text = ("--eval-text", "text.txt", "--calibration", "text.txt", "--threads", 1)
    build = ("build", "-r", "near-lossless-8bit", *QUICK, "--json")
    done = packlight(
        *build, model, "-o", "a", "--prune", method, "--save-checkpoint", "saved/m", *text,
        "--set", "verify.gates={}", "--no-verify", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["notes"][0].startswith("Pruned ")
    whole = stored(model).config.num_parameters
    for artifact in report["artifacts"]:
        expected = artifact["bytes"] * 8 / whole
        assert artifact["bits_per_weight"] == pytest.approx(expected, rel=1e-6)
    plan = json.loads((tmp_path / "a" / "plan.json").read_text())
    left = stored(tmp_path / "saved" / "m").config.num_parameters
    assert plan["prune"]["parameters_left"] == left < whole
    # Built from what was saved: the same weights, and every runtime computes that model.
    done = packlight(
        *build, "saved/m", "-o", "b", "--eval-text", "text.txt", "--threads", 1,
        "--set", "verify.gates={kl_divergence: <=0.02}", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [artifact["runtime"] is not None for artifact in report["artifacts"]] == [True] * 3
    data = "onnx/onnx/model_int8.onnx_data"
    assert (tmp_path / "a" / data).read_bytes() == (tmp_path / "b" / data).read_bytes()
    # The header differs: what was saved has a card of its own.
    before, after = (GGUFReader(tmp_path / out / "gguf/m-Q8_0.gguf").tensors for out in "ab")
    assert [tensor.name for tensor in before] == [tensor.name for tensor in after]
    for a, b in zip(before, after, strict=True):
        assert a.data.tobytes() == b.data.tobytes(), a.name


def test_the_float_baseline_is_the_unpruned_model(tmp_path):
    model = tiny.make("phi3", tmp_path / "m", num_hidden_layers=6)
    (tmp_path / "text.txt").write_text(tiny.TEXT * 3)
    done = packlight(
        "build", "m", "-r", "prune-depth-10", "-f", "gguf", "-o", "a", "--json", *QUICK,
        "--eval-text", "text.txt", "--calibration", "text.txt", "--threads", 1,
        "--set", "verify.gates={}", "--set", "targets.gguf.type=F16", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    source = stored(model)
    assert report["baseline"]["parameters"] == source.config.num_parameters
    assert report["artifacts"][0]["kl_divergence"]["mean"] > 0.01  # in F16: of the pruning alone
    assert report["artifacts"][0]["kv_cache_bytes_per_token"] == (
        source.config.kv_cache_bytes_per_token() * 5 // 6
    )
    done = packlight("verify", "a", "--baseline", "m", "--eval-text", "text.txt", "--windows", 2,
                     "--sequence-length", 32, "--json", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)["artifacts"][0]
    assert "pruned, or another model?" in done.stderr
    for key in ("kl_divergence", "kv_cache_bytes_per_token"):
        assert again[key] == report["artifacts"][0][key]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-f", "gguf", "--prune", "heads:2"), "llama.cpp's phi3 needs heads x head_dim"),
        (("--prune", "depth:2"), "would keep 0 of 2 blocks"),
        (("--save-checkpoint", "saved"), "nothing is pruned"),
        (("--prune", "depth:1", "--save-checkpoint", "out/saved"), "inside the output"),
        (("--prune", "depth:1", "--save-checkpoint", "m"), "exists"),
        (("--prune", "depth:1", "--imatrix", "im.gguf"), "the recipe prunes it"),
    ],
)
def test_refusals(options, words, tmp_path):
    tiny.make("phi3", tmp_path / "m")
    done = packlight("build", "m", "--no-verify", "-o", "out", *options, cwd=tmp_path)
    assert words in refused(done)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_build_that_fails_late_saves_no_checkpoint(tmp_path):
    tiny.make("llama", tmp_path / "m")
    done = packlight(
        "build", "m", "-f", "onnx", "--no-verify", "-o", "out", "--set", "calibration.tokens=512",
        "--set", "quantize.fold=awq", "--prune", "depth:1", "--save-checkpoint", "saved",
        cwd=tmp_path,
    )  # fmt: skip
    assert "windows" in refused(done)  # of which the search for folds has too few
    assert not (tmp_path / "saved").exists() and not (tmp_path / "out").exists()


def test_a_dry_run_plans_what_is_left(tmp_path):
    tiny.make("llama", tmp_path / "m", num_hidden_layers=4)
    command = ("build", "m", "-f", "gguf", "--dry-run", "--json")
    whole = json.loads(packlight(*command, cwd=tmp_path).stdout)
    less = json.loads(packlight(*command, "--prune", "depth:50%", cwd=tmp_path).stdout)
    sizes = [p["targets"]["gguf"]["weights_bytes"] for p in (whole, less)]
    assert sizes[1] < 0.7 * sizes[0]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
