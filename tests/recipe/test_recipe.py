"""Recipes: the shipped ones validate, and every mistake names its path and the nearest key."""

from __future__ import annotations

import pytest
import yaml

import recipes
from compress import recipe
from compress.errors import PacklightError, RecipeError
from compress.plan.document import PlanDocument
from compress.report.report import Report


@pytest.mark.parametrize("name", recipes.names())
def test_shipped_recipes_validate_and_survive_a_round_trip(name, tmp_path):
    loaded = recipe.load(name)
    file = tmp_path / "again.yaml"
    file.write_text(loaded.to_yaml())
    assert recipe.load(str(file)) == loaded
    only = {  # what the recipe is for
        "sparse-2of4-coreml": {"coreml"},
        "phi3-mini-iphone": {"coreml"},
        "phone-1.8GB": {"gguf", "coreml"},
        "phone-1.8GiB": {"gguf", "coreml"},
        "phi2-laptop": {"gguf", "onnx"},
        "llama3-8b-16gb": {"gguf", "onnx"},
    }
    assert set(loaded.targets) == only.get(name, {"gguf", "onnx", "coreml"})


def test_defaults_are_filled_in_from_the_schema(tmp_path):
    file = tmp_path / "least.yaml"
    file.write_text("schema: 1\ntargets: {gguf: , onnx: {bits: 8}}\n")
    loaded = recipe.load(str(file))
    assert loaded.targets["gguf"] == {"type": "Q4_K_M"}
    assert loaded.targets["onnx"]["bits"] == 8
    assert loaded.targets["onnx"]["group_size"] == 32
    assert "embedding_bits" not in loaded.targets["onnx"]  # the exporter's: as bits
    assert (loaded.name, loaded.solver, loaded.windows) == ("least", "rtn", 0)  # by size


def test_overrides_and_formats():
    loaded = recipe.load("phone-4bit", ["targets.gguf.type=q5_k_m"], ["gguf"])
    assert list(loaded.targets) == ["gguf"]
    assert loaded.targets["gguf"]["type"] == "Q5_K_M"


@pytest.mark.parametrize("limit", [">=0.9", "<=0.05"])
def test_a_limit_needs_no_quotes_for_yaml(limit):
    loaded = recipe.load("phone-4bit", [f"verify.gates.top1_agreement={limit}"])
    assert loaded.gates["top1_agreement"] == limit


def test_a_format_that_the_recipe_lacks_is_added_with_its_defaults(tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text("schema: 1\ntargets: {gguf: {type: Q8_0}}\n")
    assert recipe.load(str(file), formats=["coreml"]).targets["coreml"]["preset"] == "iphone-gpu"


@pytest.mark.parametrize(
    ("override", "says", "hint"),
    [
        ("targets.gguf.typ=Q4_0", "unknown key targets.gguf.typ", "did you mean type?"),
        ("targts.gguf=1", "unknown key targts", "did you mean targets?"),
        ("targets.gguf.type=Q4_K_X", "targets.gguf.type", "did you mean Q4_K_"),
        ("targets.onnx.bits=3", "targets.onnx.bits: 3 is not allowed", "4, 8"),
        ("targets.coreml.grid=int5", "targets.coreml.grid", "int4-g32"),
        ("verify.windows=many", "verify.windows", ""),
        ("schema=2", "schema: must be 1", ""),
        ("quantize.solver=magic", "quantize.solver", "rtn"),
        ("nonsense", "write KEY=VALUE", ""),
        ("a..b=1", "write KEY=VALUE", ""),
        ("verify.windows=[1", "not a YAML value", ""),
    ],
)
def test_mistakes_name_their_path(override, says, hint):
    with pytest.raises(RecipeError) as caught:
        recipe.load("phone-4bit", [override])
    assert says in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message


def test_an_override_of_a_target_that_is_left_out_is_refused():
    with pytest.raises(RecipeError, match="-f gguf leaves onnx out") as caught:
        recipe.load("int4-fast", ["targets.gguf.type=Q8_0", "targets.onnx.bits=8"], ["gguf"])
    assert "-f onnx" in caught.value.hint
    assert set(recipe.load("int4-fast", ["targets.onnx.bits=8"], ["gguf", "onnx"]).targets) == {
        "gguf", "onnx",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["- a\n", "a: [\n", "", "\x00", "schema: 1\ntargets: {}\n"])
def test_broken_files_are_refused(tmp_path, text):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError):
        recipe.load(str(file))


def test_unknown_recipe_offers_the_nearest():
    with pytest.raises(RecipeError) as caught:
        recipe.load("phone-4bits")
    assert "phone-4bit" in caught.value.hint


def test_shipped_files_say_their_own_name():
    for name in recipes.names():
        assert yaml.safe_load(recipes.read(name))["name"] == name


@pytest.mark.parametrize("text", ["day: 2020-13-01", "a: " + "[" * 9999, "n: " + "9" * 5000])
def test_yaml_that_its_library_chokes_on_is_refused(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match="not YAML"):
        recipe.load(str(file))
    key, _, value = text.partition(": ")
    with pytest.raises(RecipeError, match="not a YAML value"):
        recipe.load("phone-4bit", [f"{key}={value}"])


@pytest.mark.parametrize("kind", [PlanDocument, Report])
def test_json_that_is_too_deep_is_refused(tmp_path, kind):
    file = tmp_path / "deep.json"
    file.write_text('{"a":' * 99999 + "1" + "}" * 99999)
    with pytest.raises(PacklightError, match="is not JSON"):
        kind.load(file)
