"""Builds of a model with an adapter: the same files as of PEFT's merged checkpoint, and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft_adapters
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import packlight
from compress import __main__ as cli

FAST = {
    "verify.windows": 2,
    "verify.sequence_length": 32,
    "verify.gates": {},
    "calibration.tokens": 512,
    "calibration.sequence_length": 64,
}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tied model, an adapter with a head of its own, and what PEFT makes of the two."""
    place = tmp_path_factory.mktemp("trained")
    base = tiny.make("qwen2", place / "base" / "tiny", dtype="float32")
    targets = {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    adapter = peft_adapters.make(base, place / "my-lora", **targets)
    merged = peft_adapters.save(
        peft_adapters.merged(base, adapter), base, place / "merged" / "tiny"
    )
    return base, adapter, merged


def model_files(folder: Path) -> dict[str, bytes]:
    """Of the targets' folders, but for ``config.json``, whose ``raw`` keys are the library's."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for name in ("gguf", "onnx", "coreml")
        for path in sorted((folder / name).rglob("*"))
        if path.is_file() and path.name not in ("config.json", "generation_config.json")
    }


def test_files_are_those_of_the_merged_checkpoint(trained, tmp_path):
    base, adapter, merged = trained
    packlight.build(base, "int4-fast", adapters=adapter, output=tmp_path / "ours", verify=False)
    packlight.build(merged, "int4-fast", output=tmp_path / "theirs", verify=False)
    packlight.build(base, "int4-fast", output=tmp_path / "plain", verify=False, formats=["gguf"])
    ours, theirs = model_files(tmp_path / "ours"), model_files(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and len(ours) > 8
    assert [name for name in ours if ours[name] != theirs[name]] == []
    plain = model_files(tmp_path / "plain")
    assert all(ours[name] != plain[name] for name in plain)
    config = json.loads((tmp_path / "ours" / "onnx" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_calibration_and_baseline_see_the_merged_model(trained, tmp_path, monkeypatch):
    base, adapter, merged = trained
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))

    def build(model, name, **more):
        return packlight.build(
            model, "phone-4bit", formats=["gguf"], overrides=FAST, output=tmp_path / name, **more
        )

    plain = build(base, "plain")  # caches its statistics and baseline
    ours = build(base, "ours", adapters=[adapter])
    theirs = build(merged, "theirs")
    assert model_files(tmp_path / "ours") == model_files(tmp_path / "theirs")
    assert ours.baseline.perplexity == theirs.baseline.perplexity != plain.baseline.perplexity
    verified = packlight.verify(
        tmp_path / "theirs", base, adapters=adapter, windows=2, sequence_length=32
    )
    assert verified["gguf"].kl_divergence.mean == pytest.approx(ours["gguf"].kl_divergence.mean)


def test_everything_names_the_adapter_by_its_hash(trained, tmp_path, capsys):
    base, adapter, _ = trained
    mine, out = shutil.copytree(adapter, tmp_path / "my-lora"), tmp_path / "out"
    report = packlight.build(
        base, "int4-fast", formats=["gguf"], adapters=mine, output=out, verify=False
    )
    (named,) = report.model.adapters
    assert (named.source, named.weight, len(named.sha256)) == ("my-lora", 1.0, 64)
    assert "--adapter my-lora" in report.tool.command
    for page in ("README.md", "report.html", "report.json"):
        assert named.sha256 in (out / page).read_text(), page
    plan = json.loads((out / "plan.json").read_text())
    assert plan["model"]["adapters"] == ["my-lora"]
    assert plan["lock"]["adapters"]["my-lora"][WEIGHTS] == named.sha256
    assert "my-lora" not in "".join(plan["lock"]["checkpoint"]["files"])
    stated = json.loads((out / "provenance.json").read_text())["predicate"]["buildDefinition"]
    assert stated["externalParameters"]["adapters"] == ["my-lora"]
    found = {row["name"]: row.get("digest") for row in stated["resolvedDependencies"]}
    assert found[f"my-lora/{WEIGHTS}"] == {"sha256": named.sha256}

    again = ["build", str(base), "-r", "int4-fast", "-f", "gguf", "--adapter", str(mine)]
    again += ["--no-verify", "--plan", str(out / "plan.json"), "--locked"]
    assert cli.main([*again, "-o", str(tmp_path / "again")]) == 0
    assert model_files(tmp_path / "again") == model_files(out)
    tensors = load_file(mine / WEIGHTS)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, mine / WEIGHTS)
    capsys.readouterr()
    assert cli.main([*again, "-o", str(tmp_path / "refused")]) == 2
    assert f"adapters.my-lora.{WEIGHTS} was sha256 {named.sha256[:12]}" in capsys.readouterr().err


def test_a_build_without_adapters_says_nothing_of_them(trained, tmp_path):
    report = packlight.build(
        trained[0], "int4-fast", formats=["gguf"], output=tmp_path / "out", verify=False
    )
    assert "adapter" not in json.dumps(report.to_dict())
    assert "adapter" not in (tmp_path / "out" / "plan.json").read_text()


def test_sizes_are_those_of_the_untied_model(trained, tmp_path, monkeypatch, capsys):
    base, adapter, _ = trained
    plans = [
        packlight.plan(base, "int4-fast", formats=["gguf"], adapters=chosen)["gguf"]
        for chosen in ((), adapter)
    ]
    assert plans[0].weights_bytes < plans[1].weights_bytes
    rows = [
        packlight.fit(base, "iphone-14", recipe="int4-fast", formats=["gguf"], adapters=chosen)[0]
        for chosen in ((), adapter)
    ]
    assert [row["weights_bytes"] for row in rows] == [plan.weights_bytes for plan in plans]
    monkeypatch.chdir(tmp_path)
    second = peft_adapters.make(base, tmp_path / "second", target_modules=["v_proj"])
    words = ["build", str(base), "-r", "int4-fast", "-f", "gguf", "--no-verify", "--dry-run"]
    assert cli.main([*words, "--adapter", str(adapter), "--adapter", f"{second}=0.5"]) == 0
    printed = capsys.readouterr().out
    assert "merged with the adapter my-lora\nmerged with the adapter second=0.5\n" in printed


def test_default_folders_tell_adapters_apart(trained, tmp_path, monkeypatch):
    base, adapter, _ = trained
    monkeypatch.chdir(tmp_path)
    packlight.build(base, "int4-fast", formats=["gguf"], adapters=adapter, verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-my-lora-int4-fast"]


def test_an_artifact_has_no_adapters(trained, tmp_path):
    packlight.build(
        trained[0], "int4-fast", formats=["gguf"], output=tmp_path / "out", verify=False
    )
    with pytest.raises(packlight.PacklightError, match="this is an artifact"):
        packlight.fit(tmp_path / "out", "iphone-14", adapters=trained[1])
