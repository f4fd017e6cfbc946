"""llama.cpp's imatrix files: the importance of every linear's input, by GGUF tensor name.

A GGUF file with ``general.type = imatrix`` and, for each matrix, ``<tensor>.in_sum2`` (sums of the
squared inputs, float32 ``[1, columns]``) and ``<tensor>.counts`` (tokens, float32 ``[1, 1]``); the
importance is their quotient. A tensor of experts has a row for each. Sources:
``common/imatrix-loader.cpp`` and ``tools/imatrix/imatrix.cpp`` of llama.cpp; the older ``.dat``
layout is not supported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.calibration.statistics import LayerStats, Statistics, input_of
from compress.decoder.config import FUSED, DecoderConfig, WeightMap, split_name
from compress.errors import ArtifactError, reading
from exporters.gguf.architectures import ARCHITECTURES
from exporters.gguf.head import read_head
from exporters.gguf.metadata import target_name

SUMS, COUNTS = ".in_sum2", ".counts"


def read_imatrix(path: Path, config: DecoderConfig) -> Statistics:
    """Read the importance of a model's inputs from an imatrix file; the head's may be missing.

    Raises:
        ArtifactError: not an imatrix file, damaged, or of another model.
    """
    entries = read_entries(path)
    runs: dict[str, list[LayerStats]] = {}
    for (key, _), names in inputs(config).items():
        stored = [name for name in names if target_name(name) in entries]
        if not stored and key == "lm_head":
            continue
        if not stored:
            raise ArtifactError(
                f"{path.name} has no {target_name(names[0])}", hint="an imatrix of another model?"
            )
        entry = entries[target_name(stored[0])][0]
        columns = config.weight_shape(split_name(stored[0])[1])[1]
        if entry.importance.size != columns:
            raise ArtifactError(
                f"{path.name}: {target_name(stored[0])} has {entry.importance.size} columns, "
                f"the model {columns}",
                hint="an imatrix of another model?",
            )
        runs.setdefault(key, []).append(entry)
    for name in expert_names(config):
        found = entries.get(target_name(name), [])
        _, role, _ = split_name(name)
        count, _, columns = config.weight_shape(role)
        if len(found) != count or found[0].importance.size != columns:
            raise ArtifactError(
                f"{path.name} has no {target_name(name)} of {count} experts with {columns} columns",
                hint="an imatrix of another model?",
            )
        for expert, entry in enumerate(found):
            runs.setdefault(str(input_of(config, of_expert(name, expert))), [entry])
    return Statistics.of(config, {key: pooled(entries) for key, entries in runs.items()})


def write_imatrix(path: Path, config: DecoderConfig, statistics: Statistics) -> None:
    """Write the importance as a file for ``llama-quantize --imatrix``.

    Equal statistics give equal bytes.

    Raises:
        OSError: the file cannot be written.
    """
    import gguf

    writer = gguf.GGUFWriter(str(path), ARCHITECTURES[config.family].name)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["packlight"])
    tokens = 0
    for name in linear_names(config):
        stats = statistics.for_weight(name)
        if stats is None:
            continue
        # The runs of a shared block were pooled; GGUF has a tensor for each.
        tokens = stats.count if name == "lm_head.weight" else stats.count // config.block_repeat
        sums = (stats.importance * np.float32(tokens)).reshape(1, -1)
        writer.add_tensor(target_name(name) + SUMS, sums)
        writer.add_tensor(target_name(name) + COUNTS, np.full((1, 1), tokens, np.float32))
    for name in expert_names(config):
        each = [
            statistics.for_weight(of_expert(name, e))
            for e in range(config.weight_shape(split_name(name)[1])[0])
        ]
        if any(stats is None for stats in each):
            continue
        counts = np.array([[stats.count] for stats in each if stats], np.float32)
        means = np.stack([stats.importance for stats in each if stats])
        writer.add_tensor(target_name(name) + SUMS, means * counts)
        writer.add_tensor(target_name(name) + COUNTS, counts)
    # llama.cpp requires the number of chunks; everything is written as one chunk.
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", tokens)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_entries(path: Path) -> dict[str, list[LayerStats]]:
    """GGUF tensor name → count and importance; of experts, one for each.

    Raises:
        ArtifactError: missing, not an imatrix file, or damaged.
    """
    import gguf

    if not path.is_file():
        raise ArtifactError(f"{path} does not exist")
    entries = {}
    hint = "write it with llama-imatrix --output-format gguf"
    try:
        read_head(path)  # refuses files on which gguf-py's reader would not return
    except ArtifactError as error:
        what = f"{path.name} cannot be read as an imatrix: {error.message}"
        raise ArtifactError(what, hint) from error
    with reading(path.name, hint=hint):
        reader: Any = gguf.GGUFReader(str(path))
        kind = reader.fields.get("general.type")
        if kind is None or kind.contents() != "imatrix":
            raise ArtifactError(f"{path.name} is a GGUF file, but no imatrix")
        tensors: Mapping[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
        for name, tensor in tensors.items():
            if name.endswith(SUMS):
                stem = name.removesuffix(SUMS)
                entries[stem] = entries_of(tensor.data, tensors[stem + COUNTS].data)
    return entries


def entries_of(sums: Any, counts: Any) -> list[LayerStats]:
    """The statistics of one matrix of the file, or of each expert's.

    Raises:
        ValueError: no tokens, or invalid sums of squares.
    """
    seen = np.rint(np.asarray(counts, np.float32).reshape(-1))
    values = np.asarray(sums, np.float32).reshape(len(seen), -1)
    least = 1 if len(seen) == 1 else 0  # an expert may have seen no token
    if not np.isfinite(seen).all() or seen.min() < least or seen.max() < 1:
        raise ValueError("no tokens")
    if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError("not sums of squares")
    return [
        LayerStats(int(count), row / np.float32(max(count, 1)))
        for count, row in zip(seen, values, strict=True)
    ]


def pooled(runs: Sequence[LayerStats]) -> LayerStats:
    """Pool the statistics of a stored block's runs; usually there is one."""
    if len(runs) == 1:
        return runs[0]
    count = sum(run.count for run in runs)
    sums = np.sum([run.importance.astype(np.float64) * run.count for run in runs], axis=0)
    return LayerStats(count, (sums / count).astype(np.float32))


