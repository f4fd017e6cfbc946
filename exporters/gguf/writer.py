"""The GGUF file, written in one pass: keys and tensor table first, then slabs of rows.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. ``gguf-py`` writes the head;
the data section is ours, because its writer wants whole tensors in memory.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint.sources import Source
from compress.decoder.config import DecoderConfig
from compress.grids import Quantized, get_grid
from compress.plan.shapes import Artifact, Plan, PlanEntry, Progress, Weights
from exporters.gguf.metadata import (
    CONTEXT_KEY,
    QUANTIZATION_VERSION,
    ROPE_TENSORS,
    TYPE_KEY,
    architecture,
    display_name,
    permuted_heads,
    rope_tensors,
    write_architecture,
)
from exporters.gguf.mixes import file_type
from exporters.gguf.tokenizer import Vocabulary, read_vocabulary, write_vocabulary

ALIGNMENT = 32  # gguf's default, so no key says it
SLABS = 8 << 20  # weights held at once: 32 MiB as float32


def write(plan: Plan, weights: Weights, folder: Path, progress: Progress) -> Artifact:
    """See ``compress.plan.shapes.Exporter.write``. Memory: ``SLABS`` weights, never a tensor.

    Raises:
        CheckpointError: no tokenizer, or weights that cannot be read.
        UnsupportedModelError: a tokenizer that llama.cpp cannot express.
        GridError: values that a grid cannot hold.
    """
    config = weights.config
    vocabulary = read_vocabulary(weights.checkpoint.path, config)
    path = folder / f"{plan.model_name}-{plan.type_name}.gguf"
    if not weights.ledger.cut(path):
        write_head(path, plan, config, vocabulary)
    done = 0
    with path.open("ab") as stream:
        pad(stream)
        for entry in plan.entries:
            if entry.target_name in weights.ledger:
                done += entry.nbytes
                continue
            for block in tensor_data(entry, weights):
                stream.write(block.data)
                done += block.nbytes
                progress(done, plan.weights_bytes)
            pad(stream)
            stream.flush()
            weights.finish(entry.target_name, entry.name, path, stream.tell())
    return Artifact(
        format="gguf",
        type_name=plan.type_name,
        path=path,
        nbytes=path.stat().st_size,
        weights_bytes=plan.weights_bytes,
        kv_cache_bytes_per_token=config.kv_cache_bytes_per_token(plan.kv_bytes_per_value),
        plan=plan,
        notes=(*plan.notes, *vocabulary.notes),
    )


def file_bytes(plan: Plan, source: Source) -> int:
    """See ``compress.plan.shapes.Exporter.file_bytes``: the head as it will be, and aligned tensors."""
    vocabulary = read_vocabulary(source.checkpoint.path, source.config)
    with tempfile.TemporaryDirectory(prefix="packlight-") as folder:
        path = Path(folder) / "head.gguf"
        write_head(path, plan, source.config, vocabulary)
        return aligned(path.stat().st_size) + sum(aligned(entry.nbytes) for entry in plan.entries)


def aligned(size: int) -> int:
    """The next multiple of ``ALIGNMENT``."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def write_head(path: Path, plan: Plan, config: DecoderConfig, vocabulary: Vocabulary) -> None:
    """Everything before the data: magic, keys, tensor table with contiguous offsets."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture(config))
    name = display_name(plan.model_name, strips_after_special=vocabulary.strips_after_special)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(config.num_parameters, 0, 0, 0))
    writer.add_quantized_by("packlight")
    writer.add_uint64("packlight.parameter_count", config.num_parameters)
    if plan.max_context and plan.max_context < config.max_position_embeddings:
        writer.add_uint32(CONTEXT_KEY, plan.max_context)
    write_architecture(writer, config)
    sizes: Counter[str] = Counter()
    for entry in plan.entries:
        sizes[entry.grid] += entry.nbytes
    writer.add_file_type(file_type(plan.type_name, sizes))
    if plan.type_name.startswith("mix-"):
        writer.add_string(TYPE_KEY, plan.type_name)
    writer.add_quantization_version(QUANTIZATION_VERSION)
    write_vocabulary(writer, vocabulary)
    for entry in plan.entries:
        kind = gguf.GGMLQuantizationType[entry.grid]
        writer.add_tensor_info(
            entry.target_name, entry.shape, np.dtype(np.float32), entry.nbytes, raw_dtype=kind
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()  # also on a full disk


def tensor_data(entry: PlanEntry, weights: Weights) -> Iterator[NDArray[Any]]:
    """The bytes of one tensor, slab by slab, rows in llama.cpp's order."""
    config = weights.config
    heads = permuted_heads(config, entry.name)
    if entry.name in ROPE_TENSORS:
        yield np.asarray(rope_tensors(config)[entry.name], "<f4")
    elif len(entry.shape) == 1:
        values = weights.read(entry.name).astype("<f4", copy=False)
        yield interleave(values[:, None], config.head_dim)[:, 0].copy() if heads else values
    else:

        def pack(quantized: Quantized) -> NDArray[Any]:
            # Every grid of ggml packs into one array, a row of bytes or numbers for each row.
            (blocks,) = quantized.pack().values()
            return np.ascontiguousarray(interleave(blocks, config.head_dim) if heads else blocks)

        whole = {"step": config.head_dim} if heads else {}
        slabs = weights.slabs(entry.shape, SLABS, **whole)
        yield from weights.in_slabs(entry.name, get_grid(entry.grid), slabs, pack)


def interleave(rows: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """Rows of whole heads from halves (0, d/2, 1, d/2+1, …): what llama's rotation expects.

    Works on packed rows as well as on weights: each row has its own scales in every grid.
    """
    halves = rows.reshape(-1, 2, head_dim // 2, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def pad(stream: Any) -> None:
    """Zeros up to the next multiple of ``ALIGNMENT``."""
    stream.write(bytes(-stream.tell() % ALIGNMENT))
