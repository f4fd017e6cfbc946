"""Rotated targets: planned, refused where they only lose, and run in the real runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from commands import packlight
from writing import plan_for, write

from compress.calibration.step import Importance
from compress.checkpoint.checkpoint import Checkpoint
from compress.checkpoint.sources import Stored
from compress.decoder.decoder import Decoder
from compress.errors import GridError, PacklightError, UnsupportedModelError, UsageError
from compress.plan.document import plan_document
from compress.plan.job import Job, describe_model, prepare
from compress.plan.weights import Weights
from compress.pruning.rotation import Rotated
from compress.pruning.transforms import transforms_of
from compress.recipe import load
from compress.solvers import rtn
from exporters.coreml.inspection import describe
from exporters.coreml.planning import candidates
from exporters.coreml.runtime import open_runtime


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return tiny.make("qwen2", tmp_path_factory.mktemp("models") / "tiny-qwen2")


def plan(model: Path, *settings: str, formats: tuple[str, ...] = ("coreml",)) -> Job:
    recipe = load("phone-4bit", [f"targets.coreml.{setting}" for setting in settings], formats)
    return prepare(Checkpoint.open(model), recipe, transforms=transforms_of(recipe))


def test_only_the_rotated_target_has_weights_of_its_own(tied):
    job = plan(tied, "grid=lut4-g8", "rotate=r1r2", formats=("gguf", "coreml"))
    gguf, coreml = job.plans
    assert job.source_of(gguf) is job.source
    assert job.source_of(coreml).fingerprint() != job.source.fingerprint()
    assert job.config.tie_word_embeddings  # what artifacts are compared with
    notes = plan_document(job)["targets"]["coreml"]["notes"]
    assert any("residual stream (R1) and the values in each head (R2)" in note for note in notes)
    assert not any("rotated" in note for note in plan_document(job)["targets"]["gguf"]["notes"])


def test_r1_counts_the_bytes_of_the_head_it_unties(tied):
    (before,), (r1,), (r2,) = (
        plan(tied, "grid=lut4-g8", f"rotate={kinds}").plans for kinds in ("none", "r1", "r2")
    )
    (head,) = (entry for entry in r1.entries if entry.name == "lm_head.weight")
    assert head.nbytes == 512 * 256 // 2 + 512 // 8 * 16 * 2
    assert r1.weights_bytes == before.weights_bytes + head.nbytes
    assert r2.weights_bytes == before.weights_bytes
    assert any("unties the embedding" in note and "67.58 kB" in note for note in r1.notes)
    assert not any("unties" in note for note in r2.notes)


@pytest.mark.parametrize("grid", ["int4-g32", "int8-g64-asym"])
def test_groups_along_the_inputs_are_refused(tied, grid):
    with pytest.raises(GridError, match=f"rotate r1 with {grid}") as caught:
        plan(tied, f"grid={grid}", "rotate=r1")
    assert_one_line(caught.value)
    assert "lut4-g8" in (caught.value.hint or "")


def test_a_budget_chooses_no_such_groups_either(tied):
    """Neither of itself nor where the recipe names them."""
    (rotated,) = plan(tied, "grid=int4-channel", "rotate=r1").plans
    (entry,) = (entry for entry in rotated.entries if entry.name == "blocks.0.up_proj.weight")
    wanted = ("lut4-g8", "int4-g32", "int8-channel")
    found = [candidates(entry, rotated.settings, names) for names in ((), wanted)]
    assert {option.grid for option in found[1]} == {"lut4-g8", "int8-channel"}
    assert not {option.grid for option in found[0]} & {"int4-g32", "int4-g128", "int8-g32"}
    (plain,) = plan(tied, "grid=int4-channel").plans
    assert "int4-g32" in {option.grid for option in candidates(entry, plain.settings, ())}


def test_layernorm_is_refused(tmp_path):
    model = tiny.make("phi", tmp_path / "tiny-phi")
    with pytest.raises(UnsupportedModelError, match="LayerNorm") as caught:
        plan(model, "grid=lut4-g8", "rotate=r2")
    assert_one_line(caught.value)


def test_an_imatrix_of_the_model_as_it_was_is_refused(tmp_path):
    file = tmp_path / "imatrix.gguf"
    file.touch()
    settings = ["targets.coreml.grid=lut4-g8", "quantize.solver=scale_search"]
    Importance(file).check(load("phone-4bit", settings, ["coreml"]), ())
    recipe = load("phone-4bit", [*settings, "targets.coreml.rotate=r2"], ["coreml"])
    with pytest.raises(UsageError, match="rotation") as caught:
        Importance(file).check(recipe, ())
    assert_one_line(caught.value)


def assert_one_line(error: PacklightError) -> None:
    assert "\n" not in str(error)
    assert error.hint


def test_the_package_computes_the_float_model(tied, tmp_path):
    """In float16 nothing is left but its rounding: a wrong fold anywhere would be seen."""
    checkpoint = Checkpoint.open(tied)
    stored = Stored(checkpoint, describe_model(checkpoint))
    rotated = Rotated(stored, "r1r2")
    settings = {"grid": "F16", "context": 64, "rotate": "r1r2"}
    plan = plan_for("coreml", rotated.config, settings, model_name="Tiny")
    written = write(plan, Weights(rotated, rtn), tmp_path)
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, 512, 48)]
    expected = Decoder(stored.config, stored.read).logits(tokens)
    runtime = open_runtime(written.path, context=64, threads=1)
    found = runtime.logits(tokens)
    runtime.close()
    told = describe(written.path)["parameters"]
    assert told == stored.config.num_parameters  # not more for the head that is untied
    assert expected.std() > 1
    assert np.abs(found - expected).max() < 0.05


def test_palettes_of_rotated_weights_by_rotated_inputs(tied, tmp_path):
    """Statistics are those of the rotated walk: gptq by any others would do worse than rtn."""
    common = ("targets.coreml.grid=lut4-g8", "calibration.tokens=1024")
    plain = build(tied, tmp_path / "rtn", *common, "quantize.solver=rtn")
    solved = build(tied, tmp_path / "gptq", *common, "quantize.solver=gptq")
    assert solved["kl_divergence"]["mean"] < 0.8 * plain["kl_divergence"]["mean"]
    assert any("unties the embedding" in note for note in solved["notes"])


def build(model: Path, folder: Path, *settings: str) -> dict[str, object]:
    """The report of a package rotated by R1 and R2; scored on 512 tokens."""
    folder.mkdir(exist_ok=True)
    short = ("verify.windows=4", "verify.sequence_length=128", "targets.coreml.rotate=r1r2")
    options = [word for setting in (*short, *settings) for word in ("--set", setting)]
    done = packlight(
        "build", model, "-f", "coreml", "-o", "out", "--json", "--threads", 1, *options,
        cwd=folder, env={"PACKLIGHT_CACHE": str(folder / "cache")},
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    (artifact,) = json.loads(done.stdout)["artifacts"]
    return artifact
