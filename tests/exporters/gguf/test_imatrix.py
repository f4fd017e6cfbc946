"""llama.cpp's imatrix files: written by its loader's rules, read back, and refused when wrong."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny

from compress.calibration.statistics import LayerStats, Statistics, input_names
from compress.checkpoint.checkpoint import read_json
from compress.decoder.config import DecoderConfig
from compress.errors import ArtifactError
from exporters.gguf.imatrix import read_imatrix, write_imatrix


def config_of(family: str, folder: Path, **settings: object) -> DecoderConfig:
    tiny.make(family, folder, tokenizer=False, **settings)
    return DecoderConfig.from_hf(read_json(folder / "config.json"))


def statistics_of(config: DecoderConfig) -> tuple[Statistics, dict[str, LayerStats]]:
    draw = np.random.default_rng(0)
    stats = {}
    for key in input_names(config):
        width = config.weight_shape(key.rpartition(".")[2])[1]
        stats[key] = LayerStats(960, draw.lognormal(0, 1, width).astype(np.float32))
    return Statistics.of(config, stats), stats


@pytest.mark.parametrize("family", ["llama", "phi3", "phi", "qwen3", "mobilellm"])
def test_what_was_written_is_read_back(family, tmp_path):
    settings = {"layer_sharing": True} if family == "mobilellm" else {}
    config = config_of(family, tmp_path / "model", **settings)
    statistics, stats = statistics_of(config)
    write_imatrix(tmp_path / "a.gguf", config, statistics)
    found = read_imatrix(tmp_path / "a.gguf", config)
    for key, entry in stats.items():
        again = found.for_weight(f"{key}.weight")
        assert again.count == 960
        np.testing.assert_allclose(again.importance, entry.importance, rtol=1e-6)
    write_imatrix(tmp_path / "b.gguf", config, statistics)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_the_file_is_as_llama_cpp_wants_it(tmp_path):
    """The rules of common/imatrix-loader.cpp, and of llama-quant.cpp about sizes."""
    config = config_of("phi3", tmp_path / "model")
    statistics, stats = statistics_of(config)
    write_imatrix(tmp_path / "a.gguf", config, statistics)
    reader = gguf.GGUFReader(str(tmp_path / "a.gguf"))
    assert reader.fields["general.type"].contents() == "imatrix"
    for name in ("imatrix.chunk_count", "imatrix.chunk_size"):
        assert reader.fields[name].types == [gguf.GGUFValueType.UINT32]
    assert reader.fields["imatrix.chunk_size"].contents() == 960
    datasets = reader.fields["imatrix.datasets"]
    assert datasets.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 for t in tensors.values())
    assert all(len(name) < 64 for name in tensors)
    sums = sorted(name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2"))
    counts = sorted(name.removesuffix(".counts") for name in tensors if name.endswith(".counts"))
    assert sums == counts
    # phi3 is fused in GGUF: these are the matrices that llama-quantize looks up.
    roles = ("attn_output", "attn_qkv", "ffn_down", "ffn_up")
    assert sums == [*(f"blk.{i}.{role}.weight" for i in (0, 1) for role in roles), "output.weight"]
    down = tensors["blk.1.ffn_down.weight.in_sum2"]
    assert list(down.shape) == [config.intermediate_size, 1]
    importance = down.data.reshape(-1) / tensors["blk.1.ffn_down.weight.counts"].data.item()
    np.testing.assert_allclose(importance, stats["blocks.1.down_proj"].importance, rtol=1e-6)


def test_a_file_with_unfused_phi3_names_and_without_a_head(tmp_path):
    config = config_of("phi3", tmp_path / "model")
    write_file(tmp_path / "a.gguf", {
        f"blk.{i}.{role}.weight": np.full((1, 512 if role == "ffn_down" else 256), i + 2.0, "f4")
        for i in (0, 1)
        for role in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down")
    })  # fmt: skip
    found = read_imatrix(tmp_path / "a.gguf", config)
    assert (found.for_weight("blocks.1.qkv_proj.weight").importance == 0.5).all()
    assert found.for_weight("blocks.0.v_proj.weight").count == 6
    assert found.for_weight("lm_head.weight") is None


def write_file(path: Path, sums: dict[str, np.ndarray], kind: str = "imatrix") -> None:
    writer = gguf.GGUFWriter(str(path), "")
    writer.add_type(kind)
    for name, values in sums.items():
        writer.add_tensor(f"{name}.in_sum2", values)
        writer.add_tensor(f"{name}.counts", np.full((1, 1), 6, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_other_files_are_refused(tmp_path):
    config = config_of("llama", tmp_path / "model")
    path = tmp_path / "a.gguf"
    with pytest.raises(ArtifactError, match="does not exist"):
        read_imatrix(path, config)
    path.write_bytes(b"\x02\x00\x00\x00 an old imatrix.dat")
    with pytest.raises(ArtifactError, match="cannot be read as an imatrix") as caught:
        read_imatrix(path, config)
    assert "--output-format gguf" in caught.value.hint
    write_file(path, {"blk.0.attn_q.weight": np.ones((1, 256), "f4")}, kind="model")
    with pytest.raises(ArtifactError, match="no imatrix"):
        read_imatrix(path, config)
    write_file(path, {"blk.0.attn_q.weight": np.ones((1, 256), "f4")})
    with pytest.raises(ArtifactError, match=r"has no blk\.0\.attn_output\.weight"):
        read_imatrix(path, config)
    write_file(path, {"blk.0.attn_q.weight": np.ones((1, 128), "f4")})
    with pytest.raises(ArtifactError, match="128 columns, the model 256"):
        read_imatrix(path, config)
    write_file(path, {"blk.0.attn_q.weight": np.full((1, 256), np.nan, "f4")})
    with pytest.raises(ArtifactError, match="not sums of squares"):
        read_imatrix(path, config)


def test_a_truncated_file_is_refused(tmp_path):
    config = config_of("llama", tmp_path / "model")
    statistics, _ = statistics_of(config)
    path = tmp_path / "a.gguf"
    write_imatrix(path, config, statistics)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(ArtifactError, match="is damaged"):
        read_imatrix(path, config)
