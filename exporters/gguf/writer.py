"""Writes the GGUF file in one pass: keys and tensor table first, then slabs of rows.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. ``gguf-py`` writes the header;
the data section is written here, because gguf-py needs whole tensors in memory.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.checkpoint.checkpoint import Checkpoint
from compress.checkpoint.scalars import folded_config
from compress.checkpoint.sources import Source
from compress.decoder.config import DecoderConfig, split_name
from compress.grids import Quantized, get_grid
from compress.plan.shapes import Artifact, Plan, PlanEntry, Written
from compress.plan.weights import Weights
from exporters.gguf.architectures import ARCHITECTURES
from exporters.gguf.metadata import (
    CONTEXT_KEY,
    QUANTIZATION_VERSION,
    ROPE_TENSORS,
    TYPE_KEY,
    display_name,
    rope_tensors,
    write_architecture,
    write_general,
)
from exporters.gguf.mixes import MIXES, Mix
from exporters.gguf.tokenizer import Vocabulary, read_vocabulary, write_vocabulary

ALIGNMENT = 32  # gguf's default, so no key is needed
SLABS = 8 << 20  # weights held at once: 32 MiB as float32


class Writer:
    """See ``compress.plan.shapes.Writer``. Holds ``SLABS`` weights in memory, never a whole tensor.

    Raises:
        CheckpointError: no tokenizer, or weights that cannot be read.
        UnsupportedModelError: a tokenizer that llama.cpp cannot express.
    """

    def __init__(self, plan: Plan, weights: Weights, folder: Path, written: Written) -> None:
        self.plan, self.weights, self._written = plan, weights, written
        self.file = folder / f"{plan.model_name}-{plan.type_name}.gguf"
        if not weights.ledger.cut(self.file):
            vocabulary = read_vocabulary(weights.checkpoint.tokenizer_facts, weights.config)
            write_head(self.file, plan, weights.checkpoint, weights.config, vocabulary)
        self._tables = rope_tensors(weights.config)

    def put(self, entry: PlanEntry) -> int:
        """Append a tensor, slab by slab, with its rows in llama.cpp's order."""
        weights, head_dim = self.weights, self.weights.config.head_dim
        # Some of llama.cpp's graphs (``llama``) rotate neighbours (2i, 2i+1) where Hugging Face's
        # rotate halves (i, i + d/2): the rows of q and k, and their biases, are reordered to match.
        config = weights.config
        pairs = "pairs" in ARCHITECTURES[config.family].own and not config.rope_pairs
        reorders = pairs and split_name(entry.name)[1] in ("q_proj", "k_proj")

        def pack(quantized: Quantized) -> NDArray[Any]:
            # Every ggml grid packs into one array, with a row of bytes or numbers for each row.
            (blocks,) = quantized.pack().values()
            return np.ascontiguousarray(interleave(blocks, head_dim) if reorders else blocks)

        blocks: Iterable[NDArray[Any]]
        if entry.name in ROPE_TENSORS:
            blocks = [np.asarray(self._tables[entry.name], "<f4")]
        elif len(entry.shape) == 1:
            values = weights.read(entry.name).astype("<f4", copy=False)
            blocks = [interleave(values[:, None], head_dim)[:, 0].copy() if reorders else values]
        elif len(entry.shape) == 2 and entry.name.endswith(".bias"):  # of all experts
            names = (of_expert(entry.name, expert) for expert in range(entry.shape[0]))
            blocks = (weights.read(name).astype("<f4") for name in names)
        elif len(entry.shape) == 3:
            blocks = self._of_experts(entry, pack)
        else:
            slabs = weights.slabs(entry.shape, SLABS, **({"step": head_dim} if reorders else {}))
            blocks = weights.in_slabs(entry.name, get_grid(entry.grid), slabs, pack)
        with self.file.open("ab") as stream:
            stream.write(bytes(-stream.tell() % ALIGNMENT))
            for block in blocks:
                stream.write(block.data)
                self._written(block.nbytes)
            stream.write(bytes(-stream.tell() % ALIGNMENT))
            return stream.tell()

    def _of_experts(
        self, entry: PlanEntry, pack: Callable[[Quantized], NDArray[Any]]
    ) -> Iterator[NDArray[Any]]:
        """The matrices of all experts, one after the other, in slabs of rows."""
        weights, fallen = self.weights, 0
        slabs = weights.slabs(entry.shape[1:], SLABS)
        experts = weights.config.experts
        for expert in range(entry.shape[0]):
            name = of_expert(entry.name, expert)
            if experts and experts.packed:
                from compress.checkpoint.packed import packed_rows

                yield from (packed_rows(weights.source, name, slab) for slab in slabs)
                continue
            yield from weights.in_slabs(name, get_grid(entry.grid), slabs, pack)
            fallen += weights.fallen.pop(name, 0)
        weights.fallen[entry.name] = fallen

    def close(self) -> Artifact:
        """See ``compress.plan.shapes.Writer.close``."""
        plan, config = self.plan, self.weights.config
        return Artifact(
            format=plan.format,
            type_name=plan.type_name,
            path=self.file,
            nbytes=self.file.stat().st_size,
            weights_bytes=plan.weights_bytes,
            kv_cache_bytes_per_token=config.kv_cache_bytes_per_token(plan.kv_bytes_per_value),
            plan=plan,
            notes=plan.notes,
        )


