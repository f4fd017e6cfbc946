"""Every recipe that ships, built on a small checkpoint of the family it is for.

Only sizes are changed: texts, budgets, and the number of grids that a budget measures.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from writing import plan_for

import recipes
from compress.build.decide import BuildSettings
from compress.build.pipeline import build
from compress.console import Console
from compress.decoder.config import DecoderConfig
from compress.demo import model_path
from compress.grids import get_grid
from compress.recipe import load

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from published import MODELS  # noqa: E402

SHORT = ("calibration.tokens=1024", "calibration.sequence_length=128")
# One grid below, one at and one above what the phone recipes ask for: soon measured.
FEW = "quantize.candidates=[Q3_K, IQ4_NL, Q8_0, lut3-g8, lut4-g8, lut6-g8]"


def made(
    recipe: str, model: str | Path, folder: Path, *overrides: str, **settings: Any
) -> dict[str, Any]:
    """The report of a build, after its files were compared with it."""
    options = {"verify": False, "threads": 1} | settings
    wanted = BuildSettings(
        str(model), folder, recipe=recipe, overrides=(*SHORT, *overrides), **options
    )
    assert build(wanted, Console("quiet")).folder == folder
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    assert report["verdict"] != "failed"
    assert {a["format"] for a in report["artifacts"]} == set(load(recipe).targets)
    assert report["recipe"]["name"] == recipe
    return report


def grids(report: dict[str, Any], form: str) -> dict[str, str]:
    """Name → grid of the matrices of an artifact."""
    (artifact,) = (a for a in report["artifacts"] if a["format"] == form)
    return {t["name"]: t["grid"] for t in artifact["tensors"] if len(t["shape"]) == 2}


# Recipe → a family it is for, keys of its config.json, and what each format is then called.
FIXED: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "int4-fast": ("qwen2", {}, {"gguf": "Q4_K_M", "onnx": "int4-g32", "coreml": "int4-g32"}),
    "phone-4bit": ("mistral", {}, {"gguf": "Q4_K_M", "onnx": "int4-g32", "coreml": "int4-g32"}),
    "small-4bit": ("qwen3", {}, {"gguf": "IQ4_XS", "onnx": "int4-g128", "coreml": "int4-g128"}),
    "near-lossless-8bit": ("llama", {}, {"gguf": "Q8_0", "onnx": "int8-g32", "coreml": "int8-g32"}),
    "phi2-laptop": ("phi", {}, {"gguf": "Q4_K_M", "onnx": "int4-g32"}),
    "llama3-8b-16gb": ("llama", {"rope_theta": 5e5}, {"gguf": "Q5_K_M", "onnx": "int4-g32"}),
    "sparse-2of4-coreml": ("phi3", {}, {"coreml": "2of4-int4-g32"}),
    "prune-depth-10": (
        "llama3",
        {"num_hidden_layers": 6},
        {"gguf": "Q4_K_M", "onnx": "int4-g32", "coreml": "int4-g32"},
    ),
}


@pytest.mark.parametrize("name", FIXED)
def test_a_recipe_builds_on_its_family(name: str, tmp_path: Path) -> None:
    family, keys, types = FIXED[name]
    model = tiny.make(family, tmp_path / "model", **({"num_hidden_layers": 1} | keys))
    report = made(name, model, tmp_path / "out")
    assert {a["format"]: a["type"] for a in report["artifacts"]} == types
    for artifact in report["artifacts"]:
        blocks = {t.split(".")[1] for t in grids(report, artifact["format"]) if "blocks." in t}
        assert len(blocks) == (5 if name == "prune-depth-10" else 1)


@pytest.mark.parametrize(
    "name", [pytest.param("int4-balanced", marks=pytest.mark.slow), "phi3-mini-iphone"]
)
def test_a_recipe_passes_its_own_gates_on_a_trained_phi3(name: str, tmp_path: Path) -> None:
    few = ["verify.windows=4", "verify.sequence_length=256"]
    if name == "phi3-mini-iphone":
        few.append("targets.coreml.context=256")
    report = made(name, model_path(), tmp_path / "out", *few, verify=True)
    assert report["verdict"] == "passed"
    for artifact in report["artifacts"]:
        assert 0 < artifact["kl_divergence"]["mean"] < 0.1
    if name == "phi3-mini-iphone":
        assert set(grids(report, "coreml").values()) == {"F16", "int4-g32"}  # F16: rotary tables


# Recipe → family, bytes for the tiny checkpoint, candidates.
BUDGETS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "phone-1.8GB": ("phi3", 430_000, (FEW,)),
    "phone-1.8GiB": ("phi3", 470_000, (FEW,)),
    "mobilellm-125m": ("mobilellm", 560_000, (FEW.replace("]", ", Q6_K, int4-g32, int8-g32]"),)),
}


# The phone recipes are alike but for their number of bytes.
@pytest.mark.parametrize(
    "name", [pytest.param("phone-1.8GB", marks=pytest.mark.slow), *[*BUDGETS][1:]]
)
def test_a_budget_is_kept_and_used(name: str, tmp_path: Path) -> None:
    family, budget, few = BUDGETS[name]
    model = tiny.make(family, tmp_path / "model", num_hidden_layers=1)
    report = made(name, model, tmp_path / "out", *few, budget=str(budget))
    for artifact in report["artifacts"]:
        assert 0.97 * budget < artifact["bytes"] <= budget
        chosen = grids(report, artifact["format"])
        assert len(set(chosen.values())) > 1
        if name == "mobilellm-125m":
            assert get_grid(chosen["embed_tokens.weight"]).bits >= 6


def test_a_budget_of_more_than_the_largest_file_takes_the_most_bits(tmp_path: Path) -> None:
    model = tiny.make("phi3", tmp_path / "model", num_hidden_layers=1)
    report = made("phone-1.8GiB", model, tmp_path / "out", FEW)  # its own 1.8 GiB
    assert report["budget_bytes"] == 1_932_735_283
    assert set(grids(report, "gguf").values()) == {"Q8_0"}
    linears = {n: g for n, g in grids(report, "coreml").items() if n.endswith(".weight")}
    assert set(linears.values()) == {"lut6-g8"}


# --- what the comments say of the large models ---------------------------------------------------


def weight_bytes(recipe: str, model: str, form: str, *overrides: str) -> int:
    """Bytes of the tensors of a published shape: the file has a few MB of header and tokenizer."""
    config = DecoderConfig.from_hf(MODELS[model][2])
    settings = load(recipe, overrides, [form]).targets[form]
    return plan_for(form, config, settings).weights_bytes


@pytest.mark.parametrize(
    ("recipe", "model", "form", "said"),
    [
        ("phi3-mini-iphone", "phi-3-mini-4k", "coreml", "2.15 GB"),
        ("phi2-laptop", "phi-2", "gguf", "1.74 GB"),
        ("phi2-laptop", "phi-2", "onnx", "1.63 GB"),
        ("llama3-8b-16gb", "llama-3-8b", "gguf", "5.73 GB"),
        ("llama3-8b-16gb", "llama-3-8b", "onnx", "5.11 GB"),
        ("int4-balanced", "phi-3-mini-4k", "gguf", "2.40 GB"),
        ("int4-balanced", "phi-3-mini-4k", "onnx", "2.15 GB"),
    ],
)
def test_the_bytes_in_a_comment_are_those_of_the_plan(
    recipe: str, model: str, form: str, said: str
) -> None:
    assert said.removesuffix(" GB") in recipes.read(recipe)
    expected = float(said.removesuffix(" GB")) * 1e9
    assert weight_bytes(recipe, model, form) == pytest.approx(expected, rel=0.003)


def test_onnx_cannot_hold_phi3_mini_in_the_phone_budgets() -> None:
    least = weight_bytes("int4-fast", "phi-3-mini-4k", "onnx", "targets.onnx.group_size=256")
    gib, gb = (load(f"phone-1.8{unit}").budget_bytes for unit in ("GiB", "GB"))
    assert gib is not None
    assert gb is not None
    assert least > gib > gb


def test_every_recipe_is_built_here_and_has_its_paragraph() -> None:
    built = {*FIXED, *BUDGETS, "int4-balanced", "phi3-mini-iphone"}
    assert built == set(recipes.names())
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in recipes.names():
        assert f"**`{name}`**" in text
