"""Reading checkpoints: every layout on disk, only the needed bytes, one clear line per damage."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from compress import machine
from compress.checkpoint import safetensors as safetensors_file
from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.checkpoint.save import write_checkpoint
from compress.checkpoint.settle import same_values
from compress.decoder.config import DecoderConfig
from compress.errors import CheckpointError, PacklightError, UsageError
from compress.files import check_unchanged
from compress.plan.job import describe_model

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def refused(action: Callable[[], Any], message: str) -> PacklightError:
    with pytest.raises(CheckpointError) as caught:
        action()
    error = caught.value
    assert message in error.message
    assert "\n" not in error.message + error.hint and len(error.message) < 300
    assert error.exit_code == 2
    return error


def check(folder: Path) -> None:
    """The checks of a build before it reads a weight."""
    describe_model(Checkpoint.open(folder))


def split_file(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join_file(file: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


# --- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_are_those_of_the_safetensors_package(dtype: str, tmp_path: Path):
    from safetensors.torch import load_file

    checkpoint = Checkpoint.open(tiny.make("phi", tmp_path, dtype=dtype, tokenizer=False))
    expected = load_file(tmp_path / "model.safetensors")
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        found = checkpoint.read(name)
        assert found.dtype == np.float32
        assert np.array_equal(found, tensor.float().numpy())
        assert checkpoint.tensors[name].nbytes == tensor.nbytes
        if found.ndim == 2:
            assert np.array_equal(checkpoint.read(name, slice(5, 9)), tensor[5:9].float().numpy())
            assert checkpoint.read(name, slice(9, 5)).shape == (0, found.shape[1])
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_are_the_same_in_chunks_and_threads(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import torch
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    random = torch.Generator().manual_seed(0)
    stored = torch.randn(3001, 1100, generator=random).to(getattr(torch, dtype))
    save_file({NAME: stored}, tmp_path / "model.safetensors")
    checkpoint, values = Checkpoint.open(tmp_path), stored.float().numpy()
    monkeypatch.setattr(machine, "worker_threads", lambda: 3)
    assert values.size > 3 * safetensors_file.PIECE > 3 * 15 * safetensors_file.CHUNK
    assert np.array_equal(checkpoint.read(NAME), values)
    assert np.array_equal(checkpoint.read(NAME, slice(3, 2900)), values[3:2900])


@pytest.mark.parametrize("layout", ["sharded", "pickle", "sharded pickle", "old pickle"])
def test_every_layout_holds_the_same_model(layout: str, llama: Path, tmp_path: Path):
    import torch

    whole = Checkpoint.open(llama)
    shards = 3 if "sharded" in layout else 1
    tiny.make("llama", tmp_path, shards=shards, safetensors="pickle" not in layout)
    if layout == "old pickle":  # before torch 1.6: no zip file, cannot be mapped
        file = tmp_path / "pytorch_model.bin"
        state = torch.load(file, weights_only=True)
        torch.save(state, file, _use_new_zipfile_serialization=False)
    parts = Checkpoint.open(tmp_path)
    assert len({info.file for info in parts.tensors.values()}) == (4 if shards > 1 else 1)
    assert set(parts.tensors) == set(whole.tensors)
    assert parts.nbytes == whole.nbytes
    for name in whole.tensors:
        assert np.array_equal(parts.read(name), whole.read(name))
        assert np.array_equal(parts.read(name, slice(2, 7)), whole.read(name)[2:7])
    assert len(parts.warnings) == ("pickle" in layout)
    assert all("weights_only=True" in warning for warning in parts.warnings)
    check(tmp_path)


def test_a_single_file_wins_over_an_index_as_in_transformers(copy: Path):
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    check(copy)


def test_threads_that_read_slabs_unpickle_a_shard_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    torch = pytest.importorskip("torch")
    names = ["model.layers.0.mlp.down_proj.weight", NAME]
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for index, (name, file) in enumerate(zip(names, files, strict=True)):
        torch.save({name: torch.full((64, 8), index + 1.0)}, tmp_path / file)
    weight_map = {"weight_map": dict(zip(names, files, strict=True))}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(weight_map))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = Checkpoint.open(tmp_path)
    loads: list[Path] = []
    real = torch.load

    def load(file: Path, **options: Any) -> Any:
        loads.append(file)
        time.sleep(0.05)  # so that the other threads arrive meanwhile
        return real(file, **options)

    monkeypatch.setattr(torch, "load", load)
    for index in (0, 1, 0):
        loads.clear()
        with ThreadPoolExecutor(4) as pool:
            parts = [slice(start, start + 16) for start in range(0, 64, 16)]
            slabs = list(pool.map(partial(checkpoint.read, names[index]), parts))
        assert (np.concatenate(slabs) == index + 1).all()
        assert len(loads) == 1


def test_pickled_shards_are_held_one_at_a_time(tmp_path: Path):
    checkpoint = Checkpoint.open(tiny.make("llama", tmp_path, shards=3, safetensors=False))
    for name, info in checkpoint.tensors.items():
        checkpoint.read(name)
        last = checkpoint.pickles._last
        assert last is not None and last[0] == info.file


# --- only the requested bytes are read ----------------------------------------------------------


def bytes_read() -> int:
    """Bytes that this process has read by system calls."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def test_reading_a_tensor_touches_no_other_byte(copy: Path):
    """If all tensors but one are NaN, that one can be read, and the others cannot."""
    file = copy / "model.safetensors"
    expected = Checkpoint.open(copy).read(NAME)
    header, data = split_file(file)
    begin, end = header[NAME]["data_offsets"]
    join_file(file, header, b"\xff" * begin + data[begin:end] + b"\xff" * (len(data) - end))
    checkpoint = Checkpoint.open(copy)
    assert np.array_equal(checkpoint.read(NAME), expected)
    assert np.array_equal(checkpoint.read(NAME, slice(17, 40)), expected[17:40])
    for name in set(checkpoint.tensors) - {NAME}:
        refused(lambda name=name: checkpoint.read(name), f"{name} has ")


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts reads as Linux does")
def test_a_row_of_a_huge_tensor_costs_a_row(tmp_path: Path):
    """A sparse file of 256 GiB: reading more than the requested rows would not return."""
    rows, columns = 2**25, 2**12
    size = rows * columns * 2
    header = {"huge": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, size]}}
    file = tmp_path / "model.safetensors"
    join_file(file, header, b"")
    (tmp_path / "config.json").write_text("{}")
    start = file.stat().st_size
    row = np.linspace(-1, 1, columns, dtype=np.float32)
    with file.open("r+b") as stream:
        try:
            stream.truncate(start + size)
        except OSError:
            pytest.skip("the file system has no files of this size")
        stream.seek(start + 123_456 * columns * 2)
        stream.write((row.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    before = bytes_read()
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.nbytes == size
    found = checkpoint.read("huge", slice(123_456, 123_458))
    assert bytes_read() - before < 100_000
    assert np.abs(found[0] - row).max() < 0.01
    assert not found[1].any()


def test_fingerprint_names_the_weights_and_the_config(copy: Path):
    first = Checkpoint.open(copy).fingerprint()
    assert first == Checkpoint.open(copy).fingerprint()
    file = copy / "model.safetensors"
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    second = Checkpoint.open(copy).fingerprint()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    assert len({first, second, Checkpoint.open(copy).fingerprint()}) == 3


def test_tokenizer_files(llama: Path):
    names = [file.name for file in Checkpoint.open(llama).tokenizer_files()]
    assert {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"} <= set(names)


# --- refusals: the model and its config ---------------------------------------------------------


def test_missing_tensors(copy: Path):
    file = copy / "model.safetensors"
    header, data = split_file(file)
    for name in (NAME, "model.norm.weight"):
        del header[name]
    join_file(file, header, data)
    error = refused(lambda: check(copy), f"2 tensor(s) missing from the checkpoint, first '{NAME}'")
    assert "never fills in" in error.hint


def test_a_missing_head_is_never_made_up(tmp_path: Path):
    """MobileLLM read as an untied llama would get a random head from transformers."""
    tiny.make("mobilellm", tmp_path, tokenizer=False)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"share_embedding": False, "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    error = refused(lambda: check(tmp_path), "first 'lm_head.weight'")
    assert "tie_word_embeddings" in error.hint


def test_unexpected_tensors(copy: Path):
    file = copy / "model.safetensors"
    header, data = split_file(file)
    header["model.layers.0.self_attn.q_proj.gate"] = header.pop(NAME)
    header[NAME] = header["model.layers.0.self_attn.q_proj.gate"]
    join_file(file, header, data)
    refused(lambda: check(copy), "1 tensor(s) that a llama model does not have, first 'model.lay")


def test_what_transformers_ignores_is_ignored(tmp_path: Path):
    tiny.make("llama3", tmp_path, tokenizer=False)
    file = tmp_path / "model.safetensors"
    header, data = split_file(file)
    header["lm_head.weight"] = header["model.embed_tokens.weight"]  # a tied head, stored again
    header["model.layers.0.self_attn.rotary_emb.inv_freq"] = header["model.norm.weight"]
    join_file(file, header, data)
    check(tmp_path)


# --- one matrix, two names ----------------------------------------------------------------------


def retensor(folder: Path, change: Callable[[dict[str, Any]], None]) -> Checkpoint:
    """A checkpoint of one file, its tensors changed."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make("mobilellm", tmp_path_factory.mktemp("tied"), tokenizer=False)


@pytest.fixture
def tied_copy(tied: Path, tmp_path: Path) -> Path:
    for file in tied.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_stored_head_that_equals_the_embedding_is_ignored(dtype: str, tied_copy: Path):
    import torch

    kind = getattr(torch, dtype)
    checkpoint = retensor(
        tied_copy, lambda t: t.update({"lm_head.weight": t[EMBEDDING].to(kind).clone()})
    )
    assert describe_model(checkpoint).tie_word_embeddings
    assert describe_model(checkpoint).tie_word_embeddings  # a second look finds the same
    assert not checkpoint.warnings


@pytest.mark.parametrize("row", [0, 511])
def test_a_head_that_differs_is_built_untied(row: int, tied_copy: Path):
    def own_head(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
        tensors["lm_head.weight"][row, 255] += 1

    checkpoint = retensor(tied_copy, own_head)
    for slab in (256 * 100, 1 << 20):  # several, the last one smaller
        assert not same_values(checkpoint, "lm_head.weight", EMBEDDING, slab)
        assert same_values(checkpoint, "lm_head.weight", "lm_head.weight", slab)
    config = describe_model(checkpoint)
    assert not config.tie_word_embeddings
    assert "lm_head.weight differs" in checkpoint.warnings[0]
    source = Stored(checkpoint, config)
    head, embedding = source.read("lm_head.weight"), source.read("embed_tokens.weight")
    assert np.argwhere(head != embedding).tolist() == [[row, 255]]
    # A checkpoint that is written again has the head, too.
    (tied_copy / "again").mkdir()
    write_checkpoint(source, tied_copy / "again")
    again = Checkpoint.open(tied_copy / "again")
    assert not describe_model(again).tie_word_embeddings and not again.warnings


def test_a_head_of_another_shape_is_refused(tied_copy: Path):
    checkpoint = retensor(
        tied_copy, lambda t: t.update({"lm_head.weight": t[EMBEDDING][:500].clone()})
    )
    refused(lambda: describe_model(checkpoint), "lm_head.weight has shape [500, 256]")


@pytest.mark.parametrize("pickled", [False, True])
def test_a_tied_matrix_under_the_name_of_the_head_is_read(pickled: bool, tied_copy: Path):
    expected = Checkpoint.open(tied_copy).read(EMBEDDING)
    checkpoint = retensor(tied_copy, lambda t: t.update({"lm_head.weight": t.pop(EMBEDDING)}))
    if pickled:
        import torch
        from safetensors.torch import load_file

        file = tied_copy / "model.safetensors"
        torch.save(load_file(file), tied_copy / "pytorch_model.bin")
        file.unlink()
        checkpoint = Checkpoint.open(tied_copy)
    config = describe_model(checkpoint)
    assert config.tie_word_embeddings
    assert "stored as lm_head.weight" in checkpoint.warnings[-1]
    source = Stored(checkpoint, config)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        assert np.array_equal(source.read(name), expected)
        assert np.array_equal(source.read(name, slice(3, 9)), expected[3:9])


# --- names and types of tensors that are no weights ---------------------------------------------


def test_buffers_are_left_out_and_a_foreign_rope_table_is_told(copy: Path):
    import torch

    def buffers(tensors: dict[str, Any]) -> None:
        at = "model.layers.0.self_attn."
        tensors[at + "rotary_emb.inv_freq"] = torch.ones(32, dtype=torch.float64)
        tensors[at + "bias"] = torch.ones(8, 8, dtype=torch.bool)
        tensors[at + "masked_bias"] = torch.tensor(-1e4)
        tensors["model.embeddings.position_ids"] = torch.arange(8)

    checkpoint = retensor(copy, buffers)
    describe_model(checkpoint)
    assert not checkpoint.warnings
    right = describe_model(checkpoint).ropes[0].inverse_frequencies()
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    checkpoint = retensor(copy, lambda t: t.update({name: torch.tensor(right).to(torch.bfloat16)}))
    describe_model(checkpoint)
    assert not checkpoint.warnings
    checkpoint = retensor(copy, lambda t: t.update({name: t[name] / 2}))
    describe_model(checkpoint)
    assert "inv_freq' differs" in checkpoint.warnings[0]


@pytest.mark.parametrize(
    ("dtype", "hint"), [("bool", "buffer"), ("int64", "buffer"), ("float64", "float32"),
                        ("int32", "quantized"), ("int8", "quantized")]
)  # fmt: skip
def test_numbers_that_no_weight_has_are_named(dtype: str, hint: str, copy: Path):
    import torch

    with pytest.raises(CheckpointError, match="extra") as caught:
        retensor(copy, lambda t: t.update(extra=torch.ones(4).to(getattr(torch, dtype))))
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("rename", "told"),
    [
        (lambda name: f"_orig_mod.{name}", "'_orig_mod.', which torch.compile"),
        (lambda name: name.replace("layers.0.", "layers.0._orig_mod."), "'_orig_mod.', which"),
        (lambda name: f"module.{name}", "'module.', which DistributedDataParallel"),
        (lambda name: f"base_model.model.{name}", "a PEFT adapter"),
        (lambda name: name.removeprefix("model."), "lack the prefix 'model.'"),
        (lambda name: f"model.{name}", "begin with the prefix 'model.model.'"),
        (lambda name: f"language_model.{name}", "the prefix 'language_model.model.'"),
        (lambda name: name.replace("q_proj.weight", "q_proj.lora_A.weight"), "LoRA weights"),
    ],
)  # fmt: skip
def test_names_that_a_wrapper_left_are_explained(
    rename: Callable[[str], str], told: str, copy: Path
):
    def renamed(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    checkpoint = retensor(copy, renamed)
    refused(lambda: describe_model(checkpoint), told)


# --- folders that are no checkpoint -------------------------------------------------------------


@pytest.mark.parametrize("configured", [False, True])
def test_an_adapter_is_called_one(configured: bool, copy: Path):
    (copy / "model.safetensors").rename(copy / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "some/base"}
    (copy / "adapter_config.json").write_text(json.dumps(adapter))
    if not configured:
        (copy / "config.json").unlink()
    error = refused(lambda: Checkpoint.open(copy), "is a LoRA adapter of some/base, not a model")
    assert error.hint == f"packlight build some/base --adapter {copy}"


@pytest.mark.parametrize(
    ("names", "told", "hint"),
    [
        (["model-00001-of-00001.safetensors"], "'model-00001-of-00001.safetensors', but its index",
         "rename it to model.safetensors"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
         "and 1 more, but its index is missing", "model.safetensors.index.json"),
        (["pytorch_model-00001-of-00003.bin"], "its index is missing",
         "pytorch_model.bin.index.json"),
        (["weights.safetensors"], "not model.safetensors", "rename it"),
        (["consolidated.00.pth"], "'consolidated.00.pth', a pickle of another layout", "save_pre"),
    ],
)  # fmt: skip
def test_weights_under_other_names_are_named(names: list[str], told: str, hint: str, copy: Path):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").unlink()
    for name in names:
        (copy / name).write_bytes(data)
    assert hint in refused(lambda: Checkpoint.open(copy), told).hint


def test_a_file_given_as_the_model_is_named(copy: Path):
    import torch

    (copy / "some.gguf").write_bytes(b"GGUF" + bytes(20))
    torch.save({}, copy / "some.pt")
    for name, told in (
        ("some.gguf", "is a GGUF file"),
        ("some.pt", "is a pickle"),
        ("model.safetensors", "is not a folder, but one file of a checkpoint"),
        ("tokenizer.json", "is not a folder with a checkpoint"),
    ):
        with pytest.raises(UsageError, match=told) as caught:
            Checkpoint.open(copy / name)
        assert caught.value.hint


@pytest.mark.parametrize(
    ("files", "told", "hint"),
    [
        (["report.json", "plan.json", "gguf/a.gguf"], "is a build of packlight", "verify"),
        (["model_index.json", "unet/config.json"], "a pipeline of diffusers", ""),
        (["config.json", "onnx/model_q4.onnx"], "its weights in 'onnx/model_q4.onnx'", "from_tf"),
        (["checkpoint-500/config.json", "checkpoint-1000/config.json", "checkpoint-60/config.json"],
         "config.json is missing", "'checkpoint-1000'"),
        (["config.json", "model.safetensors.incomplete"], "no weights in", "unfinished download"),
        (["config.json", "m.mlpackage/Manifest.json"], "is a Core ML package", ""),
        (["refs/main", "snapshots/abc/config.json"], "config.json is missing", "'snapshots/abc'"),
    ],
)  # fmt: skip
def test_folders_that_hold_something_else(
    files: list[str], told: str, hint: str, copy: Path, tmp_path: Path
):
    for name in files:
        (tmp_path / "z" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "z" / name).write_text((copy / "config.json").read_text())
    assert hint in refused(lambda: Checkpoint.open(tmp_path / "z"), told).hint


@pytest.mark.parametrize(
    ("text", "hint"),
    [("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
     ("\n<!DOCTYPE html><html>", "a web page"), ("{", "")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_often_is_in_the_place_of_json(name: str, text: str, hint: str, copy: Path):
    (copy / name).write_text(text)
    found = refused(lambda: Checkpoint.open(copy), f"{name} cannot be read: not valid JSON").hint
    assert hint in found and bool(hint) == bool(found)


def test_a_package_of_core_ml(copy: Path):
    package = copy.rename(copy.with_suffix(".mlpackage"))
    (package / "config.json").unlink()
    refused(lambda: Checkpoint.open(package), "is a Core ML package")


# --- the rest of the headers --------------------------------------------------------------------


def test_a_shape_that_disagrees_with_the_config(copy: Path):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 576}))
    refused(lambda: check(copy), "has shape [512, 256], but config.json makes it [576, 256]")


def test_nan_and_infinity(copy: Path):
    file = copy / "model.safetensors"
    header, data = split_file(file)
    begin, end = header[NAME]["data_offsets"]
    for pattern in (b"\xc0\x7f", b"\x80\x7f", b"\x80\xff"):  # bfloat16 NaN, Inf, -Inf
        for at in (begin, end - 2):
            join_file(file, header, data[:at] + pattern + data[at + 2 :])
            checkpoint = Checkpoint.open(copy)
            refused(lambda c=checkpoint: c.read(NAME), f"{NAME} has 1 NaN or Inf value(s)")
    both = data[:begin] + b"\x80\x7f\x80\xff" + data[begin + 4 :]  # whose sum is NaN, not Inf
    join_file(file, header, both)
    refused(lambda: Checkpoint.open(copy).read(NAME), f"{NAME} has 2 NaN or Inf value(s)")


def test_every_bfloat16_is_known_as_finite_or_not(tmp_path: Path, monkeypatch):
    """All 65,536 values: the finite ones in one check, each of the others among finite numbers of
    both signs."""
    every = np.arange(1 << 16, dtype="<u2")
    floats = (every.astype(np.uint32) << 16).view(np.float32)
    finite = np.isfinite(floats)
    assert finite.sum() == (1 << 16) - 2 * 128
    others = [pattern for other in every[~finite] for pattern in (0x3F80, other, 0xBF80)]
    header = {
        name: {"dtype": "BF16", "shape": list(shape), "data_offsets": [2 * begin, 2 * end]}
        for name, shape, begin, end in (("finite", (65280,), 0, 65280),
                                        ("others", (256, 3), 65280, 65280 + 768))
    }  # fmt: skip
    file = tmp_path / "model.safetensors"
    join_file(file, header, np.array([*every[finite], *others], "<u2").tobytes())
    tensors = safetensors_file.scan_safetensors(file)
    for row in range(256):
        with pytest.raises(CheckpointError, match=r"others has 1 NaN or Inf value\(s\)"):
            safetensors_file.read_range(tensors["others"], row, 3)
    monkeypatch.delattr(safetensors_file, "check_finite")  # that looks at each number
    found = safetensors_file.read_range(tensors["finite"], 0, 65280)
    assert found.tobytes() == floats[finite].tobytes()


def test_large_finite_values_are_no_infinity(copy: Path):
    file = copy / "model.safetensors"
    header, data = split_file(file)
    begin, end = header[NAME]["data_offsets"]
    huge = b"\x7f\x7f" * ((end - begin) // 2)  # 3.39e38, whose float32 sum overflows
    join_file(file, header, data[:begin] + huge + data[end:])
    assert Checkpoint.open(copy).read(NAME).min() > 3e38


# --- refusals: files ----------------------------------------------------------------------------


def test_truncated_shard(copy: Path):
    file = copy / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1])
    refused(lambda: Checkpoint.open(copy), "model.safetensors is truncated: ")
    for size in (len(raw) - 100_000, 5000, 100, 8, 7, 0):
        file.write_bytes(raw[:size])
        refused(lambda: Checkpoint.open(copy), "truncated")


def test_truncated_after_opening(copy: Path):
    checkpoint = Checkpoint.open(copy)
    file = copy / "model.safetensors"
    last = max(checkpoint.tensors.values(), key=lambda info: info.offset)
    os.truncate(file, file.stat().st_size - 2)
    refused(lambda: checkpoint.read(last.name), f"is truncated inside {last.name}")
    file.unlink()
    refused(lambda: checkpoint.read(last.name), "cannot be read: No such file")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'{"x": 1}',
        b'{"x": {"dtype": "BF16", "shape": [1]}}',
        b'{"x": {"dtype": "BF16", "shape": 1, "data_offsets": [0, 2]}}',
        b'{"x": {"dtype": "BF16", "shape": [1], "data_offsets": [0]}}',
        b'{"x": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2, 4]}}',
        b'{"x": {"dtype": "BF16", "shape": [1], "data_offsets": ["0", "2"]}}',
        b'{"x": {"dtype": "BF16", "shape": [1.0], "data_offsets": [0, 2]}}',
        b'{"x": {"dtype": "BF16", "shape": [true], "data_offsets": [0, 2]}}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_damaged_header(header: bytes, copy: Path):
    join_file(copy / "model.safetensors", header, b"\0" * 64)
    refused(lambda: Checkpoint.open(copy), "model.safetensors has a damaged header")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "BF16", "shape": [2], "data_offsets": [0, 2]},
        {"dtype": "BF16", "shape": [1], "data_offsets": [4, 2]},
        {"dtype": "BF16", "shape": [1], "data_offsets": [-2, 0]},
        {"dtype": "BF16", "shape": [-1, -1], "data_offsets": [0, 2]},
    ],
)
def test_byte_ranges_that_lie(entry: dict[str, Any], copy: Path):
    join_file(copy / "model.safetensors", {"x": entry}, b"\0" * 64)
    refused(lambda: Checkpoint.open(copy), "'x' has a wrong byte range")


def test_not_a_float_checkpoint(copy: Path):
    for dtype, size in (("F8_E4M3", 1), ("I32", 4), ("U8", 1), ("F64", 8)):
        entry = {"dtype": dtype, "shape": [4], "data_offsets": [0, 4 * size]}
        join_file(copy / "model.safetensors", {"x": entry}, b"\0" * 64)
        error = refused(lambda: Checkpoint.open(copy), f"has dtype {dtype!r}, not F32, F16 or BF16")
        assert ("float32" if dtype == "F64" else "quantized") in error.hint


def test_hostile_names_stay_on_one_line(copy: Path):
    name = "\x1b[31m\n" + "x" * 1000
    for entry in (
        {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": name, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 5]},
        {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]},
    ):
        join_file(copy / "model.safetensors", {name: entry}, b"\0" * 64)
        error = refused(lambda: Checkpoint.open(copy), "model.safetensors")
        assert "\x1b" not in error.message
    for config in ({"architectures": [name]}, {"architectures": ["\x1b[31m"]}):
        with pytest.raises(PacklightError) as caught:
            DecoderConfig.from_hf(config)
        assert "\x1b" not in caught.value.message and len(caught.value.message) < 200


def test_git_lfs_pointer(copy: Path):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
    (copy / "model.safetensors").write_text(text)
    error = refused(lambda: Checkpoint.open(copy), "is not a safetensors file")
    assert "git lfs pull" in error.hint


def with_index(folder: Path, weight_map: Any) -> Path:
    file = folder / "model.safetensors"
    if file.exists():
        file.rename(folder / "part.safetensors")
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    "shard", ["../part.safetensors", "/etc/passwd", "a/../part.safetensors", "..", "", "."]
)
def test_an_index_that_points_outside(shard: str, copy: Path):
    with_index(copy, {NAME: shard})
    refused(lambda: Checkpoint.open(copy), "model.safetensors.index.json points outside the folder")


@pytest.mark.parametrize("shard", [".part.safetensors", ".a/part.safetensors"])
def test_an_index_that_names_hidden_files(shard: str, copy: Path, tmp_path_factory):
    with_index(copy, {NAME: shard})
    outside = tmp_path_factory.mktemp("outside") / "part.safetensors"
    (copy / "part.safetensors").rename(outside)
    (copy / shard).parent.mkdir(exist_ok=True)
    (copy / shard).symlink_to(outside)
    refused(lambda: Checkpoint.open(copy), "model.safetensors.index.json names a hidden file")


def test_an_index_that_names_subfolders(copy: Path, tmp_path_factory: pytest.TempPathFactory):
    outside = tmp_path_factory.mktemp("outside")
    names = list(Checkpoint.open(copy).tensors)
    with_index(copy, dict.fromkeys(names, "a/b/part.safetensors"))
    (copy / "a" / "b").mkdir(parents=True)
    shard = (copy / "part.safetensors").rename(copy / "a" / "b" / "part.safetensors")
    check(copy)
    opened = Checkpoint.open(copy).opened
    assert shard in opened
    check_unchanged(opened)
    os.utime(shard, (1, 1))
    refused(lambda: check_unchanged(opened), "part.safetensors has changed since it was opened")
    elsewhere = shard.rename(outside / "part.safetensors")
    shard.symlink_to(elsewhere)
    refused(lambda: Checkpoint.open(copy), "part.safetensors is a link that leads out")
    shard.unlink()
    elsewhere.rename(shard)
    (copy / "a").rename(outside / "a")
    (copy / "a").symlink_to(outside / "a")
    refused(lambda: Checkpoint.open(copy), "a is a link that leads out of the checkpoint's folder")


def test_options_of_the_hub_with_a_folder_are_told(copy: Path):
    found = Checkpoint.open(copy, token="hf_secret", cache_dir="x")
    told = f"--token and --cache-dir of the Hub: not used, {copy} is a local folder"
    assert found.warnings == [told]


def test_an_index_that_does_not_fit(copy: Path):
    names = list(Checkpoint.open(copy).tensors)
    with_index(copy, dict.fromkeys(names, "part.safetensors"))
    check(copy)
    with_index(copy, dict.fromkeys(names, "part.safetensors") | {"x": "lost.safetensors"})
    error = refused(lambda: Checkpoint.open(copy), "'lost.safetensors' is missing")
    assert "finish the download" in error.hint
    with_index(copy, dict.fromkeys([*names, "x"], "part.safetensors"))
    refused(lambda: Checkpoint.open(copy), "places 'x' in 'part.safetensors', it is not there")
    with_index(copy, dict.fromkeys(names[1:], "part.safetensors"))
    check(copy)  # not in the index but in the shard: the weight is there
    for wrong in ({}, [], None, 7):
        with_index(copy, wrong)
        refused(lambda: Checkpoint.open(copy), "has no weight_map")
    with_index(copy, {NAME: None})
    refused(lambda: Checkpoint.open(copy), "'None' is missing")


def test_a_tensor_in_two_shards_is_read_where_the_index_says(copy: Path):
    names = list(Checkpoint.open(copy).tensors)
    header, data = split_file(copy / "model.safetensors")
    with_index(copy, dict.fromkeys(names, "part.safetensors") | {NAME: "other.safetensors"})
    join_file(copy / "other.safetensors", {NAME: header[NAME]}, b"\0" * len(data))
    assert not Checkpoint.open(copy).read(NAME).any()
    assert Checkpoint.open(copy).tensors[NAME].file.name == "other.safetensors"


def test_no_weights_and_no_config(copy: Path):
    (copy / "model.safetensors").unlink()
    refused(lambda: Checkpoint.open(copy), "no weights in")
    (copy / "model.safetensors").mkdir()
    refused(lambda: Checkpoint.open(copy), "no weights in")
    (copy / "config.json").write_text("[]")
    refused(lambda: Checkpoint.open(copy), "config.json is not a JSON object")
    (copy / "config.json").unlink()
    refused(lambda: Checkpoint.open(copy), "config.json is missing")


@pytest.mark.parametrize(
    "model", ["./nowhere", "/nowhere/at/all", "~nobody/model", "nowhere", "a/b/c", "~", "no\0name"]
)
def test_not_a_folder(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="is not a folder with a checkpoint") as caught:
        Checkpoint.open(model)
    assert "Hub id" in caught.value.hint


def test_a_file_is_not_a_folder(llama: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(llama.parent)
    with pytest.raises(UsageError, match="is not a folder"):
        Checkpoint.open(f"{llama.name}/config.json")


# --- pickles ------------------------------------------------------------------------------------


class Payload:
    """A pickle that writes a file when it is executed."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.target),))


def test_code_in_a_pickle_is_refused_and_not_run(copy: Path):
    import torch

    (copy / "model.safetensors").unlink()
    target = copy / "executed"
    bad = {"model.norm.weight": torch.zeros(4), "x": Payload(target)}
    file = copy / "pytorch_model.bin"
    for zipped in (True, False):
        torch.save(bad, file, _use_new_zipfile_serialization=zipped)
        error = refused(lambda: Checkpoint.open(copy), "unpickling code is never run")
        assert "safetensors" in error.hint
    file.write_bytes(pickle.dumps(bad, protocol=2))
    refused(lambda: Checkpoint.open(copy), "pytorch_model.bin ")
    assert not target.exists()
    pickle.loads(pickle.dumps(bad["x"]))  # the payload works: only the refusal prevented it
    assert target.exists()


def test_damaged_pickles(copy: Path):
    import torch

    (copy / "model.safetensors").unlink()
    file = copy / "pytorch_model.bin"
    torch.save({"model.norm.weight": torch.zeros(100_000)}, file)
    whole = file.read_bytes()
    for size in (len(whole) - 5000, 1000, 10, 0):
        file.write_bytes(whole[:size])
        refused(lambda: Checkpoint.open(copy), "pytorch_model.bin ")
    for state, message in (
        ([torch.zeros(3)], "holds no table of tensors"),
        ({"state_dict": {"x": torch.zeros(3)}}, "'state_dict' is dict, not a float tensor"),
        ({"x": torch.zeros(3, dtype=torch.int32)}, "'x' is torch.int32, not a float tensor"),
        ({"x": torch.zeros(3).to_sparse()}, "'x' is torch.float32, not a float tensor"),
    ):
        torch.save(state, file)
        refused(lambda: Checkpoint.open(copy), message)


def test_a_compressed_archive_is_not_unpacked(copy: Path):
    import torch

    (copy / "model.safetensors").unlink()
    torch.save({"model.norm.weight": torch.zeros(100_000)}, copy / "stored")
    with (
        zipfile.ZipFile(copy / "stored") as stored,
        zipfile.ZipFile(copy / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))
    refused(lambda: Checkpoint.open(copy), "pytorch_model.bin is compressed")


def test_urls_are_opened_through_fsspec(tmp_path, monkeypatch):
    """A folder behind a URL is copied to the cache; file:// is the folder itself."""
    from compress.checkpoint.remote import open_url

    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    folder = tiny.make("llama", tmp_path / "tiny-llama")
    fs, root = open_url("memory://bucket/tiny-llama")
    fs.makedirs(root)
    for path in folder.iterdir():
        fs.put_file(str(path), f"{root}/{path.name}")
    local, remote = Checkpoint.open(folder), Checkpoint.open("memory://bucket/tiny-llama")
    assert remote.source == "memory://bucket/tiny-llama"
    assert remote.tensors.keys() == local.tensors.keys()
    name = next(iter(local.tensors))
    np.testing.assert_array_equal(remote.read(name), local.read(name))
    assert Checkpoint.open(f"file://{folder}").path == folder
