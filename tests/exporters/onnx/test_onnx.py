"""The ONNX graph in onnxruntime against the reference decoder; files, bytes, refusals."""

from __future__ import annotations

import collections
import hashlib
import os
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
from exported import Exported, Exports, greedy, reference
from writing import plan_for

from compress.decoder.config import DecoderConfig
from compress.errors import (
    ArtifactError,
    GridError,
    RuntimeMissingError,
    UnsupportedModelError,
    UsageError,
)
from compress.grids import get_grid
from compress.plan.shapes import Plan, tied_bits
from exporters.onnx.inspection import describe
from exporters.onnx.planning import GRIDS, entry_bytes
from exporters.onnx.runtime import OnnxRuntime


@pytest.fixture(scope="module")
def phi3(exported: Exports) -> Exported:
    return exported("onnx", "phi3")


def open_runtime(made: Exported, context: int = 0, **options: Any) -> OnnxRuntime:
    context = context or made.config.max_context
    return OnnxRuntime(made.path, context=context, threads=1, **options)


def regrid(grids: dict[str, str]) -> Callable[[Plan], Plan]:
    """Another grid for some weights by name, as an allocator would choose them."""

    def change(plan: Plan) -> Plan:
        entries = tuple(
            replace(e, grid=grids[e.name], nbytes=entry_bytes(grids[e.name], e.shape))
            if e.name in grids
            else e
            for e in plan.entries
        )
        return replace(plan, entries=entries)

    return change


def difference(case: Exported, lengths: tuple[int, ...]) -> float:
    runtime, decoder = open_runtime(case), reference(case)
    worst = 0.0
    for length in lengths:
        tokens = case.tokens(length)
        worst = max(worst, float(np.abs(runtime.logits(tokens) - decoder.logits(tokens)).max()))
    return worst


# --- the graph is the model ------------------------------------------------------------------

# Families with settings such that every layout is met; 90 positions are beyond every window.
PROOFS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"symmetric": False, "group_size": 16, "embedding_bits": 8}),
    ("llama", {"bits": 8, "group_size": 128}),
    ("llama", {"embedding_bits": 16, "head_bits": 8, "group_size": 64}),
    ("llama3", {"symmetric": False, "group_size": 256}),
    ("mistral", {"group_size": 64}),
    ("phi3", {"symmetric": False}),
    ("phi3-window", {"head_bits": 8}),
    (
        "phi3",
        {"bits": 4, "symmetric": False, "group_size": 256},
    ),  # one zero point a row: half a byte
    ("phi3-longrope", {"bits": 8, "symmetric": False, "group_size": 16}),
    ("phi4-mini", {}),
    ("phi4-mini", {"symmetric": False, "group_size": 128, "embedding_bits": 8}),
    ("phi", {}),
    ("phi", {"bits": 8, "symmetric": False}),
    ("qwen2", {}),
    ("qwen2", {"embedding_bits": 4, "symmetric": False}),
    ("qwen3", {}),
    ("qwen3", {"value_bits": 4}),
    ("llama3", {"value_bits": 4}),
    ("mobilellm", {"embedding_bits": 16}),
]


@pytest.mark.parametrize(("family", "settings"), PROOFS)
def test_logits_equal_those_of_the_decoded_weights(
    exported: Exports, family: str, settings: dict[str, Any]
) -> None:
    case = exported("onnx", family, accuracy_level=0, **settings)
    assert difference(case, (1, 12, 90)) <= 1e-4


def test_yarn_is_in_the_tables(exported: Exports) -> None:
    case = exported("onnx", "qwen3", {"rope_scaling": tiny.YARN}, accuracy_level=0)
    assert difference(case, (1, 90)) <= 1e-4
    plain = exported("onnx", "qwen3", accuracy_level=0)
    tokens = case.tokens(90)
    assert np.abs(open_runtime(case).logits(tokens) - reference(plain).logits(tokens)).max() > 0.1


