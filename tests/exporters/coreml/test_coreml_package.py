"""The written Core ML package: its bytes, Apple's own reading of it, its side files, refusals."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from exported import CONTEXT, Exported, Exports, decoded, reference
from writing import plan_for

from compress.decoder.config import DecoderConfig
from compress.errors import (
    DiskFullError,
    GridError,
    RuntimeMissingError,
    UnsupportedModelError,
    UsageError,
)
from compress.formats import get_format
from compress.plan.shapes import Plan
from exporters.coreml import writer
from exporters.coreml.evaluator import Evaluator
from exporters.coreml.inspection import describe
from exporters.coreml.planning import GRIDS, parts, weight_file_bytes

ROOT = Path(__file__).resolve().parents[3]
# Every kind of stored tensor in one model of fourteen linears.
MIXED = (
    *("int4-g32", "int4-g16-asym", "int4-channel", "int4-channel-asym"),
    *("int8-g64", "int8-g32-asym", "int8-channel", "F16"),
    *("lut1-g8", "lut2-g16", "lut3-g32", "lut4-g8", "lut6-g16", "lut8-g32"),
    *("lut1-tensor", "lut4-tensor"),
)


def mixed(plan: Plan, config: DecoderConfig) -> Plan:
    """The plan with another grid for each matrix."""
    wanted, entries = iter(MIXED), []
    for entry in plan.entries:
        if len(entry.shape) == 2 and not entry.name.startswith("rope"):
            grid = next(wanted)
            nbytes = sum(part.nbytes for part in parts(grid, entry.shape))
            entry = replace(entry, grid=grid, nbytes=nbytes)
        entries.append(entry)
    assert next(wanted, None) is None
    found = replace(plan, entries=tuple(entries))
    container = weight_file_bytes(config, found.entries) - found.weights_bytes
    return replace(found, settings={**plan.settings, "container_bytes": container})


@pytest.fixture(scope="module")
def mixture(exported: Exports) -> Exported:
    """A package with every kind of grid."""
    make = {"tie_word_embeddings": False}
    source, config = exported.checkpoint("qwen2", **make), exported.config("qwen2", **make)
    return exported.write("coreml", source, {}, change=lambda plan: mixed(plan, config))


def weight_file(built: Exported) -> Path:
    return built.artifact.path / "Data/com.apple.CoreML/weights/weight.bin"


# --- Apple's own reading ----------------------------------------------------------------------


def test_coremltools_decompresses_every_constant_to_what_its_grid_decodes(
    mixture: Exported,
) -> None:
    import coremltools
    from coremltools.converters.mil.frontend.milproto import load

    model = coremltools.models.MLModel(str(mixture.artifact.path), skip_model_load=True)
    spec = model.get_spec()
    program = load.load(spec, spec.specificationVersion, str(weight_file(mixture).parent))
    found = {}
    for op in program.functions["main"].operations:
        if op.op_type.startswith("constexpr_"):
            found[op.name] = op.materialized_val_inference()
        elif op.op_type == "const" and op.name.endswith("_weight"):
            found[op.name] = op.val.val
    weights = decoded(mixture, halves=True)
    for entry in mixture.plan.entries:
        if entry.name.startswith("rope") or len(entry.shape) < 2:
            continue
        expected = weights[entry.name]
        assert found[entry.target_name].dtype == np.float16
        assert np.array_equal(found[entry.target_name].astype(np.float32), expected), entry.grid


def test_a_mixture_of_all_grids_runs(mixture: Exported) -> None:
    tokens = list(range(3, 43))
    evaluator = Evaluator(mixture.artifact.path)
    inputs = {"inputIds": np.array([tokens], np.int32), "causalMask": np.zeros((1, 1, 1, 40))}
    found = evaluator.predict(inputs, evaluator.make_state())["logits"][0]
    assert np.abs(found - reference(mixture, halves=True).logits(tokens)).max() < 5e-5
    described = {tensor["name"]: tensor for tensor in describe(mixture.artifact.path)["tensors"]}
    for entry in mixture.plan.entries:
        tensor = described[entry.target_name]
        assert (tensor["grid"], tensor["bytes"]) == (entry.grid, entry.nbytes)
        assert tensor["shape"] == list(entry.shape)


def test_interface_is_that_of_swift_transformers(exported: Exports) -> None:
    import coremltools

    built = exported("coreml", "llama3", grid="int4-g32")
    model = coremltools.models.MLModel(str(built.artifact.path), skip_model_load=True)
    spec = model.get_spec()
    assert spec.specificationVersion == 9
    assert spec.mlProgram.functions["main"].opset == "CoreML8"
    described = spec.description
    arrays = {feature.name: feature.type.multiArrayType for feature in described.input}
    kinds = coremltools.proto.FeatureTypes_pb2.ArrayFeatureType
    assert list(arrays) == ["inputIds", "causalMask"]
    assert arrays["inputIds"].dataType == kinds.INT32
    assert arrays["causalMask"].dataType == kinds.FLOAT16
    flexible = (1, CONTEXT)
    assert ranges(arrays["inputIds"]) == [(1, 1), flexible]
    assert ranges(arrays["causalMask"]) == [(1, 1), (1, 1), flexible, flexible]
    states = {feature.name: feature.type.stateType.arrayType for feature in described.state}
    assert list(states) == ["keyCache", "valueCache"]
    for state in states.values():
        assert list(state.shape) == [2, 1, 2, CONTEXT, 64]
        assert state.dataType == kinds.FLOAT16
    assert [feature.name for feature in described.output] == ["logits"]
    assert described.output[0].type.multiArrayType.dataType == kinds.FLOAT16
    keys = described.metadata.userDefined
    assert "co.huggingface.exporters.name" not in keys  # of a folder, which is not on the Hub
    assert keys["packlight.context"] == str(CONTEXT)


def ranges(array: Any) -> list[tuple[int, int]]:
    return [(size.lowerBound, size.upperBound) for size in array.shapeRange.sizeRanges]


def test_states_are_read_once_and_then_only_written_through(mixture: Exported) -> None:
    # In the file every write is followed by a read: that pair is `coreml_update_state`. A read
    # that does not follow a write of its state is what coremltools' passes would merge wrongly.
    import coremltools

    spec = coremltools.models.MLModel(str(mixture.artifact.path), skip_model_load=True).get_spec()
    block = spec.mlProgram.functions["main"].block_specializations["CoreML8"]
    touched = [
        (op.type, op.inputs["input"].arguments[0].name)
        for op in block.operations
        if op.type.endswith("_state")
    ]
    pairs = [
        (kind, name)
        for _ in range(2)
        for name in ("keyCache", "valueCache")
        for kind in ("write_state", "read_state")
    ]
    assert touched == [("read_state", "keyCache"), ("read_state", "valueCache"), *pairs]


# --- bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "grid", "overrides"),
    [
        ("llama", "int4-g32", {}),
        ("phi", "lut4-g8", {}),
        ("llama3", "lut4-g8", {}),
        ("mobilellm", "lut6-g16", {"layer_sharing": True}),
    ],
)
def test_planned_bytes_are_the_file(
    exported: Exports, family: str, grid: str, overrides: dict[str, Any]
) -> None:
    built = exported("coreml", family, overrides, grid=grid)
    planned = built.plan.weights_bytes + built.plan.settings["container_bytes"]
    size = weight_file(built).stat().st_size
    assert math.ceil(size / 64) * 64 == planned
    assert built.artifact.weights_bytes == built.plan.weights_bytes
    files = [file for file in built.artifact.path.rglob("*") if file.is_file()]
    assert built.artifact.nbytes == sum(file.stat().st_size for file in files)


def test_two_writes_give_the_same_bytes(exported: Exports, tmp_path: Path) -> None:
    built = exported("coreml", "phi4-mini", grid="lut4-g8")
    again = tmp_path / "again"
    again.mkdir()
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from pathlib import Path
import exporters
from exported import Exports
exported, source, folder = Exports(Path()), Path({str(built.checkpoint.path)!r}), {str(again)!r}
exported.write("coreml", source, dict(grid="lut4-g8"), name="phi4-mini", folder=Path(folder))
"""
    # Another process, another hash seed: protobuf maps and Python sets would show it.
    environment = os.environ | {"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    first = {p.relative_to(built.artifact.path.parent): p for p in files_of(built.artifact.path)}
    second = {p.relative_to(again): p for p in files_of(again / "phi4-mini.mlpackage")}
    assert first.keys() == second.keys()
    for name, path in first.items():
        assert path.read_bytes() == second[name].read_bytes(), name


def files_of(package: Path) -> list[Path]:
    """Files of the package and of the folder around it."""
    return sorted(path for path in package.parent.rglob("*") if path.is_file())


def test_nothing_of_this_machine_is_in_the_files(exported: Exports) -> None:
    built = exported("coreml", "phi4-mini", grid="lut4-g8")
    for path in files_of(built.artifact.path):
        content = path.read_bytes()
        assert str(built.checkpoint.path.parent).encode() not in content
        assert str(ROOT).encode() not in content


def test_memory_is_that_of_a_slab(exported: Exports) -> None:
    path = exported.checkpoint("llama", hidden_size=256, intermediate_size=512, vocab_size=16384)
    largest = 256 * 16384 * 4
    for grid in ("F16", "lut4-g16"):
        exported.write("coreml", path, {"grid": grid})  # warm: imports are not what is measured
        tracemalloc.start()
        built = exported.write("coreml", path, {"grid": grid}, slab=1 << 16)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert built.config.num_parameters * 4 > largest
        assert peak < largest // 3


@pytest.mark.parametrize("grid", ["int4-g32", "int8-g64-asym", "lut4-g8", "lut3-tensor"])
def test_slabs_of_rows_give_the_same_bytes(exported: Exports, grid: str) -> None:
    whole = exported("coreml", "llama", {"vocab_size": 704}, grid=grid)
    # 256 rows of 256 columns; 192 are left over.
    slabs = exported.write("coreml", whole.checkpoint.path, {"grid": grid}, slab=1 << 16)
    assert weight_file(slabs).read_bytes() == weight_file(whole).read_bytes()


def test_progress_counts_the_weights(exported: Exports) -> None:
    told: list[int] = []
    built = exported.write(
        "coreml",
        exported.checkpoint("llama"),
        {"grid": "int4-g32"},
        written=told.append,
    )
    assert sum(told) == built.plan.weights_bytes and min(told) > 0
    assert len(told) > 20


# --- beside the package -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["phi3", "qwen2", "mobilellm"])
def test_side_files_load_in_transformers(exported: Exports, family: str) -> None:
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

    grids = {"phi3": "int4-g32", "qwen2": "int8-channel-asym", "mobilellm": "lut4-g8"}
    built = exported("coreml", family, grid=grids[family])
    folder = built.artifact.path.parent
    assert built.artifact.path.name == f"{family}.mlpackage"
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == built.config.model_type
    assert config.tie_word_embeddings == built.config.tie_word_embeddings
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    original = AutoTokenizer.from_pretrained(built.checkpoint.path, trust_remote_code=False)
    for text in ("Hello, world", "  def f(x):\n    return x"):
        assert fast.encode(text) == original.encode(text)


def test_tokenizer_json_is_made_from_tokenizer_model(exported: Exports, tmp_path: Path) -> None:
    path = tiny.make("llama", tmp_path)
    (path / "tokenizer.json").unlink()
    built = exported.write("coreml", path, {"grid": "F16"})
    assert (built.artifact.path.parent / "tokenizer.json").exists()


def test_describe_reads_no_weights(exported: Exports) -> None:
    built = exported("coreml", "llama3", grid="lut4-g8")
    facts = describe(built.artifact.path)
    assert facts["format"] == "coreml"
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["parameters"] == built.config.num_parameters
    assert facts["bytes"] == built.artifact.nbytes
    assert facts["bits_per_weight"] == facts["bytes"] * 8 / facts["parameters"]
    assert facts["metadata"]["keyCache"] == f"fp16 [2, 1, 2, {CONTEXT}, 64]"
    assert facts["context"] == CONTEXT  # less than the model's: `packlight verify` asks for no more
    json.dumps(facts)


# --- plans and refusals -------------------------------------------------------------------------


def test_plan_defaults(exported: Exports) -> None:
    plan = plan_for("coreml", exported.config("llama3"), {}, model_name="M")
    assert (plan.format, plan.type_name, plan.max_context) == ("coreml", "int4-g32", 2048)
    grids = {entry.name: entry.grid for entry in plan.entries}
    assert grids["embed_tokens.weight"] == "int8-g32"  # the head's, too
    assert grids["blocks.1.down_proj.weight"] == "int4-g32"
    assert grids["norm.weight"] == "F32"
    assert "lm_head.weight" not in grids
    assert all(type(entry.nbytes) is int for entry in plan.entries)
    settings = {"grid": "lut4-g8", "embedding": "int8-channel"}
    plan = plan_for("coreml", exported.config("phi"), settings)
    grids = {entry.name: entry.grid for entry in plan.entries}
    assert grids["embed_tokens.weight"] == "int8-channel"
    assert grids["lm_head.weight"] == "lut4-g8"
    assert grids["blocks.0.q_proj.bias"] == "F16"


@pytest.mark.parametrize(
    ("family", "settings", "embedding"),
    [
        ("qwen2", {"grid": "int4-g64-asym"}, "int8-g64-asym"),
        ("qwen2", {"grid": "lut4-g8"}, "int8-channel"),
        ("qwen2", {"grid": "lut8-g8"}, "lut8-g8"),
        ("qwen2", {"grid": "F16"}, "F16"),
        ("qwen2", {"grid": "lut4-g8", "embedding": "lut6-g8"}, "lut6-g8"),
        ("phi", {"grid": "lut4-g8"}, "lut4-g8"),  # not tied
    ],
)
def test_a_tied_embedding_has_8_bits_unless_the_recipe_says_otherwise(
    exported: Exports, family: str, settings: dict[str, Any], embedding: str
) -> None:
    plan = plan_for("coreml", exported.config(family), settings)
    grids = {entry.name: entry.grid for entry in plan.entries}
    assert grids["embed_tokens.weight"] == embedding
    assert grids["blocks.1.down_proj.weight"] == settings["grid"]


@pytest.mark.parametrize(
    ("family", "settings", "value"),
    [
        ("qwen2", {"grid": "int4-g64-asym"}, "int8-g64-asym"),
        ("qwen2", {"grid": "lut4-g8"}, "int8-channel"),
        ("qwen2", {"grid": "F16"}, "F16"),
        ("qwen2", {"grid": "int4-g32", "value": "int4-g32"}, "int4-g32"),
        ("llama", {"grid": "int4-g32"}, "int4-g32"),  # no query heads share one
    ],
)
def test_shared_values_have_8_bits_unless_the_recipe_says_otherwise(
    exported: Exports, family: str, settings: dict[str, Any], value: str
) -> None:
    plan = plan_for("coreml", exported.config(family), settings)
    grids = {entry.name: entry.grid for entry in plan.entries}
    assert grids["blocks.1.v_proj.weight"] == value
    assert grids["blocks.1.k_proj.weight"] == settings["grid"]


def test_a_tied_embedding_that_is_most_of_the_weights_stays_as_the_blocks(
    exported: Exports,
) -> None:
    plan = plan_for("coreml", exported.config("qwen2", vocab_size=8192), {"grid": "int4-g32"})
    assert plan.entries[2].name == "embed_tokens.weight" and plan.entries[2].grid == "int4-g32"


def test_rows_that_do_not_divide_take_smaller_groups_and_say_so(exported: Exports) -> None:
    config = replace(exported.config("llama"), vocab_size=514, intermediate_size=528)
    plan = plan_for("coreml", config, {"grid": "lut4-g8"})
    entries = {entry.name: entry for entry in plan.entries}
    assert entries["embed_tokens.weight"].grid == "lut4-g2"
    assert entries["embed_tokens.weight"].note == "514×256 does not divide into lut4-g8"
    assert entries["blocks.0.q_proj.weight"].note == ""
    plan = plan_for("coreml", config, {"grid": "int4-g32"})
    entries = {entry.name: entry for entry in plan.entries}
    assert entries["blocks.0.down_proj.weight"].grid == "int4-g16"
    odd = replace(config, intermediate_size=514)
    plan = plan_for("coreml", odd, {"grid": "int4-g32-asym"})
    entries = {entry.name: entry for entry in plan.entries}
    assert entries["blocks.0.down_proj.weight"].grid == "int4-channel-asym"


def test_every_grid_that_is_offered_is_a_grid() -> None:
    from compress.grids import get_grid

    for name in get_format("coreml").GRIDS:
        assert get_grid(name).name == name
        if name != "F16":
            shape = (256, 512)
            stored = sum(part.nbytes for part in parts(name, shape))
            # ONNX starts the zero points of every row at a byte; Core ML packs them all.
            padding = 128 if name == "int4-channel-asym" else 0
            assert stored == get_grid(name).nbytes(shape) - padding
    assert get_format("coreml").GRIDS == GRIDS


def test_plan_refusals(exported: Exports) -> None:
    config = exported.config("phi3-longrope")
    for grid in ("Q4_K", "int4-g8", "lut5-g8", "BF16"):
        with pytest.raises(GridError, match="not a grid that Core ML stores"):
            plan_for("coreml", config, {"grid": grid})
    with pytest.raises(UnsupportedModelError, match="iOS16"):
        plan_for("coreml", config, {"deployment": "iOS16"})
    with pytest.raises(
        UsageError, match="context 257 is not between 2 and the 256 positions"
    ) as refusal:
        plan_for("coreml", config, {"context": 257})
    assert refusal.value.hint.startswith("--context 256")


def test_notes_tell_what_a_user_should_know(exported: Exports) -> None:
    notes = " ".join(plan_for("coreml", exported.config("phi3-longrope"), {}).notes)
    assert "allocated whole, 524,288 bytes for 256 positions" in notes
    assert "holds 256 positions, not 2048" in notes
    config = replace(exported.config("llama"), head_dim=80)
    assert "heads of 80 are not a multiple of 32" in " ".join(plan_for("coreml", config, {}).notes)


def test_another_coremltools_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import coremltools

    monkeypatch.setattr(coremltools, "__version__", "9.1")
    with pytest.raises(RuntimeMissingError, match=r"coremltools 9\.1 is installed") as caught:
        writer.CoreMLTools()
    assert caught.value.hint == "pip install coremltools==9.0"


def test_a_full_disk_is_told(exported: Exports, tmp_path: Path) -> None:
    path = exported.checkpoint("llama")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # Python ignores the signal
    try:
        with pytest.raises(DiskFullError):
            exported.write("coreml", path, {"grid": "int8-channel"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
