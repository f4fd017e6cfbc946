"""Weights and plans, the interface between packlight and the formats."""

from __future__ import annotations

import json
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
from writing import plan_for

from compress.calibration.statistics import LayerStats, Statistics
from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.checkpoint.sources import Change
from compress.decoder.config import DecoderConfig
from compress.decoder.decoder import Decoder
from compress.errors import CheckpointError
from compress.grids import Float32, Grid, Quantized, get_grid
from compress.grids.lanes import LANES
from compress.plan.shapes import Plan, PlanEntry
from compress.plan.weights import SIDE_BY_SIDE, Weights


def rtn(weight: Float32, grid: Grid, name: str) -> Quantized:
    return grid.quantize(weight)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tiny.make("phi3", tmp_path_factory.mktemp("phi3"), shards=2, tokenizer=False)
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def weights(checkpoint: Checkpoint) -> Weights:
    return Weights(Stored(checkpoint, DecoderConfig.from_hf(checkpoint.config)), rtn)


def test_read_gives_our_names_to_the_tensors_on_disk(checkpoint: Checkpoint, weights: Weights):
    fused = checkpoint.read("model.layers.1.self_attn.qkv_proj.weight")
    assert (weights.read("blocks.1.qkv_proj.weight") == fused).all()
    assert (weights.read("blocks.1.v_proj.weight") == fused[512:]).all()
    assert (weights.read("blocks.1.v_proj.weight", slice(3, 9)) == fused[515:521]).all()
    assert (weights.read("norm.weight") == checkpoint.read("model.norm.weight")).all()
    head = weights.read("lm_head.weight")
    assert not (head == weights.read("embed_tokens.weight")).all()  # untied


def test_a_tied_head_is_the_embedding(tmp_path: Path):
    checkpoint = Checkpoint.open(tiny.make("phi4-mini", tmp_path, tokenizer=False))
    weights = Weights(Stored(checkpoint, DecoderConfig.from_hf(checkpoint.config)), rtn)
    embedding = checkpoint.read("model.embed_tokens.weight")
    for rows in (None, slice(100, 164)):
        expected = embedding[rows] if rows else embedding
        assert (weights.read("lm_head.weight", rows) == expected).all()


def test_slabs_of_rows_make_the_whole_tensor(weights: Weights):
    """A large tensor is quantized slab by slab; the file may not depend on the slabs."""
    grid = get_grid("int4-g32")
    name = "blocks.0.gate_up_proj.weight"
    whole = weights.quantize(name, grid)
    assert whole.shape == (1024, 256)
    slabs = [
        weights.quantize(name, grid, slice(start, start + 300)) for start in range(0, 1024, 300)
    ]
    assert [slab.shape[0] for slab in slabs] == [300, 300, 300, 124]
    assert (np.concatenate([slab.codes for slab in slabs]) == whole.codes).all()
    assert (np.concatenate([slab.decode() for slab in slabs]) == whole.decode()).all()
    error = np.abs(whole.decode() - weights.read(name)).max()
    assert 0 < error < 0.1


