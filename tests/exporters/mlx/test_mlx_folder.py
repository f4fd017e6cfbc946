"""The MLX folder: files, config, resuming, and the decoded weights. mlx itself is in
test_mlx_runtime.py."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import writing
from commands import packlight
from exported import Exports, config_of
from safetensors import safe_open

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import WeightMap
from compress.decoder.decoder import Decoder
from compress.demo import model_path
from compress.errors import ArtifactError, GridError, RuntimeMissingError, UnsupportedModelError
from compress.formats import get_format
from compress.grids import get_grid
from compress.plan.weights import Ledger, Weights
from compress.recipe import load
from compress.recipe.model import Recipe
from compress.solvers import rtn
from exporters.mlx import tensors
from exporters.mlx.decoded import Decoded
from exporters.mlx.writer import Writer

LACKING = {  # as the tiny models have it
    "gpt_neox": "has an MLP of 4 hidden sizes, not of 128",
    "glm": "rotates whole heads, not 16 of 32 dimensions",
    "llama4_text-nope": "has norms of q and k in every layer",
}
MIXED = {"bits": 4, "group_size": 64, "embedding_bits": 8}


def decoded(folder: Path, config) -> Decoded:
    pieces, _ = tensors.read_headers(folder)
    keys = json.loads((folder / "config.json").read_text())
    return Decoded(folder, config, pieces, keys["quantization"])


def test_safetensors_reads_it_and_the_config_says_how(exported: Exports) -> None:
    made = exported("mlx", "qwen2", **MIXED)
    keys = json.loads((made.path / "config.json").read_text())
    own = {"model.embed_tokens": {"bits": 8, "group_size": 64}}
    assert keys["quantization"] == {"bits": 4, "group_size": 64, "mode": "affine"} | own
    assert keys["quantization_config"] == keys["quantization"]
    assert keys["model_type"] == "qwen2"
    index = json.loads((made.path / "model.safetensors.index.json").read_text())
    with safe_open(made.path / "model.safetensors", "np") as file:
        assert file.metadata()["format"] == "mlx"
        names = set(file.keys())
        assert index["weight_map"] == dict.fromkeys(sorted(names), "model.safetensors")
        table = file.get_tensor("model.embed_tokens.weight")
        assert (table.dtype, table.shape) == (np.uint32, (512, 256 * 8 // 32))
        assert file.get_tensor("model.layers.0.self_attn.q_proj.bias").dtype == np.float16
    assert "lm_head.weight" not in names  # tied
    assert {path.name for path in made.path.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert made.artifact.nbytes == (made.path / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"bits": 3, "group_size": 32}),
        ("phi3", {"bits": 6, "dtype": "bfloat16"}),  # q, k, v and gate, up in one tensor
        ("gemma2", {"bits": 5}),  # norms lack 1
        ("phi", {"bits": 8, "group_size": 128}),  # biases
        ("mobilellm", {"bits": 2}),
    ],
)
def test_the_decoded_weights_are_those_of_the_solver(
    exported: Exports, family: str, settings: dict[str, object]
) -> None:
    made = exported("mlx", family, **settings)
    weights, shapes = decoded(made.path, made.config), WeightMap(made.config)
    plans = {entry.name: entry for entry in made.plan.entries}
    for name, entry in plans.items():
        values = made.weights.read(name)
        found = weights.tensor(entry.target_name)
        if entry.grid in ("F16", "BF16"):
            offset = made.config.norm_offset if name.endswith("norm.weight") else 0.0
            assert np.abs(found + offset - values).max() <= 2.0**-8 * np.abs(values).max()
        else:
            assert np.array_equal(found, rtn(values, get_grid(entry.grid)).decode()), name
    for name in shapes.names():
        assert weights.read(name).shape == shapes.shape(name)
    float_model = Decoder(made.config, made.weights.read, threads=1)
    ours = Decoder(made.config, weights.read, threads=1)
    tokens = made.tokens(20)
    if settings["bits"] == 8:
        assert np.abs(ours.logits(tokens) - float_model.logits(tokens)).mean() < 0.2


def test_rows_by_group_have_the_checkpoint_s_order(exported: Exports) -> None:
    path = exported.checkpoint("gpt_neox", intermediate_size=1024)
    made = exported.write("mlx", path, {"bits": 8})
    weights = decoded(made.path, made.config)
    stored = Checkpoint.open(path).read("gpt_neox.layers.1.attention.query_key_value.weight")
    found = weights.tensor("model.h.1.attention.query_key_value.weight")
    assert np.abs(found - stored).max() < 0.02 * np.abs(stored).max()
    wanted = made.weights.read("blocks.1.k_proj.weight")
    assert (
        np.abs(weights.read("blocks.1.k_proj.weight") - wanted).max() < 0.02 * np.abs(wanted).max()
    )
    biases = weights.read("blocks.1.k_proj.bias") - made.weights.read("blocks.1.k_proj.bias")
    assert np.abs(biases).max() < 1e-3


def test_files_are_split_and_an_interrupted_one_goes_on(
    exported: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = exported("mlx", "llama", bits=4)
    monkeypatch.setattr(tensors.layout, "__defaults__", (150_000,))
    checkpoint = Checkpoint.open(exported.checkpoint("llama"))
    config = config_of(checkpoint)
    plan = writing.plan_for("mlx", config, {"bits": 4}, model_name="llama")
    source = Stored(checkpoint, config)
    writing.write(plan, Weights(source, rtn), make(tmp_path / "once"))
    files = sorted(path.name for path in (tmp_path / "once").glob("*.safetensors"))
    assert len(files) > 4 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "once" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    pieces, _ = tensors.read_headers(tmp_path / "once")
    before, _ = tensors.read_headers(whole.path)
    assert pieces.keys() == before.keys()
    for name, piece in pieces.items():
        assert np.array_equal(piece.read(tmp_path / "once"), before[name].read(whole.path)), name
    # Interrupted after any tensor, with what was being written behind it.
    for count in (1, len(plan.entries) // 2, len(plan.entries) - 1):
        folder, ledger = make(tmp_path / f"after-{count}"), tmp_path / f"ledger-{count}"
        weights = Weights(source, rtn, Ledger(ledger, "x"))
        writer = Writer(plan, weights, folder, lambda n: None)
        for entry in plan.entries[:count]:
            weights.ledger.add(
                entry.target_name, writer.file, writer.put(entry), weight="", fallen=0
            )
        writer.put(plan.entries[count])
        weights.ledger.sync()
        again = Weights(source, rtn, Ledger(ledger, "x"))
        assert len(again.ledger) == count
        writing.write(plan, again, folder)
        for name in files:
            assert (folder / name).read_bytes() == (tmp_path / "once" / name).read_bytes(), name


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_grids_that_do_not_divide_a_row(exported: Exports) -> None:
    config = replace(exported.config("llama"), intermediate_size=96 * 3)
    plan = writing.plan_for("mlx", config, {"group_size": 128})
    grids = {entry.name: (entry.grid, entry.note) for entry in plan.entries}
    assert grids["blocks.0.q_proj.weight"] == ("affine4-g128", "")
    note = "288 columns do not divide into affine4-g128"
    assert grids["blocks.0.down_proj.weight"] == ("affine4-g32", note)
    config = replace(config, intermediate_size=100)
    plan = writing.plan_for("mlx", config, {})
    entry = next(e for e in plan.entries if e.name == "blocks.0.down_proj.weight")
    assert entry.grid == "F16" and get_format("mlx").candidates(entry, plan.settings) == []
    with pytest.raises(GridError, match="MLX has no Q4_K"):
        writing.plan_for("mlx", config, {}, choices={"embed_tokens.weight": "Q4_K"})


def test_candidates_ascend_and_a_mix_is_named(exported: Exports) -> None:
    made = exported("mlx", "llama")
    entry = next(e for e in made.plan.entries if e.name == "blocks.0.down_proj.weight")
    found = get_format("mlx").candidates(entry, made.plan.settings)
    assert [c.grid for c in found][:3] == ["affine2-g128", "affine2-g64", "affine2-g32"]
    assert [c.nbytes for c in found] == sorted(c.nbytes for c in found) and len(found) == 19
    choices = {entry.name: "affine6-g32"}
    plan = writing.plan_for("mlx", made.config, {}, choices=choices)
    assert plan.type_name.startswith("mix-")


@pytest.mark.parametrize("family", ["gpt_neo", "arcee", "falcon", "ministral"])
def test_families_that_mlx_lm_lacks_are_refused_by_name(exported: Exports, family: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"mlx-lm has no model class for {family}"):
        writing.plan_for("mlx", exported.config(family))


def test_models_that_a_class_cannot_express_are_refused(exported: Exports) -> None:
    config = exported.config("phi")
    with pytest.raises(UnsupportedModelError, match="for phi never has the embedding as its head"):
        writing.plan_for("mlx", replace(config, tie_word_embeddings=True))
    for family, why in LACKING.items():
        with pytest.raises(UnsupportedModelError, match=why):
            writing.plan_for("mlx", exported.config(family))


def test_inspection(exported: Exports, tmp_path: Path) -> None:
    row, made = get_format("mlx"), exported("mlx", "qwen2", **MIXED)
    assert row.find(made.path) == [made.path]
    assert row.find(exported.checkpoint("qwen2")) == []  # a checkpoint is none
    facts = row.inspect(made.path)
    assert facts["parameters"] == made.config.num_parameters
    assert facts["bytes"] == made.artifact.nbytes
    assert facts["config"]["hidden_size"] == 256 and "quantization" not in facts["config"]
    rows = {row["name"]: row for row in facts["tensors"]}
    table = rows["model.embed_tokens.weight"]
    assert (table["shape"], table["grid"]) == ([512, 256], "affine8-g64")
    assert sum(row["bytes"] for row in facts["tensors"]) == made.plan.weights_bytes
    damaged = make(tmp_path / "damaged")
    for path in made.path.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match="is truncated"):
        row.inspect(damaged)
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        row.inspect(damaged)


def test_mxfp4_is_a_mode_of_a_module(exported: Exports, tmp_path: Path) -> None:
    made = exported("mlx", "qwen2", mode="mxfp4", embedding_bits=8)
    keys = json.loads((made.path / "config.json").read_text())["quantization"]
    own = {"model.embed_tokens": {"bits": 8, "group_size": 64, "mode": "affine"}}
    assert keys == {"bits": 4, "group_size": 32, "mode": "mxfp4"} | own
    name = "blocks.1.down_proj.weight"
    (entry,) = [entry for entry in made.plan.entries if entry.name == name]
    weight = Stored(made.checkpoint, made.config).read(name)
    grid = get_grid("MXFP4")  # whose blocks gguf-py reads
    params = grid.fit(weight)
    expected = grid.decode(grid.encode(weight, params), params)
    assert np.array_equal(decoded(made.path, made.config).read(name), expected)
    facts = get_format("mlx").inspect(made.path)
    rows = {row["name"]: row for row in facts["tensors"]}
    row = rows[entry.target_name]
    assert (row["grid"], row["shape"], row["bytes"]) == ("mxfp4", list(entry.shape), entry.nbytes)
    mixed = exported.write("mlx", made.checkpoint.path, {}, choices={name: "mxfp4"})
    keys = json.loads((mixed.path / "config.json").read_text())["quantization"]
    assert keys["mode"] == "affine"
    own = {"bits": 4, "group_size": 32, "mode": "mxfp4"}
    assert keys["model.layers.1.mlp.down_proj"] == own
    damaged = tmp_path / "damaged"
    shutil.copytree(mixed.path, damaged)
    config = json.loads((damaged / "config.json").read_text())
    del config["quantization"]["model.layers.1.mlp.down_proj"]["mode"]
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="down_proj: not a grid"):
        get_format("mlx").inspect(damaged)


def test_without_mlx_lm_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, exported: Exports
) -> None:
    made = exported("mlx", "llama")
    monkeypatch.setenv("PACKLIGHT_MLX_PYTHON", "no-such-python")
    row = get_format("mlx")
    with pytest.raises(RuntimeMissingError, match="PACKLIGHT_MLX_PYTHON is 'no-such-python'"):
        row.open_runtime(made.path, context=16)
    assert [check.ok for check in row.checks()] == [False]
    monkeypatch.delenv("PACKLIGHT_MLX_PYTHON")
    monkeypatch.setattr("exporters.mlx.card.find_spec", lambda name: None)
    with pytest.raises(RuntimeMissingError) as caught:
        row.check_runtime()
    assert "--no-verify" in caught.value.hint and "packlight[mlx]" in caught.value.hint
    assert [check.ok for check in row.checks()] == [True]  # optional


def test_commands(tmp_path: Path) -> None:
    build = ("build", model_path(), "-r", "int4-fast", "-f", "mlx", "-o", "out")
    without = {"PACKLIGHT_MLX_PYTHON": "no-such-python"}
    refused = packlight(*build, cwd=tmp_path, env=without)
    assert refused.returncode == 2
    assert "error: PACKLIGHT_MLX_PYTHON is 'no-such-python'" in refused.stderr
    assert "hint: " in refused.stderr and not (tmp_path / "out").exists()  # before any work
    asked = packlight(*build, "--runtime-python", "no-such-python", cwd=tmp_path, env={})
    assert (asked.returncode, asked.stderr) == (2, refused.stderr)
    assert packlight(*build, "--no-verify", cwd=tmp_path, env=without).returncode == 0
    facts = json.loads(packlight("inspect", "out", "--json", cwd=tmp_path).stdout)
    assert (facts["format"], facts["metadata"]["quantization"]) == (
        "mlx",
        "4 bits, groups of 64, affine",
    )
    rows = json.loads(
        packlight("fit", "out", "--device", "iphone-15", "--json", cwd=tmp_path).stdout
    )
    assert rows["rows"][0]["artifact"] == "mlx" and rows["rows"][0]["verdict"] == "fits"
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'load("mlx")' in card.replace("'", '"') and "mlx-swift-lm" in card


def test_a_budget_spends_on_bits_and_groups(tmp_path: Path) -> None:
    build = ("build", model_path(), "-r", "int4-fast", "-f", "mlx", "--no-verify", "-o", "out")
    made = packlight(*build, "--budget", "3.0MB", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    folder = tmp_path / "out" / "mlx"
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 0.97 * 3e6 < size <= 3e6
    own = json.loads((folder / "config.json").read_text())["quantization"]
    kinds = {(row["bits"], row["group_size"]) for row in own.values() if isinstance(row, dict)}
    assert len(kinds) > 1


def test_shipped_recipes_build_it_only_when_asked() -> None:
    assert "mlx" not in load("int4-fast").targets
    chosen = load("small-4bit", formats=["mlx"]).targets
    assert list(chosen) == ["mlx"] and chosen["mlx"]["group_size"] == 128
    assert "mlx" in load(Recipe.from_dict({"schema": 1, "targets": {"mlx": {}}})).targets
