"""Makes full-size checkpoints of known models, with random weights distributed like trained ones.

    python benchmarks/make_checkpoint.py phi-3-mini-4k -o /tmp/full/phi-3-mini-4k
    python benchmarks/make_checkpoint.py --list

Sizes, memory and time of a build depend on shapes and on the spread of the weights, not on what
the model has learned, and real weights cannot always be downloaded. The shapes are the published
ones; the weights are bf16 in safetensors shards of at most 5 GB with an index, as the Hub has them.

Weights: Student-t with five degrees of freedom, as heavy-tailed as trained linears are; columns of
uneven size; those that read or write the same few channels of the residual stream are large in
every block. Scaled so that hidden states have the same size in all blocks and logits are of the
order of 2. The tokenizer is of the family's type, trained on Python's standard library sources;
rows of the vocabulary that it does not fill are padding, as they are in Phi-3 and Qwen.

Seeded: the same command writes the same weights, whatever the number of threads. Memory: a slab of
``SLAB`` weights per thread. About 7 s per GB on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent), str(HERE)]

from published import MODELS  # noqa: E402
from tiny_tokenizers import save_tokenizer  # noqa: E402

# Uses internal names: names the tensors of each family.
from compress.decoder.config import DecoderConfig, WeightMap  # noqa: E402
from compress.decoder.families import FAMILIES, find_family  # noqa: E402

SHARD = 5 * 10**9  # bytes, the default of transformers
SLAB = 1 << 22  # weights made at once by a thread: 16 MB as float32
OUTLIERS = 6  # channels of the residual stream with large values
THREADS = 2
# Parts of the names of linears that write into the residual stream.
RESIDUAL = ("o_proj", "out_proj", "down_proj", "c_proj", "dense", "fc2", "w2", "output_linear")


def make(
    model: str,
    folder: Path,
    *,
    seed: int = 0,
    layers: int = 0,
    weights: bool = True,
    shard: int = SHARD,
    slab: int = SLAB,
    threads: int = THREADS,
) -> Path:
    """Write the checkpoint of ``model``, a key of ``published.MODELS``; returns the folder.

    Args:
        layers: number of blocks; 0 for all.
        weights: False makes shards of the right headers and sizes without a byte in them (sparse
            files, all zeros): enough for plans and dry runs of models that no disk here holds.
        shard: bytes of a file, at most.
        slab: weights made at once by a thread.
        threads: that make weights.
    """
    from train_demo import standard_library

    tokenizer, pieces, keys = MODELS[model]
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(standard_library().values())
    ids = save_tokenizer(tokenizer, folder, text=text, pieces=pieces)
    stops = ids.pop("stops", ids.get("eos_token_id"))
    keys = keys | ids | {"torch_dtype": "bfloat16"}
    if layers:
        own = FAMILIES[find_family(keys)].keys
        keys[own.get("num_hidden_layers", "num_hidden_layers")] = layers
    write_json(folder / "config.json", keys)
    write_json(folder / "generation_config.json", ids | {"eos_token_id": stops})
    config = DecoderConfig.from_hf(keys)
    shards = split(WeightMap(config).expected(), shard)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shapes in zip(names, shards, strict=True):
        with (folder / name).open("wb") as stream:
            nbytes = write_header(stream, shapes)
            if weights:
                write_tensors(stream, shapes, config, seed, slab, threads)
            else:
                stream.truncate(stream.tell() + nbytes)
    index = {tensor: name for name, shapes in zip(names, shards, strict=True) for tensor in shapes}
    total = 2 * sum(math.prod(shape) for shapes in shards for shape in shapes.values())
    document = {"metadata": {"total_size": total}, "weight_map": index}
    write_json(folder / "model.safetensors.index.json", document)
    return folder


def write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def split(shapes: dict[str, tuple[int, ...]], limit: int) -> list[dict[str, tuple[int, ...]]]:
    """Tensors in their order, in shards of at most ``limit`` bytes."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if used + size > limit and shards[-1]:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += size
    return shards