def test_a_plan_may_mix_grids(exported: Exports) -> None:
    grids = {
        "blocks.0.qkv_proj.weight": "int8-g128-asym",
        "blocks.1.down_proj.weight": "int4-g64-asym",
        "blocks.1.o_proj.weight": "F16",
        "blocks.0.up_proj.weight": "F16",
        "lm_head.weight": "F16",
    }
    for family in ("phi", "llama"):
        source = exported.checkpoint(family)
        settings = {"accuracy_level": 0}
        case = exported.write("onnx", source, settings, change=regrid(grids))
        assert {entry.grid for entry in case.plan.entries} == {"F32", "int4-g32", *grids.values()}
        assert difference(case, (1, 40)) <= 1e-4


@pytest.mark.parametrize("kind", ["", "-asym"])
def test_every_grid_in_one_graph(exported: Exports, kind: str) -> None:
    matrices = [f"blocks.{i}.{role}_proj.weight" for i in (0, 1) for role in
                ("qkv", "o", "gate", "up", "down")]  # fmt: skip
    wanted = [f"int{bits}-g{size}{kind}" for bits in (4, 8) for size in (16, 32, 64, 128, 256)]
    assert set(wanted) < set(GRIDS)
    grids = dict(zip(matrices, wanted, strict=True))
    source = exported.checkpoint("llama")
    case = exported.write("onnx", source, {"accuracy_level": 0}, change=regrid(grids))
    assert difference(case, (1, 40)) <= 1e-4


def test_shared_blocks_are_stored_once_and_run_twice(exported: Exports) -> None:
    case = exported("onnx", "mobilellm", {"layer_sharing": True}, accuracy_level=0)
    assert case.config.num_hidden_layers == 4
    assert difference(case, (1, 40)) <= 1e-4
    plain = exported("onnx", "mobilellm", accuracy_level=0)
    assert case.plan.weights_bytes == plain.plan.weights_bytes


@pytest.mark.parametrize("family", ["phi3", "qwen3", "phi"])
def test_int8_activations_stay_close(exported: Exports, family: str) -> None:
    # accuracy_level 4 rounds the activations of a linear to int8: noise of the runtime itself.
    case = exported("onnx", family)
    assert case.plan.settings["accuracy_level"] == 4
    tokens = case.tokens(90)
    ours, exact = open_runtime(case).logits(tokens), reference(case).logits(tokens)
    assert 1e-3 < np.abs(ours - exact).max() < 1.0
    p, q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (exact, ours))
    assert (np.exp(p) * (p - q)).sum(1).mean() < 3e-3


@pytest.mark.parametrize("family", ["phi3-window", "mistral"])
def test_attention_does_not_see_beyond_the_window(exported: Exports, family: str) -> None:
    case = exported("onnx", family, accuracy_level=0)
    assert case.config.sliding_window == 32
    tokens = case.tokens(90)
    other = [tokens[0] + 1 if tokens[0] < 500 else 3, *tokens[1:]]
    runtime = open_runtime(case)
    moved = np.abs(runtime.logits(tokens) - runtime.logits(other)).max(1)
    # Two blocks: position p sees back to p - 2 * 31.
    assert (moved[:63] > 0).all()
    assert moved[63:].max() < 1e-4


@pytest.mark.parametrize("family", ["phi3-window", "llama3", "phi", "qwen3"])
def test_the_cache_gives_the_tokens_of_a_fresh_run(exported: Exports, family: str) -> None:
    case = exported("onnx", family, accuracy_level=0)
    runtime = open_runtime(case)
    prompt = case.tokens(9)
    cached = greedy(runtime, prompt, 32)
    fresh: list[int] = []
    for _ in range(32):
        fresh.append(int(runtime.logits(prompt + fresh)[-1].argmax()))
    assert cached == fresh
    assert greedy(runtime, prompt, 32) == cached  # the old contents of the buffers have no effect


