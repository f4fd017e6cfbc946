"""Mixtures of experts in the reference decoder: layouts on disk, and one matrix at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from exported import Exports, config_of, decoded

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import DecoderConfig, WeightMap
from compress.decoder.decoder import Decoder, reader
from compress.errors import CheckpointError, UnsupportedModelError


def opened(exported: Exports, row: str) -> Stored:
    checkpoint = Checkpoint.open(exported.checkpoint(row))
    return Stored(checkpoint, config_of(checkpoint))


def test_a_tensor_of_all_experts_is_read_by_expert_and_rows(exported: Exports) -> None:
    stored = opened(exported, "granitemoeshared")
    stem = "model.layers.1.block_sparse_moe"
    both = stored.checkpoint.read(f"{stem}.input_linear.weight")  # [experts, gate and up, hidden]
    down = stored.checkpoint.read(f"{stem}.output_linear.weight")
    assert both.shape == (8, 192, 128)
    for expert in (0, 5):
        name = f"blocks.1.experts.{expert}"
        assert (stored.read(f"{name}.gate_proj.weight") == both[expert, :96]).all()
        assert (stored.read(f"{name}.up_proj.weight") == both[expert, 96:]).all()
        rows = stored.read(f"{name}.up_proj.weight", slice(10, 70))
        assert (rows == both[expert, 106:166]).all()
        assert (stored.read(f"{name}.down_proj.weight", slice(3, 9)) == down[expert, 3:9]).all()


def test_parameters_are_counted(exported: Exports) -> None:
    for row in ("mixtral", "qwen2_moe", "granitemoeshared"):
        stored = opened(exported, row)
        sizes = [np.prod(info.shape) for info in stored.checkpoint.tensors.values()]
        assert stored.config.num_parameters == sum(sizes)
        WeightMap(stored.config).check(stored.checkpoint)


def test_one_matrix_of_one_expert_is_in_memory(exported: Exports) -> None:
    """And it is read once, however many windows there are."""
    stored, held, most = opened(exported, "mixtral"), [], 0
    readings: dict[str, int] = {}

    def read(name: str) -> Any:
        nonlocal most
        values = stored.read(name)
        readings[name] = readings.get(name, 0) + 1
        if ".experts." in name:
            held[:] = [array for array in held if array() is not None]
            import weakref

            held.append(weakref.ref(values))
            most = max(most, len(held))
        return values

    ids = np.random.default_rng(0).integers(0, 512, (5, 20)).tolist()
    found = list(Decoder(stored.config, read).stream_logits(ids))
    assert most == 1
    assert max(count for name, count in readings.items() if name.startswith("blocks.")) == 1
    alone = Decoder(stored.config, stored.read, resident=True)
    for window, logits in zip(ids, found, strict=True):
        torch.testing.assert_close(alone.logits(window), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("row", "keys", "reason"),
    [
        ("qwen3_moe", {"mlp_only_layers": [1]}, "some blocks only"),
        ("qwen2_moe", {"decoder_sparse_step": 2}, "some blocks only"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("mixtral", {"num_experts_per_tok": 9}, "more than num_local_experts"),
        ("mixtral", {"num_local_experts": 10**9}, "whole number"),
        ("granitemoe", {"num_local_experts": None}, "num_local_experts"),
    ],
)
def test_what_is_not_supported_is_refused(
    exported: Exports, row: str, keys: dict[str, Any], reason: str
) -> None:
    config = Checkpoint.open(exported.checkpoint(row)).config
    with pytest.raises((UnsupportedModelError, CheckpointError), match=reason):
        DecoderConfig.from_hf({**config, **keys})


def test_experts_stored_as_mxfp4(exported: Exports, tmp_path: Path) -> None:
    """Decoded as transformers does, and kept bit for bit in GGUF."""
    import gguf

    from compress.formats import get_format

    folder, blocks, scales = packed_checkpoint(exported, tmp_path)
    stored = Stored(Checkpoint.open(folder), config_of(Checkpoint.open(folder)))
    WeightMap(stored.config).check(stored.checkpoint)
    plain = tmp_path / "plain"
    model = tiny.reference(plain)
    ids = np.random.default_rng(1).integers(0, 512, 50).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    decoder = Decoder(stored.config, stored.read, resident=True)
    assert np.abs(decoder.logits(ids) - expected).max() <= 1e-4
    same = Stored(Checkpoint.open(plain), config_of(Checkpoint.open(plain)))
    for role in ("gate_proj", "up_proj", "down_proj"):
        name = f"blocks.1.experts.5.{role}.weight"
        assert (stored.read(name) == same.read(name)).all()
        assert (stored.read(name, slice(7, 40)) == same.read(name)[7:40]).all()
    made = exported.write("gguf", folder, {"type": "Q4_0"})
    assert any("bit for bit" in note for note in made.plan.notes)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(made.path).tensors}
    for i, role in enumerate(("gate", "up")):
        found = tensors[f"blk.1.ffn_{role}_exps.weight"]
        values = gguf.quants.dequantize(found.data, found.tensor_type)
        name = f"blocks.1.experts.5.{role}_proj.weight"
        assert found.tensor_type.name == "MXFP4"
        assert (values[5] == stored.read(name)).all()
        assert (found.data[5].reshape(96, -1, 17)[..., 0] == scales[1][5, i::2]).all()
        low, high = blocks[1][5, i::2] & 15, blocks[1][5, i::2] >> 4
        codes = np.stack((low, high), axis=-1).reshape(96, -1, 2, 16)
        joined = codes[..., 0, :] | codes[..., 1, :] << 4
        assert (found.data[5].reshape(96, -1, 17)[..., 1:] == joined).all()
    runtime = get_format("gguf").open_runtime(made.path, context=60, threads=1)
    floats = Decoder(made.config, reader(made.config, decoded(made)), threads=1)
    assert np.abs(runtime.logits(ids) - floats.logits(ids)).mean() < 0.05
    runtime.close()


def packed_checkpoint(exported: Exports, folder: Path) -> tuple[Path, list[Any], list[Any]]:
    """A tiny gpt_oss whose experts are random MXFP4 blocks, and in ``plain`` the same decoded by
    transformers; biases are so large that the activation clamps. Also the blocks and exponents of
    each block's first matrix."""
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source = exported.checkpoint("gpt_oss")
    tensors = load_file(source / "model.safetensors")
    random, kept = torch.Generator().manual_seed(0), ([], [])
    packed, plain = dict(tensors), dict(tensors)
    for name in list(tensors):
        if name.endswith("gate_up_proj_bias"):
            plain[name] = packed[name] = tensors[name] * 40
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        count, columns, rows = tensors[name].shape
        blocks = torch.randint(0, 256, (count, rows, columns // 32, 16), generator=random)
        scales = torch.randint(121, 124, (count, rows, columns // 32), generator=random)
        packed[f"{name}_blocks"] = blocks = blocks.to(torch.uint8)
        packed[f"{name}_scales"] = scales = scales.to(torch.uint8)
        del packed[name]
        plain[name] = convert_moe_packed_tensors(blocks, scales)
        if name.endswith("gate_up_proj"):
            kept[0].append(blocks.numpy())
            kept[1].append(scales.numpy())
    config = json.loads((source / "config.json").read_text())
    for place, values in (("packed", packed), ("plain", plain)):
        shutil.copytree(source, folder / place)
        save_file(values, folder / place / "model.safetensors", {"format": "pt"})
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "packed" / "config.json").write_text(json.dumps(config))
    return folder / "packed", *kept
