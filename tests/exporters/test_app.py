"""What lies beside a Core ML package for an app, and what Xcode shows of the package."""

from __future__ import annotations

import json
import plistlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pytest
import tiny
import yaml
from exported import Exports

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.checkpoint.hub import check_hub_id
from compress.demo import model_path
from compress.errors import UsageError
from compress.plan.job import Job
from compress.recipe import load
from compress.report.report import Report
from compress.verify.parity import vectors
from exporters import app
from exporters.app import read_shown
from exporters.coreml.app import write_app_files
from exporters.coreml.mil import read_package
from exporters.coreml.runtime import open_runtime
from exporters.coreml.writer import add_metadata

SOURCE = Path(app.__file__).with_name("swift")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """``coreml/`` of the demo, verified and not."""
    found = {}
    for verified in (True, False):
        out = tmp_path_factory.mktemp("app") / "out"
        words = ["build", str(model_path()), "-r", "int4-fast", "-f", "coreml", "-o", str(out)]
        words += ["--hub-id", "packlight/demo"]
        words += ["--set", "verify.windows=2"] if verified else ["--no-verify"]
        done = commands.packlight(*words)
        assert done.returncode == 0, done.stderr
        found[verified] = out / "coreml"
    return found


def read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return found


def test_model_json_describes_the_package(outputs: dict[bool, Path]) -> None:
    folder = outputs[False]
    model = read(folder, "model.json")
    package = folder / model["package"]
    function = read_package(package).function("main")
    for key in ("inputs", "states", "outputs"):
        written = getattr(function, key)
        assert [each["name"] for each in model[key]] == list(written)
        for each in model[key]:
            sizes = [size if isinstance(size, int) else None for size in each["shape"]]
            assert sizes == list(written[each["name"]].shape)
    assert model["context"] == function.states["keyCache"].shape[3] == 512
    assert model["bytes"] == sum(f.stat().st_size for f in package.rglob("*") if f.is_file())
    assert model["memory"]["weights_bytes"] < model["bytes"]
    assert (model["hub_id"], model["license"]) == ("packlight/demo", "apache-2.0")
    config = read(folder, "generation_config.json")
    assert model["stop_ids"] == config["eos_token_id"]
    assert model["chat_template"] == read(folder, "tokenizer_config.json")["chat_template"]


def test_license_and_swift_are_copied(outputs: dict[bool, Path]) -> None:
    name = "LICENSE-PYTHON.txt"
    assert (outputs[False] / name).read_bytes() == (model_path() / name).read_bytes()
    copies = outputs[False] / "Swift"
    files = {path.relative_to(SOURCE) for path in SOURCE.rglob("*") if path.is_file()}
    assert {p.relative_to(copies) for p in copies.rglob("*") if p.is_file()} == files
    assert len(files) > 8


@pytest.mark.parametrize(("weights", "rights"), [(10**9, 1), (5 * 10**9, 2)])
def test_more_than_four_gigabytes_need_a_larger_address_space(
    exported: Exports, tmp_path: Path, weights: int, rights: int
) -> None:
    built = exported("coreml", "llama3", grid="int4-g32")
    entry = replace(built.plan.entries[0], nbytes=weights)
    plan = replace(built.plan, entries=(entry,))
    artifact = replace(built.artifact, path=tmp_path / "x.mlpackage", plan=plan)
    source = Stored(built.checkpoint, built.config)
    job = Job(source, built.config, load("int4-fast"), (plan,), 64)
    write_app_files(artifact, job, None)
    (file,) = tmp_path.glob("*.entitlements")
    found = plistlib.loads(file.read_bytes())
    names = [app.MEMORY, app.ADDRESS_SPACE][:rights]
    assert found == dict.fromkeys(names, True)
    assert read(tmp_path, "model.json")["entitlements"] == names


def test_texts_have_the_ids_of_transformers(outputs: dict[bool, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_path()))
    texts = read(outputs[False], "parity.json")["texts"]
    assert len(texts) == 20
    for pair in texts:
        assert tokenizer(pair["text"])["input_ids"] == pair["ids"]


def test_an_artifact_that_was_not_run_has_no_logits_and_says_why(outputs: dict[bool, Path]) -> None:
    found = read(outputs[False], "parity.json")
    assert found["logits"] is None and "--no-verify" in found["why_no_logits"]