def of_expert(name: str, expert: int) -> str:
    """The name of an expert's part of a tensor of all experts."""
    return name.replace(".experts.", f".experts.{expert}.")


def writing_memory(plan: Plan) -> int:
    """Bytes of memory: slabs of weights, and their blocks."""
    return 160 << 20


def file_bytes(plan: Plan, source: Source) -> int:
    """See ``compress.formats``: bytes of the header and the aligned tensors."""
    vocabulary = read_vocabulary(source.checkpoint.tokenizer_facts, source.config)
    with tempfile.TemporaryDirectory(prefix="packlight-") as folder:
        path = Path(folder) / "head.gguf"
        write_head(
            path, plan, source.checkpoint, folded_config(source.config, plan.folded), vocabulary
        )
        return aligned(path.stat().st_size) + sum(aligned(entry.nbytes) for entry in plan.entries)


def aligned(size: int) -> int:
    """The next multiple of ``ALIGNMENT``."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def write_head(
    path: Path, plan: Plan, checkpoint: Checkpoint, config: DecoderConfig, vocabulary: Vocabulary
) -> None:
    """Write everything before the data: magic, keys, tensor table with contiguous offsets."""
    import gguf

    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.family].name)
    name = display_name(plan.model_name, strips_after_special=vocabulary.strips_after_special)
    writer.add_type(gguf.GGUFType.MODEL)
    total, own, count = config.num_parameters, 0, 0
    if config.experts is not None:
        count = config.experts.count
        own = config.num_hidden_layers * 3 * config.experts.width * config.hidden_size
    write_general(
        writer, checkpoint, plan.model_name, name, (total, total - count * own, own, count)
    )
    writer.add_uint64("packlight.parameter_count", config.num_parameters)
    if plan.max_context and (
        plan.max_context < config.max_position_embeddings or config.rope_switch
    ):
        writer.add_uint32(CONTEXT_KEY, plan.max_context)
    write_architecture(writer, config)
    if plan.type_name.startswith("mix-"):  # file type of the grid with most bytes
        numbers, sizes = dict(MIXES.values()), Counter({"F16": 0})
        for entry in plan.entries:
            if entry.grid in numbers:
                sizes[entry.grid] += entry.nbytes
        writer.add_file_type(numbers[sizes.most_common(1)[0][0]])
        writer.add_string(TYPE_KEY, plan.type_name)
    else:
        writer.add_file_type(Mix.parse(plan.type_name).file_type)
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
        writer.close()  # also if the disk is full


def interleave(rows: NDArray[Any], head_dim: int) -> NDArray[Any]:
    """Reorder the rows of each head from halves to pairs (0, d/2, 1, d/2+1, …) for llama's rope.

    Works on packed rows as well as on weights: each row has its own scales in every grid.
    """
    halves = rows.reshape(-1, 2, head_dim // 2, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)