def test_the_cache_with_int8_activations(phi3: Exported) -> None:
    # A rounding that falls the other way can turn a near-tie, no more.
    runtime = open_runtime(phi3)
    prompt = phi3.tokens(9)
    cached = greedy(runtime, prompt, 32)
    fresh = runtime.logits(prompt + cached)[len(prompt) - 1 : -1]
    chosen = fresh[np.arange(32), cached]
    assert (fresh.max(1) - chosen).max() < 0.2
    assert (fresh.argmax(1) == cached).mean() > 0.9


def test_a_long_prompt_is_run_in_chunks(exported: Exports, phi3: Exported) -> None:
    exact = exported("onnx", "phi3", accuracy_level=0)
    tokens = exact.tokens(70)
    whole = open_runtime(exact).logits(tokens)
    pieces = open_runtime(exact, batch=16)
    np.testing.assert_allclose(pieces.logits(tokens), whole, atol=1e-4)
    np.testing.assert_allclose(pieces.feed(tokens), whole[-1], atol=1e-4)


# --- the file --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_onnx_checker_and_fusions(exported: Exports, family: str, tmp_path: Path) -> None:
    case = exported("onnx", family)
    graph = case.path / "onnx/model_q4.onnx"
    onnx.checker.check_model(str(graph), full_check=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    model = onnx.load(options.optimized_model_filepath, load_external_data=False)
    found = collections.Counter(node.op_type for node in model.graph.node)
    # What onnxruntime runs: its own norms, no primitive of RMSNorm, no scale left to cast.
    norms = {"phi": ("LayerNormalization", "SkipLayerNormalization")}.get(
        family, ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
    )
    assert found[norms[0]] == (5 if family == "qwen3" else 1)
    assert found[norms[1]] == (2 if family == "phi" else 4)
    assert found["GroupQueryAttention"] == 2
    assert found["Pow"] == found["ReduceMean"] == found["Sigmoid"] == 0
    assert found["Cast"] == 3  # two of the mask, one of the embedding's codes


def test_what_the_graph_says(phi3: Exported) -> None:
    file = phi3.path / "onnx/model_q4.onnx"
    model = onnx.load(file, load_external_data=False)
    assert model.ir_version == 10
    assert {o.domain: o.version for o in model.opset_import} == {"": 21, "com.microsoft": 1}
    inputs = {i.name: i.type.tensor_type for i in model.graph.input}
    assert list(inputs)[:3] == ["input_ids", "attention_mask", "position_ids"]
    for name, kind in inputs.items():
        dims = [d.dim_param or d.dim_value for d in kind.shape.dim]
        if name.startswith("past_key_values."):
            assert dims == ["batch_size", 4, "past_sequence_length", 64]
            assert kind.elem_type == onnx.TensorProto.FLOAT
        else:
            assert kind.elem_type == onnx.TensorProto.INT64
    outputs = [o.name for o in model.graph.output]
    assert outputs == ["logits"] + [f"present.{i}.{p}" for i in (0, 1) for p in ("key", "value")]
    for tensor in model.graph.initializer:
        size = onnx.numpy_helper.to_array(tensor).nbytes if not tensor.external_data else 256
        assert size <= 256
        places = {e.key: e.value for e in tensor.external_data}
        assert places.get("location", "model_q4.onnx_data") == "model_q4.onnx_data"
    assert str(phi3.path.parent).encode() not in file.read_bytes()
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("phi3", {}), ("phi4-mini", {"symmetric": False}), ("llama", {"bits": 8, "group_size": 16})],
)
def test_planned_bytes_are_the_bytes(
    exported: Exports, family: str, settings: dict[str, Any]
) -> None:
    case = exported("onnx", family, **settings)
    described = describe(case.path)
    rows = {row["name"]: row for row in described["tensors"]}
    assert set(rows) == {entry.target_name for entry in case.plan.entries}
    for entry in case.plan.entries:
        row = rows[entry.target_name]
        assert row["bytes"] == entry.nbytes
        assert tuple(row["shape"]) == entry.shape
        assert row["grid"] == ("table" if entry.name.startswith("rope.") else entry.grid)
    (data,) = case.path.glob("onnx/*.onnx_data")
    padding = data.stat().st_size - case.plan.weights_bytes
    assert 0 <= padding < 64 * 3 * len(case.plan.entries)
    assert described["bytes"] == case.artifact.nbytes
    assert described["parameters"] == case.config.num_parameters
    assert described["kv_bytes_per_value"] == case.plan.kv_bytes_per_value == 4
    assert described["context"] == case.config.max_context
    # A tied head has no bytes of its own.
    assert ("lm_head.weight" in rows) is not case.config.tie_word_embeddings