def test_logits_are_those_of_the_package(outputs: dict[bool, Path]) -> None:
    found = read(outputs[True], "parity.json")["logits"]
    assert len(found["ids"]) == len(found["values"]) == len(found["top_1"]) == 32
    runtime = open_runtime(outputs[True] / "model.mlpackage", context=64)
    rows = [*runtime.extend(found["ids"][: found["prefill"]])]
    rows += [runtime.feed([token]) for token in found["ids"][found["prefill"] :]]
    runtime.close()
    tolerance = found["tolerance"]["absolute"]
    for row, ids, values, top, margin in zip(
        rows, *(found[key] for key in ("token_ids", "values", "top_1", "margins")), strict=True
    ):
        assert len(set(ids)) == 32
        assert np.abs(row[ids] - values).max() < tolerance / 4
        assert top == row.argmax() or margin < tolerance / 4


def test_parity_vectors_name_the_largest_logits_first() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(40, 300)).astype(np.float32)
    found = vectors("runtime", range(40), logits)
    assert found is not None
    for row, ids, values, margin in zip(
        logits[:32], found["token_ids"], found["values"], found["margins"], strict=True
    ):
        order = np.argsort(-row)
        assert ids[:16] == order[:16].tolist()
        assert len(set(ids)) == 32
        assert np.allclose(row[ids], values, atol=1e-4)
        assert margin == pytest.approx(row[order[0]] - row[order[1]], abs=1e-4)
    assert found["ids"] == list(range(32)) and found["prefill"] == 16
    logits[3, 5] = np.nan
    assert vectors("runtime", range(40), logits) is None


def test_the_report_says_which_devices_it_fits_on(outputs: dict[bool, Path]) -> None:
    out = outputs[False].parent
    report = Report.load(out / "report.json")
    (artifact,) = report.artifacts
    words = ("fit", model_path(), "-r", "int4-fast", "-f", "coreml", "--json")
    rows = json.loads(commands.packlight(*words).stdout)["rows"]
    assert [device.name for device in artifact.devices] == [row["device"] for row in rows]
    for device, row in zip(artifact.devices, rows, strict=True):
        assert device.verdict == row["verdict"] == "fits"
        assert device.largest_context == row["largest_context"]
        assert device.entitled_bytes == row["limit_bytes"]
        assert device.tokens_per_second == row["tokens_per_second_realistic"]
        assert artifact.activation_bytes == row["activation_bytes"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Memory that Core ML int4-g32 needs" in page and "iPhone Duo" in page
    assert f"{len(rows)} devices" in page


# --- metadata ---------------------------------------------------------------------------------


CARDS: list[tuple[dict[str, Any], tuple[str, str, str]]] = [
    ({}, ("org", "", "")),
    ({"license": "mit"}, ("org", "mit", "")),
    (
        {"license": "other", "license_name": "gemma", "license_link": "https://x.y/terms"},
        ("org", "gemma (https://x.y/terms)", ""),
    ),
    (
        {"authors": ["A", "B"], "description": "A model.", "license": ["a", "b"]},
        ("A, B", "a, b", "A model."),
    ),
    ({"author": {"name": "x"}, "license": 5, "description": "two\nlines"}, ("org", "", "")),
    ({"author": "x" * 900}, ("x" * 500, "", "")),
]


@pytest.mark.parametrize(("card", "shown"), CARDS)
def test_xcode_shows_what_the_card_says(
    tmp_path: Path, card: dict[str, Any], shown: tuple[str, str, str]
) -> None:
    tiny.make("llama", tmp_path)
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n", encoding="utf-8")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.hub_id == ""
    checkpoint.hub_id = "org/name"
    found = read_shown(checkpoint)
    assert (found.author, found.license, found.description) == shown


def test_only_a_hub_id_is_the_name_that_swift_transformers_looks_up(exported: Exports) -> None:
    import coremltools

    built = exported("coreml", "llama3", grid="int4-g32")
    key, hub = "co.huggingface.exporters.name", Checkpoint(built.checkpoint.path, "org/x", "abc")
    url = Checkpoint(built.checkpoint.path, "https://x.org/m")
    assert (url.hub_id, hub.hub_id) == ("", "org/x")
    spec = coremltools.models.MLModel(str(built.artifact.path), skip_model_load=True).get_spec()
    assert key not in spec.description.metadata.userDefined
    add_metadata(spec, built.plan, Stored(hub, built.config))
    metadata = spec.description.metadata
    assert (metadata.userDefined[key], metadata.author) == ("org/x", "org")


@pytest.mark.parametrize("name", ["model", "a/b/c", "a b/c", "../x", "/x", "é/x"])
def test_other_hub_ids_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="not the name of a model on the Hub"):
        check_hub_id(name)


def test_a_hub_id_without_a_format_for_apps_has_no_effect() -> None:
    words = ["build", str(model_path()), "-r", "int4-fast", "-f", "gguf", "--hub-id", "a/b"]
    done = commands.packlight(*words, "--dry-run")
    assert done.returncode == 0 and "--hub-id has no effect" in done.stderr
    assert commands.packlight(*words[:-1], "ab", "--dry-run").returncode == 2
