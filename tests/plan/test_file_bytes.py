"""Predicted sizes, which budgets are compared with, are those of written files, also for mixes."""

from __future__ import annotations

import random
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import writing
from writing import plan_for

from compress.allocation.choices import Choice, Rules, choices_of
from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.demo import model_path
from compress.errors import GridError
from compress.formats import FORMATS as REGISTERED
from compress.formats import Format, get_format
from compress.grids import get_grid
from compress.plan.job import describe_model
from compress.plan.shapes import Artifact, Plan
from compress.plan.weights import Weights
from compress.solvers import rtn

FORMATS = tuple(name for name, row in REGISTERED.items() if row.installed)
ROOM = tempfile.TemporaryDirectory(prefix="packlight-sizes-")  # gone when the process is
# A shared embedding, biases and LayerNorm, fused tensors, shared blocks, wide heads.
MODELS = ("demo", "llama3", "phi", "phi3", "shared", "qwen3")


@cache
def source(model: str) -> Stored:
    if model == "demo":
        checkpoint = Checkpoint.open(str(model_path()))
    else:
        folder = Path(tempfile.mkdtemp(dir=ROOM.name))
        family, sharing = ("mobilellm", True) if model == "shared" else (model, False)
        checkpoint = Checkpoint.open(str(tiny.make(family, folder, layer_sharing=sharing)))
    return Stored(checkpoint, describe_model(checkpoint))


def choices(model: str, exporter: Format, plan: Plan, rules: Rules | None = None) -> list[Choice]:
    return choices_of(plan, source(model).config, exporter, rules or Rules())


def mixed(model: str, format: str, seed: int = 0) -> tuple[Plan, int]:
    """A plan with grids at random, and the bytes of its choices."""
    exporter, config, rng = get_format(format), source(model).config, random.Random(seed)
    plan = plan_for(format, config)
    grids: dict[str, str] = {}
    nbytes = 0
    for choice in choices(model, exporter, plan):
        option = rng.choice(choice.options)
        grids |= dict.fromkeys(choice.names, option.grid)
        nbytes += option.nbytes
    return plan_for(format, config, choices=grids), nbytes


def write(model: str, plan: Plan) -> Artifact:
    weights = Weights(source(model), lambda weight, grid, name: rtn(weight, grid))
    folder = Path(tempfile.mkdtemp(dir=ROOM.name))
    return writing.write(plan, weights, folder)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("format", FORMATS)
def test_predicted_bytes_are_the_written_ones(model: str, format: str) -> None:
    exporter = get_format(format)
    plan, _ = mixed(model, format)
    assert plan.type_name.startswith("mix-")
    for made in (plan, plan_for(format, source(model).config)):
        predicted = exporter.file_bytes(made, source(model))
        assert abs(predicted - write(model, made).nbytes) <= 64


@pytest.mark.parametrize("format", FORMATS)
def test_a_mix_runs_and_says_what_it_is(format: str) -> None:
    plan, _ = mixed("qwen3", format, seed=1)
    artifact = write("qwen3", plan)
    exporter = get_format(format)
    facts = exporter.describe(artifact.path)
    assert facts["type"] == plan.type_name
    expected = sorted(entry.grid for entry in plan.entries if len(entry.shape) == 2)
    found = sorted(row["grid"] for row in facts["tensors"] if len(row["shape"]) == 2)
    assert [g for g in found if g not in ("table", "F16", "F32")] == [
        g for g in expected if g not in ("F16", "F32")
    ]
    runtime = exporter.open_runtime(artifact.path, context=32, threads=1)
    assert np.isfinite(runtime.logits(list(range(3, 19)))).all()
    runtime.close()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model", ("demo", "shared", "phi"))
def test_bytes_of_candidates_add_up(model: str, format: str) -> None:
    """Two mixes differ in their files by what their candidates say, but for a graph's nodes."""
    exporter = get_format(format)
    (one, bytes_one), (two, bytes_two) = mixed(model, format, 1), mixed(model, format, 2)
    sizes = [exporter.file_bytes(plan, source(model)) for plan in (one, two)]
    assert abs(sizes[0] - sizes[1] - (bytes_one - bytes_two)) < 4096


def test_choices_know_what_a_runtime_ties_together() -> None:
    gguf, onnx, coreml = map(get_format, ("gguf", "onnx", "coreml"))
    demo = choices("demo", gguf, plan_for("gguf", source("demo").config))
    fused = {c.name: c.roles for c in demo}
    assert fused["blocks.0.qkv_proj.weight"] == ("q_proj", "k_proj", "v_proj")
    assert fused["blocks.0.gate_up_proj.weight"] == ("gate_proj", "up_proj")
    for exporter in (gguf, onnx, coreml):
        tied = choices("llama3", exporter, plan_for(exporter.name, source("llama3").config))
        assert [c.roles for c in tied if "lm_head" in c.roles] == [("embed_tokens", "lm_head")]
    shared = choices("shared", gguf, plan_for("gguf", source("shared").config))
    copies = next(c for c in shared if c.name == "blocks.0.down_proj.weight")
    assert copies.names == ("blocks.0.down_proj.weight", "blocks.1.down_proj.weight")
    assert copies.options[0].nbytes == 2 * 256 * 512 // 256 * 84  # Q2_K, written twice


def test_rules() -> None:
    gguf = get_format("gguf")
    plan = plan_for("gguf", source("demo").config)
    rules = Rules(("Q3_K", "Q6_K", "int4-g32"), {"lm_head": 6, "v_proj": 4})
    grids = {c.name: [o.grid for o in c.options] for c in choices("demo", gguf, plan, rules)}
    assert grids["lm_head.weight"] == grids["blocks.0.qkv_proj.weight"] == ["Q6_K"]
    assert grids["blocks.0.o_proj.weight"] == ["Q3_K", "Q6_K"]
    others = choices("demo", gguf, plan, Rules(("int4-g32",)))  # none of GGUF's: its own choice
    assert len(others[0].options) > 5
    with pytest.raises(GridError, match=r"no grid is left for lm_head.weight .*at least 8 bits"):
        choices("demo", gguf, plan, Rules(("Q3_K", "Q6_K"), {"lm_head": 8}))
    names = ("Q4_K", "IQ4_XS", "int8-channel", "lut6-g8", "int4-g32-asym", "F16")
    assert [get_grid(name).bits for name in names] == [4, 4, 8, 6, 4, 16]


@pytest.mark.parametrize(
    ("format", "name", "grid", "message"),
    [
        ("gguf", "lm_head.weight", "Q9_K", "no GGUF type 'Q9_K'"),
        ("onnx", "lm_head.weight", "F16", "onnxruntime has no F16 for it"),
        ("onnx", "lm_head.weight", "int4-channel", "onnxruntime has no int4-channel"),
        ("coreml", "lm_head.weight", "lut5-g8", "cannot store 2048×256 as lut5-g8"),
    ],
)
def test_impossible_choices_are_refused(format: str, name: str, grid: str, message: str) -> None:
    with pytest.raises(GridError, match=message):
        plan_for(format, source("demo").config, choices={name: grid})
