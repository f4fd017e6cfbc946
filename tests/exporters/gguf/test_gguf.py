"""GGUF files in llama.cpp, against transformers with the weights that the file decodes to."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import gguf_oracle
import numpy as np
import pytest
import tiny
import torch
from exported import Exports
from transformers import AutoTokenizer
from writing import plan_for, write

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import DecoderConfig
from compress.demo import model_path
from compress.errors import ArtifactError, RuntimeMissingError, UsageError
from compress.formats import get_format
from compress.plan.shapes import Runtime
from compress.plan.weights import Weights
from compress.solvers import rtn
from exporters.gguf import runtime as runtimes
from exporters.gguf import writer
from exporters.gguf.head import Listed, read_head
from exporters.gguf.inspection import describe
from exporters.gguf.runtime import open_runtime

DEMO = model_path()
HELD_OUT = DEMO.parent / "heldout.txt"


@functools.cache
def tokens(family: str) -> list[int]:
    """Tokens of the family's vocabulary, within its window."""
    if family == "demo":
        text = HELD_OUT.read_text(encoding="utf-8")[4000:8000]
        return list(AutoTokenizer.from_pretrained(DEMO)(text)["input_ids"][:128])
    count = 32 if family in ("mistral", "phi3-window") else 96
    return [int(token) for token in np.random.default_rng(0).integers(3, 450, count)]


@functools.cache
def baseline(family: str, source: Path) -> torch.Tensor:
    """transformers' logits of the float checkpoint, which is in ``source``."""
    return logits(tiny.reference(source), tokens(family))


def logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def compare(path: Path, source: Path, ids: list[int]) -> tuple[float, torch.Tensor]:
    """KL(decoded weights in torch || llama.cpp), and the former's logits."""
    expected = logits(gguf_oracle.decoded_model(path, source), ids)
    runtime = open_runtime(path, context=len(ids), threads=1)
    got = runtime.logits(ids)
    runtime.close()
    assert got.shape == expected.shape
    return gguf_oracle.kl_divergence(expected, got), expected


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_at_16_bits(exported: Exports, family: str) -> None:
    source = exported.checkpoint(family)
    kl, decoded = compare(exported("gguf", family, type="F16").path, source, tokens(family))
    # llama.cpp keeps keys, values and activations of F16 products in F16: 1e-6 to 1e-5 here;
    # one row in the wrong place gives 1e-1.
    assert kl < 3e-5
    # bf16 weights survive F16 but for the tiniest, so the file is the checkpoint.
    assert gguf_oracle.kl_divergence(baseline(family, source), decoded) < 1e-9


ARCHITECTURES = ("llama", "phi", "qwen2", "qwen3")  # of llama.cpp; the trained model is phi3


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, "Q4_K_M") for family in tiny.FAMILIES] + [(name, "MXFP4") for name in ARCHITECTURES],
)
def test_every_family_at_4_bits(exported: Exports, family: str, kind: str) -> None:
    source = exported.checkpoint(family)
    kl, decoded = compare(exported("gguf", family, type=kind).path, source, tokens(family))
    # Random weights magnify the noise of 8-bit activations as they do that of 4-bit weights.
    assert kl < 0.03 * gguf_oracle.kl_divergence(baseline(family, source), decoded)


MIXES = (
    "Q4_K_M", "Q4_K_S", "Q5_K_M", "Q3_K_M", "Q3_K_L", "IQ4_XS", "MXFP4", "IQ3_M", "IQ3_XS", "Q8_0",
    "Q4_0",
)  # fmt: skip
PURE = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS", "Q2_K", "Q3_K_S", "Q4_K_S", "Q5_K_S",
    "Q6_K", "MXFP4", "IQ3_S", "IQ3_XXS",
)  # fmt: skip


