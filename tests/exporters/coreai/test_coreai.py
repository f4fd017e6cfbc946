"""The Core AI program of every family, run as its float32 twin in Apple's CPU runtime, against the
reference decoder on the same constants.

Constants are float16 in both, so that only the order of sums differs: 1e-4 on logits of standard
deviation 2 (measured: 3e-5).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from commands import packlight
from exported import CONTEXT, Exported, Exports, decoded, reference

from compress.demo import model_path
from compress.errors import ArtifactError, GridError, UnsupportedModelError, UsageError
from compress.formats import get_format
from compress.plan.shapes import PlanRequest
from exporters.coreai import runtime as runtime_module
from exporters.coreai.bytecode import Reader, read_blobs
from exporters.coreai.inspection import Bundle, describe
from exporters.coreai.library import CoreAI, Loaded
from exporters.coreai.runtime import open_runtime
from exporters.coreai.twin import WEIGHTS, split, widen

pytest.importorskip("coreai.authoring", reason="needs the extra packlight[coreai]")

ROOT = Path(__file__).resolve().parents[3]
# Every family, on a grid of each kind in turn.
CASES = [
    (family, ("int4-g32", "lut4-g8", "int8-channel-asym")[i % 3], {})
    for i, family in enumerate(tiny.FAMILIES)
] + [("mobilellm", "lut6-g16", {"layer_sharing": True})]
TOKENS = np.random.default_rng(5).integers(3, 480, CONTEXT).tolist()


@pytest.mark.parametrize(("family", "grid", "overrides"), CASES)
def test_logits_of_every_family(
    exported: Exports, family: str, grid: str, overrides: dict[str, Any]
) -> None:
    made = exported("coreai", family, overrides, grid=grid)
    runtime = open_runtime(made.path, context=CONTEXT, slots=16)
    expected = reference(made, half_ropes=True).logits(TOKENS)
    found = runtime.logits(TOKENS)
    assert found.shape == (CONTEXT, 512) and found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-4
    runtime.reset()  # through caches that grow from 16 slots to 64
    pieces = [runtime.extend(TOKENS[:13])]
    pieces += [runtime.extend([token]) for token in TOKENS[13:20]]
    pieces.append(runtime.extend(TOKENS[20:]))
    assert np.abs(np.concatenate(pieces) - found).max() < 2e-5
    runtime.close()


def sums(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def test_two_processes_write_the_same_bytes(exported: Exports, tmp_path: Path) -> None:
    made = exported("coreai", "phi3", grid="int4-g32")
    script = (
        "import sys; sys.path[:0] = sys.argv[3:]; import exporters; from pathlib import Path\n"
        "from exported import Exports\n"
        "Exports(Path(sys.argv[2])).write('coreai', Path(sys.argv[1]), {'grid': 'int4-g32'},"
        " name='phi3', folder=Path(sys.argv[2]))"
    )
    paths = [str(ROOT), str(ROOT / "tests")]
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        command = [sys.executable, "-c", script, str(made.checkpoint.path), str(folder), *paths]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        assert sums(folder) == sums(made.path)


def section_alignments(program: Path) -> set[int]:
    """Alignments that the sections of a program ask for."""
    reader = Reader(np.frombuffer(program.read_bytes(), np.uint8))
    reader.take(4)
    reader.number()
    reader.text()
    found = set()
    while reader.at < len(reader.data):
        kind, length = int(reader.take(1)[0]), reader.number()
        if kind & 0x80:
            found.add(alignment := reader.number())
            reader.take(-reader.at % alignment)
        reader.take(length)
    assert found
    return found


def test_the_bundle_is_what_apples_runner_reads(exported: Exports) -> None:
    made = exported("coreai", "llama3", grid="int4-g32")
    metadata = json.loads((made.path / "metadata.json").read_text())
    assert (metadata["metadata_version"], metadata["kind"]) == ("0.2", "llm")
    assert metadata["assets"] == {"main": "llama3.aimodel"}
    language = metadata["language"]
    assert language["vocab_size"] == 512 and language["max_context_length"] == CONTEXT
    assert language["embedded_tokenizer"] and language["function_map"] == {"main": ["main"]}
    assert (made.path / "tokenizer" / "tokenizer.json").is_file()
    program = made.path / "llama3.aimodel" / "main.mlirb"
    digest = hashlib.sha256(program.read_bytes()).digest()
    assert program.with_name("main.hash").read_bytes() == digest

    from coreai.authoring import AIModelAsset

    assert AIModelAsset.is_valid(program.parent)
    summary = AIModelAsset.load(program.parent).summary()
    assert summary is not None and list(summary.function_names) == ["main"]
    names = [name for name, _ in summary.function_inputs("main")]
    assert names == ["input_ids", "position_ids"]
    assert [name for name, _ in summary.function_states("main")] == ["keyCache", "valueCache"]
    assert [name for name, _ in summary.function_outputs("main")] == ["logits"]
    # Larger files are read to memory that is not aligned to more.
    assert section_alignments(program) <= {1, 2, 4, 8, 16}


# --- constants ------------------------------------------------------------------------------------

# Every kind of stored tensor in one model of fourteen linears, embedding and head.
MIXED = (
    *("int4-g32", "int4-g16-asym", "int4-channel", "int4-channel-asym"),
    *("int8-g64", "int8-g32-asym", "int8-channel", "F16"),
    *("lut1-g8", "lut2-g16", "lut3-g32", "lut4-g8", "lut6-g16", "lut8-g32"),
    *("int2-g16", "int2-channel-asym"),
)


@pytest.fixture(scope="module")
def mixture(exported: Exports) -> Exported:
    """A bundle with every kind of grid."""
    make = {"tie_word_embeddings": False}
    config = exported.config("qwen2", **make)
    plan = get_format("coreai").plan(config, PlanRequest({"context": CONTEXT}))
    names = [e.name for e in plan.entries if len(e.shape) == 2 and not e.name.startswith("rope")]
    choices = dict(zip(names, MIXED, strict=True))
    source = exported.checkpoint("qwen2", **make)
    return exported.write("coreai", source, {}, choices=choices)


def test_apples_runtime_decodes_every_grid_as_it_does(mixture: Exported, tmp_path: Path) -> None:
    """Bit for bit: codes times scales in float32, or entries of tables."""
    bundle, library = Bundle.open(mixture.path), CoreAI()
    blobs = read_blobs(bundle.program)
    with library.context():
        module = library.read(bundle.program)
        widen(library, module, blobs)
        split(library, module)
        library.lower(module, tmp_path)
    program = Loaded(tmp_path)
    found = {name: out.numpy().copy() for name, out in program.run(WEIGHTS, {}, {}).items()}
    program.close()
    expected = decoded(mixture)
    grids = {entry.name: entry.grid for entry in mixture.plan.entries}
    compressed = [expected[name] for name, grid in grids.items() if grid[0] in "il"]
    assert len(found) == len(compressed) == len(MIXED) - 1
    for weight in found.values():
        same = [one for one in compressed if one.shape == weight.shape]
        assert any(np.array_equal(one, weight) for one in same)


def test_a_mixture_of_grids_runs_and_is_described(mixture: Exported) -> None:
    facts = describe(mixture.path)
    assert facts["type"] == mixture.plan.type_name
    described = {row["name"]: (row["grid"], row["bytes"]) for row in facts["tensors"]}
    assert described == {e.target_name: (e.grid, e.nbytes) for e in mixture.plan.entries}
    assert facts["parameters"] == mixture.config.num_parameters
    runtime = open_runtime(mixture.path, context=CONTEXT)
    expected = reference(mixture, half_ropes=True).logits(TOKENS)
    assert np.abs(runtime.logits(TOKENS) - expected).max() < 1e-4
    runtime.close()


def test_weights_that_are_decoded_in_each_call_give_the_same(
    exported: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported("coreai", "llama3", grid="int4-g32")
    found = []
    for keep in (0, 1 << 28):
        monkeypatch.setattr(runtime_module, "KEEP", keep)
        runtime = open_runtime(made.path, context=CONTEXT)
        found.append(runtime.logits(TOKENS))
        runtime.close()
    assert np.array_equal(*found)


@pytest.mark.parametrize(
    ("sparsity", "grid"),
    [("2of4", "lut4-g8"), (0.5, "F16"), (0.5, "int8-g64")],
)
@pytest.mark.parametrize("keep", [0, 1 << 28])
def test_zeros_take_no_bytes(
    exported: Exports, monkeypatch: pytest.MonkeyPatch, sparsity: Any, grid: str, keep: int
) -> None:
    made = exported("coreai", "llama3", grid=grid, sparsity=sparsity)
    pattern = "2of4-" if sparsity == "2of4" else "s50-"
    sparse = [entry for entry in made.plan.entries if entry.grid.startswith(pattern)]
    assert len(sparse) == 7 * made.config.num_hidden_layers
    blobs = {blob.name: blob.raw.size for blob in read_blobs(Bundle.open(made.path).program)}
    for entry in sparse:
        rows, columns = entry.shape
        bits = 16 if grid == "F16" else int(grid.removeprefix("int").removeprefix("lut")[0])
        name = "values" if grid == "F16" else "codes"
        assert blobs[f"{entry.target_name}_{name}"] == rows * columns * bits // 16
        assert blobs[f"{entry.target_name}_mask"] == rows * columns // 8
    monkeypatch.setattr(runtime_module, "KEEP", keep)
    runtime = open_runtime(made.path, context=CONTEXT)
    expected = reference(made, half_ropes=True).logits(TOKENS)
    assert np.abs(runtime.logits(TOKENS) - expected).max() < 1e-4
    runtime.close()


@pytest.mark.parametrize("grid", ["int4-g32", "int8-g32-asym"])
def test_no_masks_over_signed_nibbles(exported: Exports, grid: str) -> None:
    plan = get_format("coreai").plan
    with pytest.raises(GridError, match="no masks of zeros over") as caught:
        plan(exported.config("llama3"), PlanRequest({"grid": grid, "sparsity": "2of4"}))
    assert "lut4-g8" in caught.value.hint


# --- the runtime and damaged files ----------------------------------------------------------------


def test_the_runtime_says_what_it_is_and_refuses(exported: Exports, tmp_path: Path) -> None:
    made = exported("coreai", "llama3", grid="int4-g32")
    with pytest.raises(UsageError, match="64 positions, 65 are asked for"):
        open_runtime(made.path, context=65)
    with pytest.raises(ArtifactError, match="not a Core AI bundle"):
        open_runtime(tmp_path, context=8)
    runtime = open_runtime(made.path, context=CONTEXT, batch=7)
    assert runtime.name == "Core AI 1.0.0b3, float32 twin in Apple's CPU runtime"
    assert runtime.vocab_size == 512
    whole = runtime.logits(TOKENS)
    runtime.rewind(40)
    assert np.array_equal(runtime.extend(TOKENS[40:]), whole[40:])
    runtime.reset()
    runtime.feed(TOKENS[:60])
    with pytest.raises(UsageError, match="65 tokens do not fit: the runtime has room for 64"):
        runtime.feed(TOKENS[:5])
    with pytest.raises(UsageError, match="at least one token"):
        runtime.logits([])
    runtime.close()
    runtime.close()
    with pytest.raises(UsageError, match="closed"):
        runtime.logits(TOKENS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "ends too early"),
        (lambda data: b"ML\xefS" + data[4:], "not MLIR bytecode"),
        (lambda data: b"", "no program"),
    ],
)
def test_damaged_programs_are_refused(
    exported: Exports, tmp_path: Path, damage: Any, message: str
) -> None:
    made = exported("coreai", "llama3", grid="int4-g32")
    bundle = tmp_path / "bundle"
    shutil.copytree(made.path, bundle)
    program = bundle / "llama3.aimodel" / "main.mlirb"
    program.write_bytes(damage(program.read_bytes()))
    with pytest.raises(ArtifactError, match=message):
        get_format("coreai").inspect(bundle)


def test_refusals_of_a_plan(exported: Exports) -> None:
    config = exported.config("llama3")
    plan = get_format("coreai").plan
    for settings, kind, message in (
        ({"grid": "Q4_K"}, GridError, "not a grid that Core AI stores"),
        ({"deployment": "iOS18"}, UnsupportedModelError, "deployment 'iOS18' is not"),
        ({"context": 4096}, UsageError, "between 2 and the 2048 positions"),
    ):
        with pytest.raises(kind, match=message):
            plan(config, PlanRequest(settings))


def test_equal_arrays_are_stored_once(tmp_path: Path, exported: Exports) -> None:
    from safetensors.numpy import load_file, save_file

    path = tiny.make("llama", tmp_path, dtype="float16")
    weights = load_file(path / "model.safetensors")
    norms = [name for name in weights if "layernorm" in name]
    ones = {name: np.ones_like(weights[name]) for name in norms}
    save_file(weights | ones, path / "model.safetensors", metadata={"format": "pt"})
    made = exported.write("coreai", path, {"grid": "int4-g32"})
    assert len(describe(made.path)["tensors"]) == len(made.plan.entries)
    runtime = open_runtime(made.path, context=CONTEXT)
    expected = reference(made, half_ropes=True).logits(TOKENS)
    assert np.abs(runtime.logits(TOKENS) - expected).max() < 1e-4
    runtime.close()


def test_the_largest_values_are_those_of_the_residual_stream(
    exported: Exports, tmp_path: Path
) -> None:
    made = exported("coreai", "llama3", grid="int4-g32")
    runtime = open_runtime(made.path, context=CONTEXT)
    runtime.logits(TOKENS)
    states = list(reference(made, half_ropes=True).walk([TOKENS]))
    found = runtime.magnitudes["add after block_0_down_proj_weight"]
    assert found == pytest.approx(float(states[1][0].abs().max()), rel=1e-4)
    assert "; float16 holds 65,504." in runtime.remarks[0]
    runtime.close()

    from safetensors.numpy import load_file, save_file

    path = tiny.make("llama", tmp_path, dtype="float16")
    weights = load_file(path / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 20000
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    loud = exported.write("coreai", path, {"grid": "int8-channel"})
    runtime = open_runtime(loud.path, context=CONTEXT)
    runtime.logits(TOKENS)
    (said,) = runtime.remarks
    assert "block_1_down_proj_weight), beyond float16's 65,504" in said
    runtime.close()


# --- an app -------------------------------------------------------------------------------------


def check_app_files(folder: Path) -> None:
    """The files beside a verified bundle of the demo."""
    model, parity = (json.loads((folder / f"{n}.json").read_text()) for n in ("model", "parity"))
    assert (model["format"], model["hub_id"], model["license"]) == ("coreai", "a/b", "apache-2.0")
    assert model["deployment"] == {"iOS": "27.0", "macOS": "27.0"}
    assert model["context"] == 512 == Bundle.open(folder).context

    from coreai.authoring import AIModelAsset

    summary = AIModelAsset.load(folder / model["package"]).summary()
    assert summary is not None
    for kind in ("inputs", "states", "outputs"):
        names = [name for name, _ in getattr(summary, f"function_{kind}")("main")]
        assert [each["name"] for each in model[kind]] == names
    assert (folder / "model.entitlements").is_file()
    assert (folder / "LICENSE-PYTHON.txt").is_file()
    assert (folder / "Swift" / "CoreAI" / "Package.swift").is_file()
    config = json.loads((folder / "tokenizer" / "generation_config.json").read_text())
    assert model["stop_ids"] == config["eos_token_id"]
    assert len(parity["texts"]) == 20
    found = parity["logits"]
    runtime = open_runtime(folder, context=64)
    rows = runtime.logits(found["ids"])
    runtime.close()
    for row, ids, values in zip(rows, found["token_ids"], found["values"], strict=True):
        assert np.abs(row[ids] - values).max() < found["tolerance"]["absolute"] / 4
    details = json.loads((folder / model["package"] / "metadata.json").read_text())
    assert (details["author"], details["license"]) == ("a", "apache-2.0")
    assert json.loads((folder / "metadata.json").read_text())["source"]["hf_model_id"] == "a/b"


def test_apples_runner_finds_every_stop_token(exported: Exports, tmp_path: Path) -> None:
    """It stops at eos_token and at all of additional_special_tokens, and at nothing else."""
    from transformers import AutoTokenizer

    path = tmp_path / "model"
    shutil.copytree(exported.checkpoint("demo"), path)
    tokenizer = AutoTokenizer.from_pretrained(str(path))
    eos = tokenizer.eos_token_id
    ordinary = next(i for i in range(300, 400) if i not in tokenizer.all_special_ids)
    generation = {"eos_token_id": [eos, ordinary]}
    (path / "generation_config.json").write_text(json.dumps(generation))
    made = exported.write("coreai", path, {"grid": "int4-g32"})
    settings = json.loads((made.path / "tokenizer" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == tokenizer.eos_token
    stops = settings["additional_special_tokens"]
    assert stops == [tokenizer.convert_ids_to_tokens(ordinary)]


# --- commands -------------------------------------------------------------------------------------


def test_commands_build_verify_and_describe_it(tmp_path: Path) -> None:
    done = packlight(
        "build", model_path(), "-r", "int4-fast", "-f", "coreai", "-o", "out",
        "--set", "verify.windows=2", "--set", "verify.sequence_length=64",
        "--set", "verify.gates={kl_divergence: '<=0.2'}", "--hub-id", "a/b", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (artifact,) = json.loads(done.stdout)["artifacts"]
    assert (artifact["format"], artifact["type"]) == ("coreai", "int4-g32")
    assert artifact["runtime"] == "Core AI 1.0.0b3, float32 twin in Apple's CPU runtime"
    assert artifact["generation_consistent"] and artifact["tokenizer_agreement"] == 1
    assert any("float32 twin" in note for note in artifact["notes"])
    assert any("largest value between operations" in note for note in artifact["notes"])
    assert not list((tmp_path / "out").rglob("*.partial"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "CoreAILanguageModel(resourcesAt:" in card
    check_app_files(tmp_path / "out" / "coreai")
    done = packlight("inspect", "out", "--json", cwd=tmp_path)
    facts = json.loads(done.stdout)
    assert facts["format"] == "coreai" and facts["bytes"] == artifact["bytes"]
    done = packlight("fit", "out", "--device", "iphone-17", "--json", cwd=tmp_path)
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["artifact"], row["verdict"]) == ("coreai", "fits")
