"""provenance.json against the specifications, and ``build --locked``."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import packlight, refused
from jsonschema import validate

from compress import api
from compress.checkpoint.checkpoint import Checkpoint
from compress.errors import CheckpointError, UsageError
from compress.output import lock as origin
from compress.output.checksums import check_folder
from compress.output.lock import check_lock, lock_document
from compress.plan.document import PlanDocument

SHA256 = "^[0-9a-f]{64}$"
SCALE_SEARCH = {
    "quantize.solver": "scale_search",
    "calibration.tokens": 256,
    "calibration.sequence_length": 64,
}
DESCRIPTOR = {
    "type": "object",
    "additionalProperties": False,
    "anyOf": [{"required": ["uri"]}, {"required": ["digest"]}, {"required": ["content"]}],
    "properties": {
        "name": {"type": "string"},
        "uri": {"type": "string", "pattern": "^[a-z0-9+.-]+:"},
        "digest": {"type": "object", "properties": {"sha256": {"pattern": SHA256}}},
    },
}
# https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
# https://slsa.dev/spec/v1.0/provenance#schema
STATEMENT = {
    "type": "object",
    "additionalProperties": False,
    "required": ["_type", "subject", "predicateType", "predicate"],
    "properties": {
        "_type": {"const": "https://in-toto.io/Statement/v1"},
        "predicateType": {"const": "https://slsa.dev/provenance/v1"},
        "subject": {
            "type": "array",
            "minItems": 1,
            "items": {**DESCRIPTOR, "required": ["name", "digest"]},
        },
        "predicate": {
            "type": "object",
            "additionalProperties": False,
            "required": ["buildDefinition", "runDetails"],
            "properties": {
                "buildDefinition": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["buildType", "externalParameters"],
                    "properties": {
                        "buildType": {"type": "string", "pattern": "^https://"},
                        "externalParameters": {"type": "object"},
                        "internalParameters": {"type": "object"},
                        "resolvedDependencies": {"type": "array", "items": DESCRIPTOR},
                    },
                },
                "runDetails": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["builder"],
                    "properties": {
                        "builder": {
                            "type": "object",
                            "additionalProperties": False,
                            "required": ["id"],
                            "properties": {
                                "id": {"type": "string", "pattern": "^https://"},
                                "version": {
                                    "type": "object",
                                    "additionalProperties": {"type": "string"},
                                },
                            },
                        },
                        "byproducts": {"type": "array", "items": DESCRIPTOR},
                    },
                },
            },
        },
    },
}


def build(model: Path, output: Path, *options: object) -> Any:
    return packlight(
        "build", model, "-r", "int4-fast", "-f", "gguf", "-f", "onnx", "--no-verify",
        "--threads", 1, "-o", output, *options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("llama", str(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="module")
def built(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("built") / "out"
    done = build(model, output)
    assert done.returncode == 0, done.stderr
    return output


def test_the_statement_is_what_in_toto_and_slsa_specify(model: Path, built: Path) -> None:
    text = (built / "provenance.json").read_text()
    found = json.loads(text)
    validate(found, STATEMENT)
    digest = {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in (built, model)
        for path in folder.rglob("*")
        if path.is_file()
    }
    below = [path for path in digest if path.is_relative_to(built) and path.parent != built]
    artifacts = {path.relative_to(built).as_posix() for path in below}
    subject = {entry["name"]: entry["digest"]["sha256"] for entry in found["subject"]}
    assert subject == {name: digest[built / name] for name in artifacts} and len(subject) > 2
    definition = found["predicate"]["buildDefinition"]
    needed = {e["name"]: e["digest"]["sha256"] for e in definition["resolvedDependencies"]
              if "digest" in e}  # fmt: skip
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= needed.keys()
    assert needed == {name: digest[model / name] for name in needed}
    uris = {e["uri"] for e in definition["resolvedDependencies"] if "uri" in e}
    assert any(uri.startswith("pkg:pypi/numpy@") for uri in uris)
    assert str(model.parent) not in text and str(built.parent) not in text
    check = check_folder(built)
    assert check.whole, check.lines()


def test_the_same_build_has_the_same_statement(model: Path, built: Path, tmp_path: Path) -> None:
    """Independent of the folder's name and of the time."""
    done = build(model, tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    for name in ("plan.json", "provenance.json"):
        assert (tmp_path / "elsewhere" / name).read_bytes() == (built / name).read_bytes(), name


def test_locked_gives_the_same_bytes_or_says_why_not(
    model: Path, built: Path, tmp_path: Path
) -> None:
    plan = ("--plan", built / "plan.json", "--locked")
    done = build(model, tmp_path / "again", *plan)
    assert done.returncode == 0, done.stderr
    for path in built.rglob("*"):
        if path.is_file() and path.parent != built:
            again = tmp_path / "again" / path.relative_to(built)
            assert again.read_bytes() == path.read_bytes(), path
    said = refused(build(model, tmp_path / "b", *plan, "--set", "targets.gguf.type=Q5_0"))
    assert "targets.gguf.type was " in said and "Q5_0" in said
    other = tmp_path / "model"
    shutil.copytree(model, other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (other / "model.safetensors").write_bytes(content)
    said = refused(build(other, tmp_path / "b", *plan, "--dry-run"))
    assert "checkpoint.files.model.safetensors was sha256" in said
    assert not (tmp_path / "b").exists()
    done = packlight("build", model, *plan, "--no-verify", "-o", tmp_path / "named")
    assert done.returncode == 0, done.stderr  # the recipe beside the plan
    assert (tmp_path / "named" / "recipe.yaml").read_bytes() == (built / "recipe.yaml").read_bytes()
    said = refused(packlight("build", model, "-r", "phone-4bit", *plan, "-o", tmp_path / "b"))
    assert "--locked: this would not be the build of plan.json" in said or "-f" in said
    said = refused(packlight("build", model, "--locked"))
    assert "--plan plan.json" in said
    said = refused(packlight("build", model, "--locked", "-o", tmp_path / "b"))
    assert "b/plan.json is not there" in said


def test_what_differs_is_told_old_and_new() -> None:
    lock = {"versions": {"numpy": "2.3.5", "gguf": "0.19.0"}, "inputs": {},
            "checkpoint": {"headers": "a" * 64, "files": {"a.safetensors": "b" * 64}}}  # fmt: skip
    row = {"name": "lm_head.weight", "target_name": "output.weight", "grid": "Q6_K",
           "shape": [32, 256], "bytes": 6720}  # fmt: skip
    target = {"type": "Q4_K_M", "settings": {}, "weights_bytes": 6720, "bits_per_weight": 6.5625,
              "notes": [], "tensors": [row]}  # fmt: skip
    plan = {"schema_version": 1, "tool": {"name": "packlight", "version": "0.1.0"},
            "model": {"source": "m", "revision": "", "family": "llama", "parameters": 8192},
            "quantize": {"solver": "rtn"}, "targets": {"gguf": target}, "lock": lock}  # fmt: skip
    before = PlanDocument.model_validate(plan)
    assert before.to_dict() == plan
    now = json.loads(json.dumps(plan))
    now["targets"]["gguf"]["notes"] = ["not of the bytes"]
    check_lock("plan.json", before, PlanDocument.model_validate(now))
    now["lock"]["versions"] = {"numpy": "2.4.0", "torch": "2.13.0"}
    now["targets"]["gguf"]["tensors"][0]["grid"] = "Q8_0"
    with pytest.raises(UsageError) as caught:
        check_lock("plan.json", before, PlanDocument.model_validate(now))
    for part in (
        "versions.numpy was 2.3.5, is 2.4.0",
        "versions.gguf was 0.19.0, is not there",
        "versions.torch was not there, is 2.13.0",
        "targets.gguf.tensors.lm_head.weight was Q6_K, is Q8_0",
    ):
        assert part in str(caught.value)
    now["model"]["source"] = "n"
    with pytest.raises(UsageError, match="and 1 more"):
        check_lock("plan.json", before, PlanDocument.model_validate(now))
    now["lock"]["checkpoint"]["files"] = None
    unknown = PlanDocument.model_validate(now)
    with pytest.raises(UsageError) as caught:
        check_lock("plan.json", unknown, unknown)
    assert "--provenance" in caught.value.hint


def test_large_files_are_hashed_on_demand_and_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "model"
    shutil.copytree(model, place)
    checkpoint = Checkpoint.open(str(place))
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    assert lock_document(checkpoint, [], thorough=False, small=1000).checkpoint.files is None
    real = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in place.iterdir()}
    found = lock_document(checkpoint, [], thorough=True, small=1000).checkpoint.files
    assert found == {name: real[name] for name in found} and "model.safetensors" in found
    monkeypatch.setattr(origin, "sha256_of", lambda path: pytest.fail(f"hashed {path} again"))
    large = [path for path in place.iterdir() if path.stat().st_size > 1000]
    assert {path.name: origin.cached_digest(path) for path in large} == {
        path.name: real[path.name] for path in large
    }
    monkeypatch.undo()
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    shard = place / "model.safetensors"
    shard.write_bytes(b"x" * 2000)
    assert origin.cached_digest(shard) == hashlib.sha256(b"x" * 2000).hexdigest()


def test_the_hubs_cache_knows_the_hashes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of huggingface_hub's cache: snapshots/<commit>/NAME → ../../blobs/<etag>."""
    snapshot, blobs = tmp_path / "snapshots" / ("c" * 40), tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in model.iterdir():
        large = path.name == "model.safetensors"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        blob = blobs / (digest if large else digest[:40])
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    hashed: list[str] = []
    monkeypatch.setattr(origin, "sha256_of", lambda path: hashed.append(path.name) or "0" * 64)
    checkpoint = Checkpoint(snapshot, "acme/tiny", "c" * 40)
    files = lock_document(checkpoint, [], thorough=False, small=10**6).checkpoint.files
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert files["model.safetensors"] == weights and weights not in hashed
    assert len(hashed) == len(files) - 1


def test_names_of_a_local_folders_blobs_prove_nothing(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "snapshots" / ("c" * 40)
    shutil.copytree(model, copy)
    (tmp_path / "blobs").mkdir()
    blob = (copy / "model.safetensors").rename(tmp_path / "blobs" / ("0" * 64))
    (copy / "model.safetensors").symlink_to(blob)
    files = lock_document(Checkpoint.open(copy), [], thorough=False).checkpoint.files
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert files and files["model.safetensors"] == digest


def test_files_of_one_name_in_two_folders_are_both_vouched_for(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    names = list(Checkpoint.open(copy).tensors)
    for folder in "ab":
        (copy / folder).mkdir()
        shutil.copy(copy / "model.safetensors", copy / folder / "x.safetensors")
    (copy / "model.safetensors").unlink()
    half = len(names) // 2
    places = dict.fromkeys(names[:half], "a/x.safetensors")
    places |= dict.fromkeys(names[half:], "b/x.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    files = lock_document(Checkpoint.open(copy), [], thorough=False).checkpoint.files
    assert files and {"a/x.safetensors", "b/x.safetensors"} <= files.keys()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "text.txt"])
def test_nothing_is_vouched_for_that_changed_meanwhile(
    model: Path, tmp_path: Path, name: str
) -> None:
    changing, text = tmp_path / "changing", tmp_path / "text.txt"
    shutil.copytree(model, changing)
    text.write_text(tiny.TEXT * 20, encoding="utf-8")
    file = text if name == text.name else changing / name
    replaced: list[str] = []

    def replace(phase: str, done: int, total: int, unit: str) -> None:
        if phase.startswith("write ") and not replaced:
            replaced.append(phase)
            shutil.copy(file, tmp_path / "other")
            (tmp_path / "other").rename(file)  # the same bytes, of another file

    more: dict[str, Any] = {}
    if file == text:
        more = {"calibration": [text], "overrides": SCALE_SEARCH}
    with pytest.raises(CheckpointError, match=f"^{name} has changed since it was opened"):
        api.build(
            changing, "int4-fast", formats=["gguf"], output=tmp_path / "out", verify=False,
            progress=replace, **more,
        )  # fmt: skip
    assert replaced
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