def write_header(stream: BinaryIO, shapes: dict[str, tuple[int, ...]]) -> int:
    """The start of a safetensors file; returns how many bytes the tensors have behind it."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    stream.write(len(header).to_bytes(8, "little") + header)
    return end


def write_tensors(
    stream: BinaryIO,
    shapes: dict[str, tuple[int, ...]],
    config: DecoderConfig,
    seed: int,
    size: int,
    threads: int,
) -> None:
    """Slabs of ``size`` weights made by threads, written in order; at most a few are queued."""
    table = student_t(seed)

    def slabs() -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        for name, shape in shapes.items():
            step = max(1, size // math.prod(shape[1:]))
            for first in range(0, shape[0], step):
                yield name, shape, first, min(first + step, shape[0])

    with ThreadPoolExecutor(threads) as pool:
        waiting = []
        for slab in slabs():
            waiting.append(pool.submit(make_slab, slab, config, table, seed))
            if len(waiting) > 2 * threads:
                stream.write(waiting.pop(0).result().data)
        for made in waiting:
            stream.write(made.result().data)


def student_t(seed: int) -> NDArray[np.float32]:
    """65,536 values spread as Student's t with 5 degrees of freedom, of variance 1.

    Drawn from at random it is the distribution up to 9 standard deviations, and 20 times faster
    than drawing from the distribution.
    """
    drawn = np.sort(np.random.default_rng(seed).standard_t(5, 1 << 22))
    middles = drawn[32::64]
    values = (middles - middles[::-1]) / 2  # symmetric
    return (values / values.std()).astype(np.float32)


def make_slab(
    slab: tuple[str, tuple[int, ...], int, int],
    config: DecoderConfig,
    table: NDArray[np.float32],
    seed: int,
) -> NDArray[np.uint16]:
    """bf16 bits of rows ``first:last`` of a tensor."""
    name, shape, first, last = slab
    row = np.random.default_rng([seed, zlib.crc32(name.encode()), first])
    size = (last - first) * math.prod(shape[1:])
    values = table[row.integers(0, 1 << 16, size, dtype=np.uint16)]
    values = values.reshape(last - first, *shape[1:])
    values *= spread(name, shape, config, seed)
    if len(shape) == 1 and name.endswith("weight"):  # norms multiply by about 1
        values += 1.0 - config.norm_offset
    bits = values.view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)  # round to even
    return (bits >> 16).astype(np.uint16)


def spread(
    name: str, shape: tuple[int, ...], config: DecoderConfig, seed: int
) -> NDArray[np.float32] | float:
    """Standard deviation of each column of a tensor, float32 ``[columns]``."""
    if len(shape) == 1:
        return 0.1
    columns = shape[-1]
    sizes = np.random.default_rng([seed, zlib.crc32(name.encode())]).lognormal(0, 0.25, columns)
    if columns == config.hidden_size:
        loud = np.random.default_rng([seed, 1]).choice(columns, OUTLIERS, replace=False)
        sizes[loud] *= 6.0
    sizes /= np.sqrt(np.mean(sizes**2))
    if any(part in name for part in ("embed_tokens", "embed_in", "word_embeddings", "wte", "wpe")):
        gain = 2.0 if config.tie_word_embeddings else 0.5 * math.sqrt(columns)
    elif any(part in name for part in RESIDUAL):
        gain = 1.0 / math.sqrt(2 * config.num_hidden_layers)  # 2 L of them add up to 1
    else:
        gain = 2.0 if "lm_head" in name else 1.4
    return (sizes * gain / math.sqrt(columns)).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model", nargs="?", choices=sorted(MODELS), metavar="MODEL")
    parser.add_argument("-o", "--output", type=Path, help="folder; MODEL where none is given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=0, help="only so many blocks")
    parser.add_argument("--no-weights", action="store_true", help="sparse shards, for dry runs")
    parser.add_argument("--list", action="store_true", help="what can be made")
    wanted = parser.parse_args()
    if wanted.list or not wanted.model:
        for name, (_, _, keys) in MODELS.items():
            config = DecoderConfig.from_hf(keys)
            print(f"{name:18} {config.num_parameters:>14,} parameters")
        return
    begin = time.perf_counter()
    folder = wanted.output or Path(wanted.model)
    weights = not wanted.no_weights
    make(wanted.model, folder, seed=wanted.seed, layers=wanted.layers, weights=weights)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"{folder}: {size / 1e9:.2f} GB in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