@pytest.mark.parametrize(
    ("shape", "most", "step", "at_once"),
    [((3072, 3072), 8 << 20, 32, 2), ((8192, 3072), 4 << 20, 256, 3), ((100, 64), 1 << 20, 32, 2),
     ((1000, 500), 9000, 96, 2), ((5000, 64), 1, 1, 4), ((33, 2048), 1 << 16, 32, 1)],
)  # fmt: skip
def test_slabs_are_equal_and_as_many_for_each_thread(
    weights: Weights, shape: tuple[int, int], most: int, step: int, at_once: int
) -> None:
    slabs = Weights(weights.source, rtn, at_once=at_once).slabs(shape, most, step)
    rows = [index for slab in slabs for index in range(slab.start, slab.stop)]
    assert rows == list(range(shape[0]))
    sizes = [slab.stop - slab.start for slab in slabs]
    assert len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0]
    if len(slabs) > 1:
        held = at_once + 1 if at_once > 1 else 1
        assert sizes[0] % step == 0
        assert sizes[0] == step or sizes[0] * shape[1] * held <= most
        spare = -(-shape[0] // step) - len(slabs)  # closer than the rounding step
        assert len(slabs) % at_once == 0 or sizes[0] > step or spare == 0
    else:
        assert shape[0] * shape[1] <= most


def test_kernels_take_slabs_of_whole_tiles() -> None:
    assert SIDE_BY_SIDE == LANES


def test_slabs_are_read_where_they_are_solved(checkpoint: Checkpoint) -> None:
    """Slabs are packed by the threads that solve them, so that the writing thread only writes."""

    class Watched(Stored):
        def read(self, name: str, rows: slice | None = None) -> Float32:
            readers.add(threading.current_thread())
            return super().read(name, rows)

    readers: set[threading.Thread] = set()
    source = Watched(checkpoint, DecoderConfig.from_hf(checkpoint.config))
    weights, grid = Weights(source, rtn, at_once=2), get_grid("int4-g32")
    name = "blocks.0.gate_up_proj.weight"
    slabs = weights.slabs((1024, 256), 1 << 17)
    codes = list(weights.in_slabs(name, grid, slabs, lambda quantized: quantized.codes))
    assert len(codes) == 8 and threading.main_thread() not in readers
    assert (np.concatenate(codes) == weights.quantize(name, grid).codes).all()


def test_a_source_around_another_is_read_by_one_thread(checkpoint: Checkpoint) -> None:
    """A source that computes its weights is read by one thread."""

    class Doubled(Change):
        def read(self, name: str, rows: slice | None = None) -> Float32:
            readers.add(threading.current_thread())
            return 2 * self.source.read(name, rows)

    readers: set[threading.Thread] = set()
    stored = Stored(checkpoint, DecoderConfig.from_hf(checkpoint.config))
    weights, grid = (
        Weights(Doubled(stored, stored.config, "doubled"), rtn, at_once=2),
        get_grid("int8-g64"),
    )
    name = "blocks.0.gate_up_proj.weight"
    slabs = weights.slabs((1024, 256), 1 << 17)
    parts = list(weights.in_slabs(name, grid, slabs, lambda quantized: quantized.decode()))
    assert readers == {threading.main_thread()}
    assert np.allclose(np.concatenate(parts), 2 * stored.read(name), atol=0.01)


def test_the_solver_gets_rows_and_the_statistics_of_their_input(checkpoint: Checkpoint):
    calls = []

    def solve(weight: Float32, grid: Grid, stats: LayerStats | None) -> Quantized:
        calls.append((weight.shape, weight.dtype, grid.name, stats))
        return grid.quantize(weight)

    config = DecoderConfig.from_hf(checkpoint.config)
    known = LayerStats(1, np.ones(256, np.float32))
    statistics = Statistics.of(config, {"blocks.1.q_proj": known})
    weights = Weights(Stored(checkpoint, config), solve, statistics=statistics)
    grid = get_grid("int8-g64")
    weights.quantize("blocks.1.k_proj.weight", grid, slice(0, 16))
    weights.quantize("blocks.0.k_proj.weight", grid, slice(0, 16))
    Weights(weights.source, solve).quantize("blocks.1.k_proj.weight", grid, slice(0, 16))
    call = ((16, 256), np.float32, "int8-g64")
    assert calls == [(*call, known), (*call, None), (*call, None)]


def test_quantizing_a_nan_is_refused_by_name(tmp_path: Path):
    tiny.make("llama", tmp_path, tokenizer=False)
    file = tmp_path / "model.safetensors"
    raw = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    name = "model.layers.1.mlp.up_proj.weight"
    begin = 8 + length + json.loads(raw[8 : 8 + length])[name]["data_offsets"][0]
    raw[begin : begin + 2] = b"\xc0\x7f"
    file.write_bytes(raw)
    checkpoint = Checkpoint.open(tmp_path)
    weights = Weights(Stored(checkpoint, DecoderConfig.from_hf(checkpoint.config)), rtn)
    with pytest.raises(CheckpointError, match=f"{name} has 1 NaN or Inf"):
        weights.quantize("blocks.1.up_proj.weight", get_grid("int4-g32"))
    weights.quantize("blocks.1.up_proj.weight", get_grid("int4-g32"), slice(1, None))


def test_weights_read_is_what_the_decoder_reads_with(weights: Weights):
    logits = Decoder(weights.config, weights.read).logits([1, 2, 3])
    assert logits.shape == (3, 512)
    assert logits.std() > 1


def test_a_plan_adds_up():
    entries = tuple(PlanEntry(f"w{i}", f"t{i}", "F16", (8, i), 16 * i) for i in (1, 2, 3))
    assert Plan("gguf", "F16", "model", entries).weights_bytes == 96


@pytest.mark.parametrize("format", ["gguf", "onnx", "coreml"])
@pytest.mark.parametrize("family", ["llama3", "phi3", "phi", "mobilellm", "qwen2"])
def test_the_parts_of_a_plan_are_its_entries_in_order(family: str, format: str, tmp_path: Path):
    """A block is one part, and a computed table is in the order of the file."""
    options = {"layer_sharing": True} if family == "mobilellm" else {}
    folder = tiny.make(family, tmp_path, tokenizer=False, num_hidden_layers=4, **options)
    config = DecoderConfig.from_hf(Checkpoint.open(folder).config)
    plan = plan_for(format, config)
    parts = plan.by_part(config)
    assert [entry for entries in parts.values() for entry in entries] == list(plan.entries)
    stored = config.num_hidden_layers // config.block_repeat
    assert list(parts)[:-1] == list(range(stored + 1)) and max(parts) == list(parts)[-1]
    for number, entries in parts.items():
        names = [entry.name for entry in entries if not entry.name.startswith("rope.")]
        numbers = [int(name.split(".")[1]) for name in names if name.startswith("blocks.")]
        blocks = {block // config.block_repeat for block in numbers}
        assert blocks == ({number - 1} if 0 < number <= stored else set())
        if number == 0:
            assert names == ["embed_tokens.weight"]
        elif number > stored:
            assert {name.split(".")[0] for name in names} <= {"norm", "lm_head"}
