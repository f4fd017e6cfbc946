"""Experts that a checkpoint stores as MXFP4 blocks."""

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
from compress.decoder.config import WeightMap
from compress.decoder.decoder import Decoder, reader
from compress.errors import CheckpointError, UnsupportedModelError
from compress.formats import get_format
from compress.plan.job import describe_model


def test_they_are_decoded_and_kept(exported: Exports, tmp_path: Path) -> None:
    """Decoded as transformers does, and kept bit for bit in GGUF."""
    import gguf

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


def test_what_is_wrong_is_refused(exported: Exports, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder, _, _ = packed_checkpoint(exported, tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    scales = next(name for name in tensors if name.endswith("2.mlp.experts.down_proj_scales"))
    tensors[scales][3, 5] = 255
    save_file(tensors, file, {"format": "pt"})
    stored = Stored(Checkpoint.open(folder), config_of(Checkpoint.open(folder)))
    assert stored.read("blocks.2.experts.2.down_proj.weight").shape == (64, 96)
    with pytest.raises(CheckpointError, match="stand for NaN"):
        stored.read("blocks.2.experts.3.down_proj.weight")
    del tensors[scales]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensor.* missing.*down_proj_scales"):
        describe_model(Checkpoint.open(folder))
    keys = json.loads((folder / "config.json").read_text())
    for method in ("gptq", None):  # of which packlight knows nothing
        keys["quantization_config"] = {"quant_method": method} if method else None
        (folder / "config.json").write_text(json.dumps(keys))
        with pytest.raises((UnsupportedModelError, CheckpointError), match=r"quantized|missing"):
            describe_model(Checkpoint.open(folder))


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
