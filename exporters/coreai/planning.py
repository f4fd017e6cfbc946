"""Plans the grid of every tensor, its storage in Core AI, and its exact bytes; reads no weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress.checkpoint.scalars import folded_config
from compress.decoder.config import DecoderConfig, WeightMap, split_name
from compress.errors import (
    GridError,
    RuntimeMissingError,
    UnsupportedModelError,
    UsageError,
)
from compress.formats import get_format
from compress.grids import get_grid
from compress.grids.affine import Affine
from compress.grids.palette import Palette
from compress.grids.sparse import SparseGrid, pattern_of
from compress.plan.shapes import (
    Candidate,
    Plan,
    PlanEntry,
    PlanRequest,
    fitting_grid,
    mix_name,
    tied_bits,
)

INSTALL = "pip install 'packlight[coreai]'"
GROUPS = ("g16", "g32", "g64", "g128", "g256", "channel")
ROW_GROUPS = ("g1", "g2", "g4", "g8", "g16", "g32", "tensor")
GRIDS = (
    *(f"int{bits}-{g}{kind}" for bits in (2, 4, 8) for g in GROUPS for kind in ("", "-asym")),
    *(f"lut{bits}-{g}" for bits in (1, 2, 3, 4, 6, 8) for g in ROW_GROUPS),
    "F16",
)
# Candidate grids of a budget: integer blocks, or palettes where the settings have one. Tables for
# fewer than eight rows are slow.
BLOCKS = (
    "int2-g16", "int2-g32-asym", "int4-g128", "int4-g64", "int4-g32", "int4-g32-asym",
    "int8-channel", "int8-g32",
)  # fmt: skip
PALETTES = ("lut2-g8", "lut3-g16", "lut3-g8", "lut4-g32", "lut4-g8", "lut6-g32", "lut6-g8")
DEFAULTS: dict[str, Any] = {"grid": "int4-g32", "deployment": "iOS27"}
# Apple's runner doubles the cache as it fills; with more slots than this, wrong values were
# reported on an iPhone 17 Pro (github.com/apple/coreai-models, issue 124).
DEFAULT_CONTEXT = 1024
# Every array starts at a multiple of it, in the program and in the writer's file. Not more: Apple's
# own summary of a program reads it to memory that is aligned to 16 bytes, and refuses others.
ALIGNMENT = 16
FLOATS = {"F16": "fp16", "F32": "fp32"}  # grid → type of a plain constant
BITS = {"fp16": 16, "fp32": 32} | {
    f"{sign}int{bits}": bits for bits in (1, 2, 3, 4, 6, 8) for sign in ("", "u")
}


@dataclass(frozen=True)
class Part:
    """One array of a stored tensor.

    Attributes:
        name: ``codes``, ``scale``, ``zero_point``, ``lut``; empty for a plain constant. Of a sparse
            grid also ``mask``, and ``values`` where those that are not zero are float16.
        dtype: ``int4``, ``uint3``, ``fp16`` …
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file; sub-byte integers are packed without gaps."""
        return (math.prod(self.shape) * BITS[self.dtype] + 7) // 8

    def array_name(self, tensor: str) -> str:
        """The array's name in the program."""
        return f"{tensor}_{self.name}" if self.name else tensor


