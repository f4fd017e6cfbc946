"""Plans the packages of ``iphone-ane``: grids that the Neural Engine runs, chunks, exact bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress.console import format_bytes, parse_bytes
from compress.decoder.config import DecoderConfig, WeightMap, split_name
from compress.errors import GridError, UnsupportedModelError, UsageError
from compress.grids import get_grid
from compress.grids.affine import Affine
from compress.plan.shapes import Plan, PlanEntry, fitting_grid, mix_name
from exporters.coreml import planning
from exporters.coreml.planning import (
    ALIGNMENT,
    GPU,
    NEURAL_ENGINE_MULTIPLE,
    Part,
    checked,
    container_bytes,
    parts,
)

FUNCTIONS = {"prefill": 64, "decode": 1}  # ids of a call
CHUNK = "1GB"  # ANEMLL's limit of a weight file on iOS
# Rows of the vocabulary in one convolution of the head: an axis of the Neural Engine has 16,384 at
# most. A multiple of the rows that share a palette, and of those of a slab.
HEAD_ROWS = 16384
EXPERIMENTAL = "iphone-ane is experimental: packlight's authors never ran it on a phone"
BLOCKS = "with scales of several blocks in a row it computes wrong values, without an error"


def plan_chunks(
    config: DecoderConfig,
    settings: dict[str, Any],
    choices: Mapping[str, str],
    model_name: str,
    folded: frozenset[str],
) -> Plan:
    """Plan the packages; the arguments are those that ``planning.plan`` has prepared.

    Returns:
        Entries as of ``planning.plan``, but norms in float16, and a tied head has an entry of its
        own. ``settings`` gains ``chunks``, the first block of each package and the one after its
        last.

    Raises:
        GridError: a grid that the Neural Engine does not run.
        UnsupportedModelError: heads of a size that it does not take.
        UsageError: a context that is not a multiple of 32; a block larger than a chunk; sparsity.
    """
    _check(config, settings)
    entries = tuple(_entries(config, settings, choices))
    chunks = _chunks(config, entries, parse_bytes(settings.setdefault("chunk", CHUNK)))
    found = Plan(
        format="coreml",
        type_name=mix_name(entries, config) if choices else settings["grid"],
        model_name=model_name,
        entries=entries,
        settings=settings | {"chunks": chunks},
        notes=(EXPERIMENTAL, *planning.context_notes(config, settings)),
        max_context=settings["context"],
        folded=folded,
        weights_outside=True,
    )
    arrays = [
        [part for entry in package.entries for part in stored_parts(entry)]
        for package in packages(found)
    ]
    nbytes = sum(ALIGNMENT + container_bytes(own) for own in arrays)
    found.settings["container_bytes"] = nbytes - found.weights_bytes
    return found


def _check(config: DecoderConfig, settings: Mapping[str, Any]) -> None:
    if config.head_dim % NEURAL_ENGINE_MULTIPLE:
        raise UnsupportedModelError(
            f"coreml: heads of {config.head_dim} ({config.family}) are not for the Neural Engine, "
            f"which takes multiples of {NEURAL_ENGINE_MULTIPLE}",
            hint=f"targets.coreml.preset={GPU}",
        )
    if settings["context"] % NEURAL_ENGINE_MULTIPLE:
        raise UsageError(
            f"coreml: a context of {settings['context']} is not a multiple of 32, which the Neural "
            "Engine wants",
            hint=f"--context {max(32, settings['context'] // 32 * 32)}",
        )
    if settings.get("sparsity", "none") != "none":
        raise UsageError(
            "coreml: sparse weights make packages for the Neural Engine larger and slower",
            hint=f"targets.coreml.sparsity=none, or targets.coreml.preset={GPU}",
        )
    for key in planning.GRID_KEYS:
        _check_grid(key, settings[key])


def _check_grid(name: str, grid: str) -> str:
    found = get_grid(grid)
    if isinstance(found, Affine) and found.group_size:
        raise GridError(
            f"coreml: {name}: {grid} is not for the Neural Engine: {BLOCKS}",
            hint="lut4-g32, lut6-g32, int8-channel …, or targets.coreml.preset=iphone-gpu",
        )
    return grid


def _entries(
    config: DecoderConfig, settings: Mapping[str, Any], choices: Mapping[str, str]
) -> Iterator[PlanEntry]:
    shapes = WeightMap(config)
    table = (settings["context"], config.ropes[0].rotary_dim // 2)
    for rope in sorted({kind.rope for kind in config.kinds if kind.rope is not None}):
        for name in rope_names(rope):
            yield planning.planned(name, "F16", table)
    for name in shapes.names(repeats=False):
        _, role, _ = split_name(name)
        shape, note = shapes.shape(name), ""
        if len(shape) == 1 or role == "embed_positions":
            grid = "F16"
        elif name in choices:
            grid = _check_grid(name, checked(name, choices[name], (shape[0], shape[1])))
        else:
            tied = role == "lm_head" and config.tie_word_embeddings
            key = {"embed_tokens": "embedding", "v_proj": "value"}.get(role, "grid")
            asked = settings["embedding" if tied else key]
            grid = fitting_grid(asked, (shape[0], shape[1]))
            note = "" if grid == asked else f"{shape[0]}×{shape[1]} does not divide into {asked}"
        yield planning.planned(name, grid, shape, note)


def rope_names(rope: int) -> tuple[str, str]:
    """Weights' names of a rotary embedding's tables."""
    end = f"_{rope}" if rope else ""
    return f"rope.cos{end}", f"rope.sin{end}"


def _chunks(config: DecoderConfig, entries: Sequence[PlanEntry], limit: int) -> list[list[int]]:
    """Blocks ``[first, last + 1]`` of each package, as many as ``limit`` bytes hold."""
    sizes: dict[int, int] = {}
    for entry in entries:
        block, _, _ = split_name(entry.name)
        if block is not None:
            nbytes = container_bytes(stored_parts(entry))
            sizes[block] = sizes.get(block, 0) + nbytes
    chunks: list[list[int]] = []
    room = 0
    for block, size in sizes.items():
        if ALIGNMENT + size > limit:
            raise UsageError(
                f"coreml: block {block} has {format_bytes(size)}, a chunk {format_bytes(limit)}",
                hint=f"targets.coreml.chunk={CHUNK}",
            )
        last = block + config.block_repeat
        if size > room:
            chunks.append([block, last])
            room = limit - ALIGNMENT
        chunks[-1][1] = last
        room -= size
    return chunks


@dataclass(frozen=True)
class Package:
    """One package of the folder.

    Attributes:
        name: of its file, without ``.mlpackage``.
        kind: ``embedding``, ``blocks`` or ``head``.
        entries: its tensors; the head's matrix in pieces (``lm_head.weight.1`` …).
        first, last: its blocks, as they run (``last`` is the one after the last).
    """

    name: str
    kind: str
    entries: tuple[PlanEntry, ...]
    first: int = 0
    last: int = 0


def packages(plan: Plan) -> list[Package]:
    """The packages of a plan, in the order in which they run."""
    matrix = next(entry for entry in plan.entries if entry.name == "lm_head.weight")
    # A palette of the whole matrix cannot be cut.
    rows = HEAD_ROWS if get_grid(matrix.grid).group_rows else matrix.shape[0]
    ends: list[PlanEntry] = []
    starts: list[PlanEntry] = []
    blocks: dict[int, list[PlanEntry]] = {}
    for entry in plan.entries:
        block, role, _ = split_name(entry.name)
        if block is not None:
            blocks.setdefault(block, []).append(entry)
        elif role == "lm_head":
            ends += head_pieces(entry, rows)
        elif role == "norm":
            ends.append(entry)
        else:
            starts.append(entry)
    found = [Package("embedding", "embedding", tuple(starts))]
    for number, (first, last) in enumerate(plan.settings["chunks"], 1):
        inside = range(first, last)
        own = tuple(e for block, mine in blocks.items() if block in inside for e in mine)
        found.append(Package(f"blocks_{number}", "blocks", own, first, last))
    return [*found, Package("head", "head", tuple(ends))]


def head_pieces(entry: PlanEntry, most: int) -> list[PlanEntry]:
    """The head's matrix or bias in pieces of ``most`` rows."""
    pieces = []
    for number, start in enumerate(range(0, entry.shape[0], most), 1):
        shape = (min(most, entry.shape[0] - start), *entry.shape[1:])
        nbytes = sum(part.nbytes for part in parts(entry.grid, shape))
        name, target = f"{entry.name}.{number}", f"{entry.target_name}_{number}"
        pieces.append(replace(entry, name=name, target_name=target, shape=shape, nbytes=nbytes))
    return pieces


def stored_parts(entry: PlanEntry) -> tuple[Part, ...]:
    """``planning.parts`` with the axes that convolutions want: ``[rows, columns, 1, 1]`` of a
    matrix, ``[1, n, 1, 1]`` of a norm; tables that rows are taken from stay as they are."""
    found = parts(entry.grid, entry.shape)
    if entry.name.startswith(("embed_", "rope.")):
        return found
    if len(entry.shape) == 1:
        of_norm = split_name(entry.name)[1].endswith("norm")
        wide = (1, *entry.shape, 1, 1) if of_norm else entry.shape
        return tuple(replace(part, shape=wide) for part in found)
    return tuple(
        replace(part, shape=(part.shape[0], 1, 1, 1, *part.shape[2:]))
        if part.name == "lut"
        else replace(part, shape=(*part.shape, 1, 1))
        for part in found
    )