@pytest.mark.parametrize("kind", [*MIXES, *(f"{kind}-pure" for kind in PURE), "F16", "BF16"])
def test_trained_model_on_every_kind_of_grid(exported: Exports, kind: str) -> None:
    made = exported("gguf", "demo", type=kind)
    kl, decoded = compare(made.path, DEMO, tokens("demo"))
    assert kl < 1e-3  # 1e-4 to 3e-4: llama.cpp quantizes activations to 8 bits
    assert gguf_oracle.kl_divergence(baseline("demo", DEMO), decoded) < 0.5  # Q2_K-pure: 0.36


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),  # q and k biases are permuted too
        ("llama", {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1}),
        ("llama", {"head_dim": 32}),  # heads x head_dim is not the hidden size
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
        ("llama", {"rope_scaling": tiny.YARN}),
        ("qwen2", {"rope_scaling": tiny.YARN | {"attention_factor": 1.0}}),
        ("llama", {"rope_scaling": tiny.YARN | {"beta_slow": 4.0, "truncate": False}}),
        ("qwen3", {"rope_scaling": tiny.YARN}),
        ("phi", {"rope_scaling": tiny.YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}}),
        ("mobilellm", {"layer_sharing": True}),
    ],
)
def test_variants(exported: Exports, family: str, keys: dict[str, Any]) -> None:
    source = exported.checkpoint(family, **keys)
    made = exported.write("gguf", source, {"type": "F16"})
    if "layer_sharing" in keys:
        assert "shared blocks are written 2 times" in made.artifact.notes[0]
        runtime = open_runtime(made.path, context=96, threads=1)
        expected = logits(tiny.reference(source), tokens(family))
        assert gguf_oracle.kl_divergence(expected, runtime.logits(tokens(family))) < 3e-5
        return
    expected = logits(tiny.reference(source), tokens(family))
    kl, decoded = compare(made.path, source, tokens(family))
    assert kl < 3e-5
    # Rows in the wrong order decode and run the same: only a comparison with the checkpoint fails.
    assert gguf_oracle.kl_divergence(expected, decoded) < 1e-9
    if "hidden_size" in keys:
        small = exported.write("gguf", source, {"type": "Q4_K_M"})
        assert {e.grid for e in small.plan.entries} == {"F32", "Q5_0", "Q8_0", "Q4_K", "Q6_K"}
        kl, decoded = compare(small.path, source, tokens(family))
        assert kl < 0.05 * gguf_oracle.kl_divergence(expected, decoded)


def generate(runtime: Runtime, prompt: list[int], count: int, *, cached: bool) -> list[int]:
    """Greedy tokens, with the KV cache or from scratch each time."""
    made: list[int] = []
    if cached:
        runtime.reset()
        last = runtime.feed(prompt)
    for _ in range(count):
        if not cached:
            last = runtime.logits(prompt + made)[-1]
        made.append(int(last.argmax()))
        if cached:
            last = runtime.feed(made[-1:])
    return made


def test_cached_generation_equals_uncached(exported: Exports) -> None:
    runtime = open_runtime(exported("gguf", "demo", type="Q4_K_M").path, context=256, threads=1)
    prompt = tokens("demo")[:40]
    cached = generate(runtime, prompt, 32, cached=True)
    assert cached == generate(runtime, prompt, 32, cached=False)
    assert len(set(cached)) > 4
    runtime.close()
    runtime.close()


def test_long_inputs_go_in_batches(exported: Exports) -> None:
    path = exported("gguf", "llama", type="F16").path
    ids = tokens("llama")[:90]
    whole = open_runtime(path, context=90, threads=1)
    pieces = open_runtime(path, context=90, threads=1, batch=32)
    np.testing.assert_allclose(pieces.logits(ids), whole.logits(ids), atol=0.05)
    pieces.reset()
    np.testing.assert_allclose(pieces.feed(ids), whole.logits(ids)[-1], atol=0.05)
    with pytest.raises(UsageError, match="91 tokens do not fit: the runtime has room for 90"):
        pieces.feed(ids[:1])


def test_longrope_stays_on_the_short_factors(exported: Exports) -> None:
    source = exported.checkpoint("phi3-longrope")
    path = exported("gguf", "phi3-longrope", type="F16").path
    runtime = open_runtime(path, context=2048, threads=1)  # where llama.cpp has the long factors
    ids = tokens("phi3-longrope")
    assert gguf_oracle.kl_divergence(baseline("phi3-longrope", source), runtime.logits(ids)) < 3e-5


@pytest.mark.parametrize("kind", ["Q4_K_M", "F16"])
def test_same_input_same_bytes(exported: Exports, kind: str) -> None:
    again = exported.write("gguf", DEMO, {"type": kind}, name="demo").artifact
    first = exported("gguf", "demo", type=kind).artifact
    assert again.path.name == first.path.name == f"demo-{kind}.gguf"
    assert again.path.read_bytes() == first.path.read_bytes()
    assert again.nbytes == again.path.stat().st_size
    assert again.weights_bytes == again.plan.weights_bytes


