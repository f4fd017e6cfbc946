"""Zeros: their choice, their error, and how Core ML stores them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from commands import packlight, refused
from exported import Exported, reference
from writing import plan_for

from compress.calibration.statistics import Statistics
from compress.calibration.texts import CalibrationSet
from compress.calibration.walk import walk
from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.tokenizer import Tokenizer
from compress.demo import model_path
from compress.errors import GridError, RecipeError, UnsupportedModelError, UsageError
from compress.grids import get_grid
from compress.grids.sparse import Pattern, SparseGrid, pattern_of
from compress.plan.job import describe_model
from compress.pruning.sparse import Sparsified, sparsegpt, sparsify
from compress.pruning.surgery import compensate
from compress.pruning.zeros import check_zeros
from compress.recipe import load
from exporters.coreml import constexpr
from exporters.coreml.evaluator import Evaluator
from exporters.coreml.inspection import describe
from exporters.coreml.mil import read_package
from exporters.coreml.planning import parts

NAMES = ["2of4-lut4-g8", "s50-int4-g32", "4of8-int8-channel", "s25-int4-g32-asym", "s75-F16"]


def random_weight(rows: int = 32, columns: int = 64, seed: int = 0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


# --- patterns and grids -----------------------------------------------------------------------


def test_patterns_keep_the_highest():
    scores = np.abs(random_weight())
    two = Pattern.parse("2of4").mask(scores)
    for group, found in zip(scores.reshape(-1, 4), two.reshape(-1, 4), strict=True):
        assert set(np.flatnonzero(found)) == set(np.argsort(group)[2:])
    for row, found in zip(scores, Pattern.parse("s30").mask(scores), strict=True):
        assert set(np.flatnonzero(found)) == set(np.argsort(row)[64 * 30 // 100 :])
    same = Pattern.parse("2of4").mask(np.zeros((1, 4)))
    np.testing.assert_array_equal(same, [[True, True, False, False]])


def test_words_for_sparsity():
    assert pattern_of("none") is None
    assert pattern_of(0.5) == Pattern("s50", percent=50)
    assert pattern_of("2of4") == Pattern("2of4", nonzeros=2, of=4)
    for wrong in ("4of4", "5of4", 0.125, "half"):
        with pytest.raises(GridError):
            pattern_of(wrong)
    with pytest.raises(GridError, match="multiple of 4"):
        get_grid("2of4-F16").check((8, 66))
    for wrong in ("124", "2:4", "1.5"):  # YAML reads 2:4 as the number 124
        with pytest.raises(RecipeError):
            load("phone-4bit", [f"targets.coreml.sparsity={wrong}"])


@pytest.mark.parametrize("name", NAMES)
def test_a_sparse_grid_is_its_inner_grid_and_zeros(name):
    grid = get_grid(name)
    assert isinstance(grid, SparseGrid) and grid.name == name
    weight = random_weight()
    found = grid.quantize(weight)
    decoded, mask = found.decode(), found.params["mask"]
    assert not decoded[~mask].any()
    assert (mask.sum(1) == grid.pattern.count(64)).all()
    np.testing.assert_array_equal(mask, grid.pattern.mask(np.abs(weight)))
    error = np.square(decoded - weight)[mask].mean()
    dense = np.square(grid.inner.quantize(weight).decode() - weight)[mask].mean()
    assert error <= 1.05 * dense  # fewer weights share the scales and tables
    packed = found.pack()
    bits = {"codes": 16 if name.endswith("F16") else int(name.split("-")[1][3:]), "mask": 1}
    others = {"scale": 16, "lut": 16, "zero_point": 4 if name.endswith("asym") else 0}
    total = sum(-(-v.size * (bits | others)[k] // 8) for k, v in packed.items())
    assert total == grid.nbytes(weight.shape)
    assert total == sum(part.nbytes for part in parts(name, weight.shape))


def test_a_quarter_of_zeros_at_four_bits_is_break_even():
    shape = (64, 256)
    assert get_grid("s25-int4-g32").nbytes(shape) == get_grid("int4-g32").nbytes(shape)
    assert get_grid("s20-int4-g32").nbytes(shape) > get_grid("int4-g32").nbytes(shape)
    half = get_grid("2of4-lut4-g8").nbytes(shape) - get_grid("lut4-g8").nbytes(shape)
    assert half * 8 == -1 * 64 * 256  # 3 bits in place of 4


def test_a_palette_has_no_entry_for_the_zeros():
    weight = np.where(random_weight() > 0, 1.0, -1.0).astype(np.float32)
    weight *= np.random.default_rng(1).choice([1.0, 1.5, 2.0, 2.5], weight.shape)
    found = get_grid("2of4-lut2-tensor").quantize(weight)  # 4 entries
    assert not (found.params["lut"] == 0).any()


# --- which weights ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_layer():
    """A linear of the demo and statistics of its input."""
    checkpoint = Checkpoint.open(model_path())
    source = Stored(checkpoint, describe_model(checkpoint))
    texts = CalibrationSet.load(
        ["builtin"], Tokenizer(model_path()), tokens=8192, sequence_length=512, seed=0
    )
    stats = next(walk(source.config, source.read, texts.windows, hessian=True, roles=("q_proj",)))
    return source, stats["blocks.0.q_proj"]


@pytest.mark.parametrize("name", ["2of4", "s50"])
def test_each_method_loses_less_on_inputs_it_has_not_seen(demo_layer, name):
    source, stats = demo_layer
    weight, pattern = source.read("blocks.0.qkv_proj.weight"), Pattern.parse(name)
    errors = []
    for method in ("magnitude", "wanda", "sparsegpt"):
        found = sparsify(weight, stats, pattern, method)
        assert (np.count_nonzero(found, axis=1) <= pattern.count(weight.shape[1])).all()
        assert np.count_nonzero(found) >= 0.99 * len(weight) * pattern.count(weight.shape[1])
        if pattern.of:
            assert (
                np.count_nonzero(found.reshape(-1, pattern.of), axis=1) <= pattern.nonzeros
            ).all()
        errors.append(float(np.square(stats.held_back @ (weight - found).T).sum()))
    assert errors[1] < 0.97 * errors[0]
    assert errors[2] < 0.8 * errors[1]


def test_wanda_weighs_by_the_inputs():
    weight = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
    hessian = np.diag([100.0, 9.0, 1.0, 0.01]).astype(np.float32)
    x = np.sqrt(np.diagonal(hessian))
    stats = layer(hessian)
    # |w| sqrt(E[x²]): 10, 6, 3, 0.4
    found = sparsify(weight, stats, Pattern.parse("2of4"), "wanda")
    np.testing.assert_array_equal(found, [[1, 2, 0, 0]])
    assert np.allclose(x, [10, 3, 1, 0.1])


def layer(hessian):
    from compress.calibration.statistics import LayerStats

    return LayerStats(100, np.diagonal(hessian).copy(), hessian=(hessian,))


def test_sparsegpt_on_uncorrelated_inputs_is_wanda():
    weight = random_weight()
    hessian = np.diag(np.random.default_rng(3).uniform(0.5, 4, 64)).astype(np.float32)
    pattern = Pattern.parse("2of4")
    found = sparsegpt(weight, (hessian,), pattern, damping=1e-6)
    np.testing.assert_array_equal(found, sparsify(weight, layer(hessian), pattern, "wanda"))
    empty = np.zeros((64, 64), np.float32)  # nothing is known of the inputs
    np.testing.assert_array_equal(
        sparsegpt(weight, (empty,), pattern), sparsify(weight, None, pattern, "magnitude")
    )


def test_columns_after_a_zero_make_up_for_it_by_least_squares():
    random = np.random.default_rng(0)
    x = random.standard_normal((500, 8)) @ (random.standard_normal((8, 8)) + 3 * np.eye(8))
    hessian = (x.T @ x / 500).astype(np.float32)
    weight = random.standard_normal((5, 8)).astype(np.float32)
    weight[:, 0] *= 0.1
    weight[:, 1:] += 10 * np.sign(weight[:, 1:])
    found = sparsegpt(weight, (hessian,), Pattern.parse("7of8"), damping=1e-4)
    assert not found[:, 0].any()
    expected = compensate(weight, (hessian,), np.arange(1, 8), damping=1e-4)
    assert np.abs(expected - weight[:, 1:]).max() > 0.02
    np.testing.assert_allclose(found[:, 1:], expected, atol=1e-3)


def test_a_wide_hessian_is_gone_through_block_by_block():
    weight = random_weight(columns=512)
    random = np.random.default_rng(5)
    blocks = []
    for size in (256, 256):
        x = random.standard_normal((600, size)).astype(np.float32)
        blocks.append(x.T @ x / 600)
    found = sparsegpt(weight, tuple(blocks), Pattern.parse("s50"))
    assert (np.count_nonzero(found, axis=1) == 256).all()
    alone = sparsegpt(weight[:, :256].copy(), (blocks[0],), Pattern.parse("s50"))
    np.testing.assert_allclose(found[:, :256], alone, atol=1e-5)


def test_rows_do_not_depend_on_each_other(demo_layer):
    source, stats = demo_layer
    statistics = Statistics.of(source.config, {"blocks.0.q_proj": stats})
    thin = Sparsified(source, statistics, Pattern.parse("2of4"), "sparsegpt")
    whole = thin.read("blocks.0.qkv_proj.weight")
    np.testing.assert_allclose(
        thin.read("blocks.0.qkv_proj.weight", slice(100, 200)), whole[100:200], atol=1e-5
    )
    np.testing.assert_allclose(thin.read("blocks.0.q_proj.weight"), whole[:256], atol=1e-5)
    for untouched in ("embed_tokens.weight", "lm_head.weight", "blocks.0.input_layernorm.weight"):
        np.testing.assert_array_equal(thin.read(untouched), source.read(untouched))
    with pytest.raises(UsageError, match="calibration texts"):
        thin.read("blocks.1.q_proj.weight")


# --- Core ML ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_written_constants_decode_to_what_apple_makes_of_them(exported, name):
    pattern, _, grid = name.partition("-")
    sparsity = pattern if "of" in pattern else int(pattern[1:]) / 100
    built = exported("coreml", "llama", {"num_hidden_layers": 1}, grid=grid, sparsity=sparsity)
    grids = {e.name.split(".")[-2]: e.grid for e in built.plan.entries if len(e.shape) == 2}
    assert grids["q_proj"] == name and grids["lm_head"] == grid
    apple = apples(built)
    function = read_package(built.artifact.path).function("main")
    ours = constexpr.constants_of(function.operations)
    described = {row["name"]: row for row in describe(built.artifact.path)["tensors"]}
    for entry in built.plan.entries:
        told = described[entry.target_name]
        assert (told["bytes"], told["shape"]) == (entry.nbytes, list(entry.shape))
        if entry.grid != name:
            continue
        mine = constexpr.decode(ours[entry.target_name]).numpy()
        expected = apple[entry.target_name]
        np.testing.assert_array_equal(mine.view(np.uint16), expected.view(np.uint16))
        kept = get_grid(name).pattern.count(mine.shape[1])
        assert (np.count_nonzero(mine, axis=1) <= kept).all()
        assert np.count_nonzero(mine) > 0.8 * kept * len(mine)  # an integer may be 0 as well
        assert told["grid"] == f"s{round(100 - 100 * kept / mine.shape[1])}-{grid}"
    tokens = list(range(3, 20))
    evaluator = Evaluator(built.artifact.path)
    inputs = {"inputIds": np.array([tokens], np.int32), "causalMask": np.zeros((1, 1, 1, 17))}
    found = evaluator.predict(inputs, evaluator.make_state())["logits"][0]
    expected = reference(built, halves=True).logits(tokens)
    assert np.abs(found - expected).max() < 5e-5


def apples(built: Exported) -> dict[str, np.ndarray]:
    """Every sparse constant as coremltools decompresses it."""
    import coremltools
    from coremltools.converters.mil.frontend.milproto import load

    model = coremltools.models.MLModel(str(built.artifact.path), skip_model_load=True)
    spec = model.get_spec()
    folder = built.artifact.path / "Data/com.apple.CoreML/weights"
    program = load.load(spec, spec.specificationVersion, str(folder))
    return {
        op.name: op.materialized_val_inference()
        for op in program.functions["main"].operations
        if op.op_type == "constexpr_sparse_to_dense"
    }


def test_the_plan_tells_the_break_even(exported):
    config = exported.config("llama", num_hidden_layers=1)
    quarter = plan_for("coreml", config, {"grid": "int4-g32", "sparsity": 0.25})
    assert "4.500 bits per weight, 4.500 without zeros: nothing is saved" in quarter.notes[-1]
    half = plan_for("coreml", config, {"grid": "lut4-g8", "sparsity": "2of4"})
    assert "break-even is a quarter of zeros at 4 bits" in half.notes[-1]
    assert "nothing is saved" not in half.notes[-1]
    assert half.type_name == "2of4-lut4-g8"
    # What a plan.json says is taken again.
    choices = {entry.name: entry.grid for entry in half.entries if len(entry.shape) == 2}
    choices = {name: grid for name, grid in choices.items() if not name.startswith("rope")}
    again = plan_for("coreml", config, {"grid": "lut4-g8", "sparsity": "2of4"}, choices=choices)
    assert again.entries == half.entries


# --- builds -----------------------------------------------------------------------------------

SHORT = ("--set", "calibration.tokens=256", "--set", "calibration.sequence_length=32")


@pytest.fixture
def model(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(tiny.TEXT * 3)
    return tiny.make("phi3", tmp_path / "m")


def test_a_sparse_package_is_built_and_run(model, tmp_path):
    done = packlight(
        "build", "m", "-r", "sparse-2of4-coreml", "-o", "out", "--json", "--threads", 1, *SHORT,
        "--calibration", "text.txt", "--eval-text", "text.txt",
        "--set", "verify={windows: 2, sequence_length: 32, gates: {}}",
        cwd=tmp_path, env={"PACKLIGHT_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    artifact = json.loads(done.stdout)["artifacts"][0]
    assert artifact["type"] == "2of4-int4-g32"
    assert artifact["runtime"] is not None and artifact["kl_divergence"]["mean"] > 0
    assert "zeros chosen by sparsegpt (2of4) in the blocks' linears" in artifact["notes"]
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["quantize"]["calibration"]


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_other_formats_refuse_zeros(model, target, tmp_path):
    wanted = ("--set", f"targets.{target}.sparsity=2of4")
    build = ("build", "m", "-f", target, "--no-verify", "-o", "out", *wanted)
    told = refused(packlight(*build, cwd=tmp_path))
    assert "would cost quality and save nothing" in told
    assert "--allow-dense writes it all the same" in told
    recipe = load("phone-4bit", [f"targets.{target}.sparsity=0.5", "allow_dense=true"])
    check_zeros(target, recipe)
    budget = load("phone-4bit", [f"targets.{target}.sparsity=0.5", "budget.weights=1MB"])
    with pytest.raises(UsageError, match="a budget chooses among dense grids"):
        check_zeros(target, budget)
    with pytest.raises(UnsupportedModelError):
        check_zeros(target, load("phone-4bit", [f"targets.{target}.sparsity=0.5"]))


def test_an_experiment_stores_its_zeros(model, tmp_path):
    done = packlight(
        "build", "m", "-f", "gguf", "--no-verify", "-o", "out", "--allow-dense", "--json",
        "--set", "targets.gguf={type: F16, sparsity: 0.75, sparsity_method: magnitude}",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    artifact = json.loads(done.stdout)["artifacts"][0]
    assert any("stored like other weights: nothing is saved" in note for note in artifact["notes"])
    from gguf import GGUFReader

    tensors = {t.name: t.data for t in GGUFReader(tmp_path / "out" / artifact["path"]).tensors}
    assert (
        np.count_nonzero(tensors["blk.0.ffn_down.weight"])
        <= tensors["blk.0.ffn_down.weight"].size // 4
    )
    assert np.count_nonzero(tensors["token_embd.weight"]) > 0.9 * tensors["token_embd.weight"].size


def test_options_that_exclude_each_other(model, tmp_path):
    (tmp_path / "im.gguf").write_bytes(b"")
    build = ("build", "m", "-f", "coreml", "--no-verify", "-o", "out",
             "--set", "targets.coreml.sparsity=2of4")  # fmt: skip
    use = ("--set", "quantize.solver=scale_search")
    told = refused(packlight(*build, *use, "--imatrix", "im.gguf", cwd=tmp_path))
    assert "--imatrix has less than sparsegpt needs" in told