def linear_names(config: DecoderConfig) -> Iterator[str]:
    """Packlight's names of the matrices in GGUF that multiply an input."""
    fused = ARCHITECTURES[config.family].fused
    for name in WeightMap(config).names(tied_head=False, fused=fused):
        if input_of(config, name) is not None:
            yield name
    if config.tie_word_embeddings:
        yield "lm_head.weight"


def expert_names(config: DecoderConfig) -> list[str]:
    """Packlight's names of the tensors with the matrices of all experts."""
    fused = ARCHITECTURES[config.family].fused
    names = WeightMap(config).names(tied_head=False, fused=fused)
    return [name for name in names if ".experts." in name]


def of_expert(name: str, expert: int) -> str:
    """The name of one expert's matrix in such a tensor."""
    return name.replace(".experts.", f".experts.{expert}.")


def inputs(config: DecoderConfig) -> dict[tuple[str, int | None], list[str]]:
    """Input name and block → packlight's names of the matrices that an imatrix may have for it.

    Where GGUF fuses q, k and v, also their separate names: newer builds of llama.cpp accept both.
    """
    found: dict[tuple[str, int | None], list[str]] = {}
    for name in linear_names(config):
        block, role, kind = split_name(name)
        key = input_of(config, name)
        parts = FUSED[role] if role == "qkv_proj" else ()
        names = [name, *(f"blocks.{block}.{part}.{kind}" for part in parts)]
        found.setdefault((str(key), block), []).extend(names)
    return found