def test_rows_go_through_in_slabs(tmp_path: Path) -> None:
    source = tiny.make("llama", tmp_path / "model", vocab_size=16384)  # 4 M weights, 16 MiB
    opened = Checkpoint.open(source)
    config = DecoderConfig.from_hf(opened.config)
    plan = plan_for("gguf", config, {"type": "Q8_0"}, model_name="slabs")
    weights = Weights(Stored(opened, config), rtn)
    whole = write(plan, weights, folder_of(tmp_path, "whole"))

    weights = Weights(Stored(opened, config), rtn, slab=1 << 17)
    seen: list[int] = []
    entry = next(e for e in plan.entries if e.name == "embed_tokens.weight")
    begun = writer.Writer(plan, weights, folder_of(tmp_path, "one"), seen.append)
    tracemalloc.start()
    begun.put(entry)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(seen) == entry.nbytes
    seen.clear()
    assert peak < 16 * (1 << 17)  # a slab as float32 (4 bytes each) and the steps of its encoding
    slabs = write(plan, weights, folder_of(tmp_path, "slabs"), seen.append)
    assert slabs.path.read_bytes() == whole.path.read_bytes()
    assert sum(seen) == plan.weights_bytes
    assert len(seen) > 64


def folder_of(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


@pytest.mark.parametrize(
    ("family", "name"), [("qwen2", "My-Phi-3-killer"), ("llama", "phi3 merge"), ("demo", "model")]
)
def test_names_do_not_trip_llama_cpp(exported: Exports, family: str, name: str) -> None:
    made = exported.write("gguf", exported.checkpoint(family), {"type": "Q8_0"}, name=name)
    runtime = open_runtime(made.path, context=32)
    tokenizer = AutoTokenizer.from_pretrained(exported.checkpoint(family))
    text = "<|user|>\n  Hello <|end|>\n world"
    assert gguf_oracle.tokenize(runtime, text) == tokenizer(text)["input_ids"]


def test_describe(exported: Exports) -> None:
    made = exported("gguf", "llama3", type="Q4_K_M").artifact
    told = describe(made.path)
    assert (told["format"], told["architecture"], told["name"]) == ("gguf", "llama", "llama3")
    config = exported.config("llama3")
    assert told["parameters"] == config.num_parameters
    assert told["bytes"] == made.nbytes
    assert told["bits_per_weight"] == pytest.approx(made.nbytes * 8 / config.num_parameters)
    assert told["metadata"]["general.quantized_by"] == "packlight"
    assert told["metadata"]["tokenizer.ggml.tokens"].endswith("(512)")
    planned = [(e.target_name, list(e.shape), e.grid, e.nbytes) for e in made.plan.entries]
    keys = ("name", "shape", "grid", "bytes")
    assert [tuple(tensor[key] for key in keys) for tensor in told["tensors"]] == planned


BROKEN = {
    "empty": lambda data: b"",
    "another format": lambda data: b"PK\x03\x04" + data[4:],
    "cut in the keys": lambda data: data[:1000],
    "cut in the weights": lambda data: data[:-100_000],
    "a key's name": lambda data: data.replace(b"llama.block_count", b"llama.clock_bount"),
    "a tensor's name": lambda data: data.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"),
    "the version": lambda data: data[:4] + b"\x63" + data[5:],
}


def test_damaged_files_are_refused_and_nothing_crashes(exported: Exports, tmp_path: Path) -> None:
    good = exported("gguf", "llama", type="Q8_0").path.read_bytes()
    for name, damage in BROKEN.items():
        (tmp_path / f"{name}.gguf").write_bytes(damage(good))
    code = """if True:
        import sys
        from pathlib import Path
        from exporters.gguf.runtime import open_runtime
        from compress.errors import ArtifactError
        for path in sorted(Path(sys.argv[1]).glob("*.gguf")):
            try:
                open_runtime(path, context=32)
            except ArtifactError as error:
                print(path.stem, "->", error.message)
    """
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(BROKEN)
    assert str(tmp_path) not in result.stdout
    assert result.stderr == ""
    assert "another format -> another format.gguf is not a GGUF file" in lines
    assert any("not within the file bounds" in line for line in lines)
    assert any("llama.block_count" in line for line in lines)
    assert any("blk.1.attn_q.weight" in line for line in lines)
    assert any("version 99" in line for line in lines)


def test_describe_refuses_what_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(40))
    for path in (tmp_path / "x.gguf", tmp_path / "absent.gguf"):
        with pytest.raises(ArtifactError):
            describe(path)
    with pytest.raises(ArtifactError, match=r"absent\.gguf cannot be read"):
        open_runtime(tmp_path / "absent.gguf", context=32)


