"""Writes a ``Source`` as a Hugging Face checkpoint: sharded safetensors, config, tokenizer.

Written one tensor at a time. Blocks that a checkpoint shares (MobileLLM-LS) are written as often as
they run: the folder is of a class that transformers has.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from compress.checkpoint.checkpoint import Checkpoint
from compress.checkpoint.safetensors import BYTES, write_safetensors
from compress.checkpoint.side_files import copy_tokenizer, hf_config, write_side_files
from compress.checkpoint.sources import Source
from compress.decoder.config import FUSED, DecoderConfig, Float32, WeightMap, split_name
from compress.decoder.config_json import write_json
from compress.decoder.families import FAMILIES

__all__ = ["checkpoint_bytes", "stored_dtypes", "write_checkpoint"]

SHARD = 5 * 10**9  # bytes, the default of transformers

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def write_checkpoint(source: Source, folder: Path, shard: int = SHARD) -> None:
    """Write the weights of ``source`` as a checkpoint, in the dtypes of its checkpoint.

    Args:
        source: of any config.
        folder: to write to.
        shard: bytes of a file, at most.
    """
    config = DecoderConfig.from_hf(hf_config(source.config), source.checkpoint.generation_config)
    write_side_files(source.config, source.checkpoint, folder)
    copy_tokenizer(source.checkpoint, folder)
    for license_file in sorted(source.checkpoint.path.glob("LICENSE*")):
        shutil.copyfile(license_file, folder / license_file.name)
    shards = split(tensor_headers(config, stored_dtypes(source.checkpoint)), shard)
    write_shards(folder, config, source, shards)


def checkpoint_bytes(source: Source) -> int:
    """Bytes of the weights that ``write_checkpoint`` writes."""
    config = DecoderConfig.from_hf(hf_config(source.config), source.checkpoint.generation_config)
    return shard_bytes(tensor_headers(config, stored_dtypes(source.checkpoint)))


def write_shards(folder: Path, config: DecoderConfig, source: Source, shards: list[Shapes]) -> None:
    """Write the weights, and an index where there are several files."""
    names = {tensor: name for name, tensor in disk_tensors(config)}
    count = len(shards)
    files = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        files = ["model.safetensors"]
    for file, headers in zip(files, shards, strict=True):
        values = (stored(source, names[tensor]) for tensor in headers)
        write_safetensors(folder / file, headers, values)
    if count > 1:
        where = {
            tensor: file for file, headers in zip(files, shards, strict=True) for tensor in headers
        }
        total = sum(map(shard_bytes, shards))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def stored(source: Source, name: str) -> Float32:
    """A weight as the family's checkpoints have it."""
    values, offset = source.read(name), source.config.norm_offset
    return values - np.float32(offset) if offset and name.endswith("norm.weight") else values


def disk_tensors(config: DecoderConfig) -> Iterator[tuple[str, str]]:
    """Packlight's name and the file's of every tensor, in order of execution; no tied head."""
    shapes = WeightMap(config)
    on_disk = FAMILIES[config.family].names
    fused = {m: whole for whole, members in FUSED.items() if whole in on_disk for m in members}
    seen = set()
    for name in shapes.names():
        block, role, kind = split_name(name)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if role in fused:
            name = f"blocks.{block}.{fused[role]}.{kind}"
        if name not in seen:
            seen.add(name)
            yield name, shapes.parts(name)[0].source


def tensor_headers(config: DecoderConfig, dtypes: Mapping[tuple[str, str], str]) -> Shapes:
    """The dtype and shape of every tensor in the file."""
    shapes = WeightMap(config)
    headers: Shapes = {}
    for name, tensor in disk_tensors(config):
        _, role, kind = split_name(name)
        shape = shapes.shape(name)
        headers[tensor] = (
            dtypes[role, kind],
            (shape[0], 1, *shape[1:]) if role == "conv" else shape,
        )
    return headers


def stored_dtypes(checkpoint: Checkpoint) -> dict[tuple[str, str], str]:
    """Role and kind → dtype in the checkpoint; float32 where blocks differ."""
    config = DecoderConfig.from_hf(checkpoint.config, checkpoint.generation_config)
    found: dict[tuple[str, str], str] = {}
    for name, tensor in disk_tensors(config):
        _, role, kind = split_name(name)
        dtype = checkpoint.tensors[tensor].dtype
        if found.setdefault((role, kind), dtype) != dtype:
            found[role, kind] = "F32"
    return found


def shard_bytes(headers: Shapes) -> int:
    """Bytes of a shard's data."""
    return sum(math.prod(shape) * BYTES[dtype] for dtype, shape in headers.values())


def split(headers: Shapes, limit: int) -> list[Shapes]:
    """Split into shards of at most ``limit`` bytes, at least one tensor each."""
    shards: list[Shapes] = [{}]
    for tensor, (dtype, shape) in headers.items():
        size = math.prod(shape) * BYTES[dtype]
        if shards[-1] and shard_bytes(shards[-1]) + size > limit:
            shards.append({})
        shards[-1][tensor] = (dtype, shape)
    return shards