def parts(grid: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
    """The arrays in which Core AI stores a tensor on a grid.

    Integers are signed and centered where symmetric, else unsigned with a zero point; palettes have
    one table per group of rows, ``[groups, 1, levels, 1]``. A sparse grid has a mask bit for every
    weight, and the codes of those that are not zero, row by row.

    Raises:
        GridError: a grid that Core AI does not support.
    """
    if grid in FLOATS:
        return (Part("", FLOATS[grid], shape),)
    match found := get_grid(grid):
        case SparseGrid():
            codes, *others = parts(found.inner.name, shape)
            there = (shape[0] * found.pattern.count(shape[1]),)
            return (
                Part("mask", "uint1", shape),
                Part(codes.name or "values", codes.dtype, there),
                *others,
            )
        case Palette():
            table = (found.groups((shape[0], shape[1])), 1, found.levels, 1)
            return Part("codes", f"uint{found.bits}", shape), Part("lut", "fp16", table)
        case Affine():
            scales = (shape[0], found.groups((shape[0], shape[1])))
            scale = Part("scale", "fp16", scales)
            if found.symmetric:
                return Part("codes", f"int{found.bits}", shape), scale
            unsigned = f"uint{found.bits}"
            return Part("codes", unsigned, shape), scale, Part("zero_point", unsigned, scales)
    raise GridError(f"Core AI does not store {grid}")


def plan(config: DecoderConfig, request: PlanRequest) -> Plan:
    """Plan the Core AI artifact.

    Args:
        config: the model.
        request: its settings are ``grid`` (default ``int4-g32``), ``embedding`` (default: as
            ``grid``; see ``embedding_grid`` where it is the head, too), ``deployment``
            (``iOS27``), ``context`` (most positions of the KV cache; default 1024 or what the
            model has), ``sparsity`` of the blocks' linears (``none``).

    Returns:
        Entries in the order of writing, one for every stored weight (norms in float32, biases in
        float16) and two rotary tables, ``rope.cos`` and ``rope.sin``. A tied head has none.

    Raises:
        GridError: a grid that Core AI cannot store.
        RuntimeMissingError: coreai-core is not installed: said before any work.
        UnsupportedModelError: experts; a deployment target other than iOS 27.
        UsageError: more context than the model has.
    """
    if not get_format("coreai").installed:
        raise RuntimeMissingError("a Core AI bundle needs coreai-core", hint=INSTALL)
    chosen, choices = DEFAULTS | dict(request.settings), request.choices
    most = config.rope_switch or config.max_context
    if request.context is not None:
        chosen["context"] = min(request.context, config.rope_switch or request.context)
    chosen.setdefault("embedding", embedding_grid(config, chosen["grid"]))
    chosen.setdefault("context", min(DEFAULT_CONTEXT, most))
    folded = config.scalars
    if config.experts is not None:
        raise UnsupportedModelError(
            "coreai: experts are not supported: packlight has no graph of them"
        )
    if any(kind.taps for kind in config.kinds):
        raise UnsupportedModelError(
            "coreai: layers that convolve in place of attention are not supported: packlight has "
            "no graph of them"
        )
    if folded:
        config = folded_config(config, folded)
    _check(config, chosen)
    pattern = pattern_of(chosen.get("sparsity") or "none")
    prefix = f"{pattern.name}-" if pattern else ""
    entries = tuple(_entries(config, chosen, choices, prefix))
    return Plan(
        format="coreai",
        type_name=mix_name(entries, config) if choices else prefix + chosen["grid"],
        model_name=request.model_name,
        entries=entries,
        settings=chosen,
        notes=tuple(_notes(config, chosen)),
        max_context=chosen["context"],
        folded=folded,
    )


def embedding_grid(config: DecoderConfig, name: str) -> str:
    """The embedding's default grid: as the blocks', with the bits of ``tied_bits`` where it is the
    head, too; palettes become ``int8-channel``, as in Apple's recipes."""
    if name not in GRIDS or not config.tie_word_embeddings:
        return name
    grid = get_grid(name)
    if not isinstance(grid, (Affine, Palette)) or tied_bits(config, grid.bits) == grid.bits:
        return name
    return replace(grid, bits=8).name if isinstance(grid, Affine) else "int8-channel"


def _check(config: DecoderConfig, settings: Mapping[str, Any]) -> None:
    for key in ("grid", "embedding"):
        if settings[key] not in GRIDS:
            raise GridError(
                f"coreai: {key} {settings[key]!r} is not a grid that Core AI stores",
                hint="int4-g32, int8-channel, int4-g128-asym, lut4-g32, lut6-tensor, F16 …",
            )
    if settings["deployment"] != "iOS27":
        raise UnsupportedModelError(
            f"coreai: deployment {settings['deployment']!r} is not supported",
            hint="iOS27 (also macOS 27): the first with Core AI",
        )
    context = settings["context"]
    most = config.rope_switch or config.max_context
    if not 2 <= context <= most:
        raise UsageError(
            f"coreai: context {context} is not between 2 and the {most} positions of this model",
            hint=f"--context {most}, or targets.coreai.context in the recipe",
        )


def candidates(
    entry: PlanEntry, settings: Mapping[str, Any], wanted: Sequence[str] = ()
) -> list[Candidate]:
    """See ``compress.formats``."""
    if len(entry.shape) != 2 or not entry.name.endswith(".weight"):
        return []
    if entry.name == "embed_positions.weight":
        return []
    shape = (entry.shape[0], entry.shape[1])
    palettes = isinstance(get_grid(settings["grid"]), Palette)
    grids = [*PALETTES, "int8-channel"] if palettes else list(BLOCKS)
    if entry.name == "embed_tokens.weight":
        grids.append("F16")
    fitting = [g for g in wanted or grids if g in GRIDS and fitting_grid(g, shape) == g]
    sizes = {grid: container_bytes(parts(grid, shape)) for grid in fitting}
    return [Candidate(grid, sizes[grid]) for grid in sorted(sizes, key=lambda grid: sizes[grid])]


def container_bytes(arrays: Sequence[Part]) -> int:
    """Bytes of arrays in the program, aligned."""
    return sum(-(-part.nbytes // ALIGNMENT) * ALIGNMENT for part in arrays)


def checked(name: str, grid: str, shape: tuple[int, int]) -> str:
    """Check that Core AI can store a tensor on a chosen grid, and return the grid.

    Raises:
        GridError: it cannot.
    """
    found = get_grid(grid)
    inner = found.inner.name if isinstance(found, SparseGrid) else grid
    if inner != grid:
        found.check(shape)
    if inner != grid and (inner[:4] in ("int2", "int4") or inner.endswith("-asym")):
        raise GridError(
            f"{name}: Core AI has no masks of zeros over {inner}: signed codes of 2 or 4 bits, or "
            "zero points",
            hint="targets.coreai.grid=lut4-g8, int8-channel or F16",
        )
    if inner not in GRIDS or fitting_grid(inner, shape) != inner:
        raise GridError(f"{name}: Core AI cannot store {shape[0]}×{shape[1]} as {grid}")
    return grid


def _entries(
    config: DecoderConfig, settings: Mapping[str, Any], choices: Mapping[str, str], prefix: str
) -> Iterator[PlanEntry]:
    shapes = WeightMap(config)
    table = (settings["context"], config.ropes[0].rotary_dim // 2)
    for rope in sorted({kind.rope for kind in config.kinds if kind.rope is not None}):
        end = f"_{rope}" if rope else ""
        for name in (f"rope.cos{end}", f"rope.sin{end}"):
            yield _entry(name, "F16", table)
    for name in shapes.names(tied_head=False, repeats=False):
        block, role, _ = split_name(name)
        shape = shapes.shape(name)
        if len(shape) == 1:
            yield _entry(name, "F32" if role.endswith("norm") else "F16", shape)
        elif role == "embed_positions":
            yield _entry(name, "F16", shape)
        elif name in choices:
            yield _entry(name, checked(name, choices[name], (shape[0], shape[1])), shape)
        else:
            asked = settings["embedding" if role == "embed_tokens" else "grid"]
            grid = fitting_grid(asked, (shape[0], shape[1]))
            note = "" if grid == asked else f"{shape[0]}×{shape[1]} does not divide into {asked}"
            if block is not None and prefix:  # not embeddings and head
                grid = checked(name, prefix + grid, (shape[0], shape[1]))
            yield _entry(name, grid, shape, note)


def _entry(name: str, grid: str, shape: tuple[int, ...], note: str = "") -> PlanEntry:
    nbytes = sum(part.nbytes for part in parts(grid, shape))
    target = name.replace("blocks.", "block_").replace(".", "_")
    return PlanEntry(name, target, grid, shape, nbytes, note)


def _notes(config: DecoderConfig, settings: Mapping[str, Any]) -> Iterator[str]:
    context = settings["context"]
    yield (
        "verified on its float32 twin in Apple's CPU runtime: the same packed bytes, with float16 "
        "widened to float32; what float16 costs on a device is not in the figures"
    )
    if context > DEFAULT_CONTEXT:
        yield (
            f"the KV cache may grow to {context} positions; beyond {DEFAULT_CONTEXT} wrong values "
            "were reported on an iPhone 17 Pro with a beta of iOS 27 (apple/coreai-models, issue "
            "124)"
        )
    most = config.rope_switch or config.max_context
    if most < config.max_position_embeddings and context == most:
        why = f"{config.ropes[0].kind} rotary factors are those for short prompts"
        if not config.ropes[0].original_context:
            why = f"attention changes beyond {context} positions"
        yield f"{why}: the bundle holds {context} positions, not {config.max_position_embeddings}"