def test_describe_refuses_a_file_that_ends_too_early(exported: Exports, tmp_path: Path) -> None:
    data = exported("gguf", "llama", type="Q8_0").path.read_bytes()
    (tmp_path / "short.gguf").write_bytes(data[:-40])  # more than the padding of the last tensor
    with pytest.raises(ArtifactError, match=r"short\.gguf is truncated: output\.weight ends at"):
        describe(tmp_path / "short.gguf")


def test_the_file_says_how_far_llama_cpp_agrees_with_a_windowed_model(exported: Exports) -> None:
    assert describe(exported("gguf", "mistral", type="Q4_K_M").path)["context"] == 32
    told = describe(exported("gguf", "llama", type="Q8_0").path)
    assert (told["context"], told["type"]) == (0, "Q8_0")


def test_without_llama_cpp(exported: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    runtimes.load_library.cache_clear()
    with pytest.raises(RuntimeMissingError, match="is not installed") as caught:
        open_runtime(exported("gguf", "llama", type="Q8_0").path, context=32)
    assert "pip install xllamacpp" in caught.value.hint


def test_llama_cpp_python_is_used_where_it_is_what_there_is(
    exported: Exports, tmp_path: Path
) -> None:
    # The same library, laid out as llama-cpp-python lays out its own; xllamacpp is hidden.
    import xllamacpp

    (library,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    package = tmp_path / "llama_cpp"
    (package / "lib").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "lib" / "libllama.so").symlink_to(library)
    shutil.copytree(tmp_path / "llama_cpp", tmp_path / "again", symlinks=True)
    (tmp_path / "xllamacpp.py").touch()
    path = exported("gguf", "llama", type="Q8_0").path
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from pathlib import Path
        from exporters.gguf.runtime import open_runtime
        runtime = open_runtime(Path({str(path)!r}), context=32)
        print(runtime.name, runtime.vocab_size, runtime.logits([1, 2, 3]).shape)
    """
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.strip() == "llama.cpp (llama-cpp-python unknown version) 512 (3, 512)"


def test_plan_survives_a_round_trip_of_settings(exported: Exports) -> None:
    config = exported.config("demo")
    plan = plan_for("gguf", config, {"type": "q4_k"}, model_name="x")
    again = plan_for("gguf", config, plan.settings, model_name="x")
    assert dataclasses.asdict(plan) == dataclasses.asdict(again)
    assert set(entry.grid for entry in plan.entries) <= set(get_format("gguf").GRIDS)


def test_head_reads_what_gguf_py_reads(exported: Exports) -> None:
    path = exported("gguf", "demo", type="Q3_K_M").path
    keys, rows = read_head(path)
    reader = gguf.GGUFReader(path)
    fields = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert list(keys) == list(fields)
    for key, field in fields.items():
        value = keys[key]
        if isinstance(value, Listed):
            assert value.count == len(field.data)
            assert list(value.first) == field.contents(slice(0, 8))
        else:
            assert value == field.contents()
    assert [(r.name, list(r.shape[::-1]), r.kind) for r in rows] == [
        (t.name, t.shape.tolist(), int(t.tensor_type)) for t in reader.tensors
    ]


@pytest.mark.parametrize(
    "head",
    [
        struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 10**10),  # a key of 10 GB
        struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 10**9),  # a list of empty texts
        struct.pack("<IQQ", 3, 0, 10**9),  # keys without names
    ],
)
def test_a_head_without_end_is_not_read(head: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF" + head)
    os.truncate(file, 20 * 10**9)
    with pytest.raises(ArtifactError, match="damaged or truncated"):
        read_head(file)


def test_damaged_heads_are_refused(exported: Exports, tmp_path: Path) -> None:
    data = exported("gguf", "llama", type="Q8_0").path.read_bytes()
    head = gguf.GGUFReader(exported("gguf", "llama", type="Q8_0").path).data_offset
    file = tmp_path / "cut.gguf"
    for size in (*range(4, 30), 200, 1000, head - 100):
        file.write_bytes(data[:size])
        with pytest.raises(ArtifactError, match="damaged or truncated"):
            read_head(file)
    file.write_bytes(data[:8] + b"\xff" * 16 + data[24:])  # absurd counts
    with pytest.raises(ArtifactError, match="damaged or truncated"):
        read_head(file)