def test_describe_refuses_data_that_is_missing_or_short(phi3: Exported, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(phi3.path, folder)
    (data,) = folder.glob("onnx/*.onnx_data")
    os.truncate(data, 1000)
    with pytest.raises(ArtifactError, match=r"onnx_data is truncated: \d+ bytes are needed"):
        describe(folder)
    data.unlink()
    with pytest.raises(ArtifactError, match="onnx_data is missing beside"):
        describe(folder)
    (graph,) = folder.glob("onnx/*.onnx")
    graph.write_bytes(b"")  # parses: an empty message
    with pytest.raises(ArtifactError, match="holds no graph"):
        describe(folder)


def test_same_bytes_twice_and_for_any_slab(exported: Exports, phi3: Exported) -> None:
    def digests(case: Exported) -> dict[str, str]:
        return {
            str(file.relative_to(case.path)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(case.path.rglob("*"))
            if file.is_file()
        }

    first, source = digests(phi3), phi3.checkpoint.path
    assert digests(exported.write("onnx", source, {})) == first
    assert digests(exported.write("onnx", source, {}, slab=256 * 33)) == first


def test_memory_is_bounded_by_the_slab(exported: Exports) -> None:
    source = exported.checkpoint("llama", vocab_size=16384)
    exported.write("onnx", source, {})  # compiles kernels, imports
    tracemalloc.start()
    exported.write("onnx", source, {}, slab=2**16)  # 256 KB as float32; the embedding has 16 MB
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 2**20


def test_progress_adds_up_to_the_total(exported: Exports) -> None:
    calls: list[int] = []
    case = exported.write("onnx", exported.checkpoint("llama"), {}, written=calls.append)
    assert sum(calls) == case.plan.weights_bytes and min(calls) > 0


# --- the plan --------------------------------------------------------------------------------


def test_default_settings(exported: Exports) -> None:
    plan = plan_for("onnx", exported.config("llama"), {})
    assert plan.type_name == "int4-g32"
    grids = {entry.name: entry.grid for entry in plan.entries}
    assert grids["embed_tokens.weight"] == grids["lm_head.weight"] == "int4-g32"
    assert grids["blocks.1.qkv_proj.weight"] == "int4-g32"
    assert grids["blocks.1.input_layernorm.weight"] == grids["rope.cos"] == "F32"
    assert all(get_grid(name).name == name for name in GRIDS)
    assert {entry.grid for entry in plan.entries} <= {*GRIDS, "F32"}


def test_a_tied_matrix_has_8_bits_and_is_stored_once(exported: Exports) -> None:
    config = exported.config("qwen2")
    assert config.tie_word_embeddings

    def grids(config: DecoderConfig, **settings: Any) -> list[str]:
        plan = plan_for("onnx", config, settings)
        found = {entry.name: entry.grid for entry in plan.entries}
        assert found["blocks.1.down_proj.weight"] == f"int{settings.get('bits', 4)}-g32"
        return [found[n] for n in ("embed_tokens.weight", "lm_head.weight") if n in found]

    assert grids(config) == grids(config, bits=8) == ["int8-g32"]
    assert grids(config, head_bits=8) == grids(config, embedding_bits=8) == ["int8-g32"]
    assert grids(config, head_bits=4) == grids(config, embedding_bits=4) == ["int4-g32"]
    assert grids(config, embedding_bits=16) == ["F16", "int8-g32"]
    assert grids(config, embedding_bits=4, head_bits=8) == ["int4-g32", "int8-g32"]
    # Where it is most of the weights, 8 bits cost more bytes there than they would elsewhere.
    assert grids(exported.config("qwen2", vocab_size=8192)) == ["int4-g32"]
    assert tied_bits(config, 4) == 8 and tied_bits(exported.config("llama"), 4) == 4


def test_shared_values_have_8_bits_in_a_matrix_of_their_own(exported: Exports) -> None:
    def grids(family: str, **settings: Any) -> dict[str, str]:
        plan = plan_for("onnx", exported.config(family), settings)
        return {
            e.name.split(".")[2]: e.grid
            for e in plan.entries
            if ".1." in e.name and len(e.shape) == 2
        }

    shared = grids("qwen2", symmetric=False)
    assert "qkv_proj" not in shared and shared["v_proj"] == "int8-g32-asym"
    assert shared["q_proj"] == shared["k_proj"] == shared["o_proj"] == "int4-g32-asym"
    for packed in (grids("qwen2", value_bits=4), grids("llama"), grids("qwen2", bits=8)):
        assert "v_proj" not in packed and packed["qkv_proj"] == packed["o_proj"]
    assert grids("llama", value_bits=8)["v_proj"] == "int8-g32"


@pytest.mark.parametrize("settings", [{}, {"embedding_bits": 4, "symmetric": False}])
def test_both_uses_of_a_tied_matrix_read_one_initializer(
    exported: Exports, settings: dict[str, Any]
) -> None:
    case = exported("onnx", "qwen2", **settings)
    model = onnx.load(case.path / "onnx/model_q4.onnx", load_external_data=False)
    name = "embed_tokens.weight.codes"
    readers = [node.op_type for node in model.graph.node if name in node.input]
    assert readers == ["Gather", "MatMulNBits"]
    places = [
        next(e.value for e in tensor.external_data if e.key == "offset")
        for tensor in model.graph.initializer
        if tensor.external_data
    ]
    assert len(places) == len(set(places))


def test_rows_that_the_group_does_not_divide(exported: Exports) -> None:
    config = exported.config("llama", intermediate_size=576)
    with pytest.raises(GridError, match="does not divide rows of 576") as caught:
        plan_for("onnx", config, {"group_size": 128})
    assert "group_size: 64 fits" in caught.value.hint
    plan_for("onnx", config, {"group_size": 64})


def test_notes_only_where_they_apply(exported: Exports) -> None:
    def notes(family: str) -> str:
        found = plan_for("onnx", exported.config(family), {}).notes
        return " ".join(note for note in found if "tables of cos" not in note)

    assert notes("llama") == notes("phi3") == notes("mistral") == ""
    assert "256 positions, not 2048" in notes("phi3-longrope")
    assert "num_key_value_heads" in notes("phi4-mini")
    assert "head_dim" in notes("qwen3")


def test_tables_are_as_long_as_the_context_that_is_asked_for(exported: Exports) -> None:
    whole = plan_for("onnx", exported.config("llama"), {})
    assert "tables of cos and sin for 256 positions are 65,536 bytes" in whole.notes[0]
    case = exported("onnx", "llama", accuracy_level=0, context=64)
    assert case.plan.max_context == 64
    assert {e.shape for e in case.plan.entries if e.name.startswith("rope.")} == {(64, 32)}
    assert difference(case, (1, 60)) <= 1e-4
    runtime = open_runtime(case)
    with pytest.raises(UsageError, match="room for 64"):
        runtime.logits(case.tokens(65))
    with pytest.raises(UsageError, match="the model has 256 positions"):
        plan_for("onnx", exported.config("llama"), {"context": 300})
    few = plan_for("onnx", exported.config("llama"), {"context": 32})
    assert sum(e.nbytes for e in few.entries if "rope" in e.name) * 100 < few.weights_bytes
    assert not few.notes


def test_rotary_dimensions_that_the_operator_refuses(exported: Exports) -> None:
    config = exported.config("phi", partial_rotary_factor=0.375)
    with pytest.raises(UnsupportedModelError, match="24 rotary dimensions"):
        plan_for("onnx", config, {})


# --- the runtime -----------------------------------------------------------------------------


def test_runtime_facts(phi3: Exported) -> None:
    runtime = open_runtime(phi3)
    assert runtime.name == f"onnxruntime {onnxruntime.__version__}"
    assert runtime.vocab_size == phi3.config.vocab_size
    logits = runtime.logits(phi3.tokens(5))
    assert logits.dtype == np.float32
    assert logits.shape == (5, phi3.config.vocab_size)
    assert runtime.feed(phi3.tokens(5)).shape == (phi3.config.vocab_size,)
    # 4 heads of 64, keys and values, 2 blocks, float32
    assert phi3.artifact.kv_cache_bytes_per_token == 4 * 64 * 2 * 2 * 4
    runtime.close()
    runtime.close()


def test_no_room_beyond_the_context(phi3: Exported) -> None:
    runtime = open_runtime(phi3, context=16)
    runtime.feed(phi3.tokens(12))
    with pytest.raises(UsageError, match="17 tokens"):
        runtime.feed(phi3.tokens(5))
    runtime.reset()
    assert len(runtime.logits(phi3.tokens(16))) == 16
    # Nor beyond the artifact's positions, for any requested number.
    with pytest.raises(UsageError, match="257 tokens do not fit: the runtime has room for 256"):
        open_runtime(phi3, context=5000).logits(phi3.tokens(257))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_cache_takes_memory_as_it_fills(exported: Exports) -> None:
    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("RssAnon")]
        return int(line.split()[1]) * 1024

    case = exported("onnx", "llama", {"max_position_embeddings": 32768})
    whole = 32768 * case.artifact.kv_cache_bytes_per_token
    assert whole == 128 * 2**20
    runtime = open_runtime(case)
    before = anonymous()
    runtime.feed(case.tokens(3))
    assert anonymous() - before < whole / 8


def test_broken_artifacts(phi3: Exported, tmp_path: Path) -> None:
    def copy(name: str, graph: bytes, data: bytes | None) -> Path:
        folder = tmp_path / name
        (folder / "onnx").mkdir(parents=True)
        (folder / "onnx/model_q4.onnx").write_bytes(graph)
        if data is not None:
            (folder / "onnx/model_q4.onnx_data").write_bytes(data)
        return folder

    graph = (phi3.path / "onnx/model_q4.onnx").read_bytes()
    data = (phi3.path / "onnx/model_q4.onnx_data").read_bytes()
    for folder in (
        copy("no-data", graph, None),
        copy("short-data", graph, data[:-5000]),
        copy("short-graph", graph[:-500], data),
        copy("not-onnx", b"hello", data),
    ):
        with pytest.raises(ArtifactError, match=r"model_q4\.onnx") as caught:
            OnnxRuntime(folder, context=64)
        assert "\n" not in caught.value.message
    with pytest.raises(ArtifactError, match="not an ONNX file"):
        describe(tmp_path / "not-onnx")
    with pytest.raises(ArtifactError, match=r"no \.onnx file"):
        describe(tmp_path)
    (tmp_path / "no-data/onnx/model_int8.onnx").write_bytes(graph)
    with pytest.raises(ArtifactError, match=r"2 \.onnx file"):
        OnnxRuntime(tmp_path / "no-data", context=64)


def test_missing_package(phi3: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeMissingError, match="not installed") as caught:
        open_runtime(phi3)
    assert "pip install" in caught.value.hint
