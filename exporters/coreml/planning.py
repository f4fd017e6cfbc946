"""Plans the grid of every tensor, its storage in Core ML, and its exact bytes; reads no weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from compress.checkpoint.scalars import folded_config
from compress.decoder.config import DecoderConfig, WeightMap, split_name
from compress.errors import GridError, UnsupportedModelError, UsageError
from compress.grids import Grid, get_grid
from compress.grids.affine import Affine
from compress.grids.dense import DenseGrid
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
    value_bits,
)
from exporters.coreml.blobs import BITS

GROUPS = ("g16", "g32", "g64", "g128", "g256", "channel")
ROW_GROUPS = ("g1", "g2", "g4", "g8", "g16", "g32", "tensor")
GRIDS = (
    *(f"int{bits}-{g}{kind}" for bits in (4, 8) for g in GROUPS for kind in ("", "-asym")),
    *(f"lut{bits}-{g}" for bits in (1, 2, 3, 4, 6, 8) for g in ROW_GROUPS),
    "F16",
)
# Candidate grids of a budget. Palettes of fewer than eight rows are slow on the Neural Engine.
PALETTES = ("lut2-g8", "lut3-g16", "lut3-g8", "lut4-g16", "lut4-g8", "lut6-g16", "lut6-g8")
BLOCKS = ("int4-g128", "int4-g64", "int4-g32", "int4-g32-asym", "int8-channel", "int8-g32")
GPU, ANE = "iphone-gpu", "iphone-ane"  # presets
DEFAULTS: dict[str, Any] = {"preset": GPU, "grid": "int4-g32", "deployment": "iOS18"}
ANE_GRID = "lut4-g32"
DEFAULT_CONTEXT = 2048
GRID_KEYS = ("grid", "embedding", "value")
IN_VAIN = (
    "palettes are for the Neural Engine, which a package of flexible shapes and states cannot "
    "reach (targets.coreml.preset=iphone-ane can); on the GPU int4-g32 loses less"
)
# weight.bin: a 64-byte header; each array has a 64-byte record, and both start at multiples of 64.
ALIGNMENT = 64
FLOATS = {"F16": "fp16", "F32": "fp32"}  # grid → MIL's type of a plain constant
IMMEDIATE = 10  # arrays of fewer elements are stored in the graph, as by coremltools
NEURAL_ENGINE_MULTIPLE = 32


# Names of the mask and the nonzero codes, by the name of the codes of a dense tensor.
SPARSE_NAMES = {
    "val": ("mask", "nonzero_data"),
    "indices": ("indices_mask", "indices_nonzero_data"),
    "data": ("data_mask", "nonzero_data"),
}


@dataclass(frozen=True)
class Part:
    """One array of a stored tensor.

    Attributes:
        name: its parameter in the MIL operation: ``data``, ``scale``, ``offset``, ``indices``,
            ``lut``; ``val`` for a plain constant.
        dtype: MIL's: ``int4``, ``uint3``, ``fp16`` …
        ones: number of ones in each row of a mask.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    ones: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes in the file; sub-byte integers are packed without gaps."""
        return (math.prod(self.shape) * BITS[self.dtype] + 7) // 8

    @property
    def in_graph(self) -> bool:
        """Whether it is stored in the program: plain constants of few elements. The program is made
        before weights are quantized, so small palettes are not."""
        return self.name == "val" and math.prod(self.shape) < IMMEDIATE


def parts(grid: str | Grid, shape: tuple[int, ...]) -> tuple[Part, ...]:
    """The arrays in which Core ML stores a tensor on a grid.

    ``int4`` and ``int8`` are signed and centered where symmetric, else unsigned with an offset;
    palettes have one table per group of rows, ``[groups, 1, levels, 1]``.

    Raises:
        GridError: a grid that Core ML does not support.
    """
    if isinstance(grid, str):
        if grid in FLOATS:
            return (Part("val", FLOATS[grid], shape),)
        grid = get_grid(grid)
    match grid:
        case DenseGrid(name="F16"):  # as the inner grid of a sparse one
            return (Part("val", "fp16", shape),)
        case SparseGrid():
            return sparse_parts(grid, (shape[0], shape[1]))
        case Palette():
            table = (grid.groups((shape[0], shape[1])), 1, grid.levels, 1)
            return Part("indices", f"uint{grid.bits}", shape), Part("lut", "fp16", table)
        case Affine():
            scales = (shape[0], grid.groups((shape[0], shape[1])))
            scale = Part("scale", "fp16", scales)
            if grid.symmetric:
                return Part("data", f"int{grid.bits}", shape), scale
            unsigned = f"uint{grid.bits}"
            return Part("data", unsigned, shape), scale, Part("offset", unsigned, scales)
    raise GridError(f"Core ML does not store {grid.name}")


def sparse_parts(grid: SparseGrid, shape: tuple[int, int]) -> tuple[Part, ...]:
    """``parts`` of a sparse grid: a mask bit for every weight, and the nonzero weights' codes.

    The parameters are those of ``constexpr_sparse_to_dense``, ``constexpr_lut_to_sparse`` and
    ``constexpr_sparse_blockwise_shift_scale``.
    """
    codes, *others = parts(grid.inner, shape)
    count = grid.pattern.count(shape[1])
    mask, values = SPARSE_NAMES[codes.name]
    there = Part(values, codes.dtype, (shape[0] * count,))
    return Part(mask, "uint1", shape, count), there, *others


def plan(config: DecoderConfig, request: PlanRequest) -> Plan:
    """Plan the Core ML artifact.

    Args:
        config: the model.
        request: its settings are ``grid`` (default ``int4-g32``), ``embedding`` (default: as
            ``grid``, with the bits of ``tied_bits``), ``preset`` (``iphone-gpu`` or
            ``iphone-ane``, see ``exporters.coreml.ane``), ``value`` (of v_proj;
            default: as ``grid``, with the bits of ``value_bits``), ``deployment``
            (``iOS18``), ``context`` (slots of the KV cache; default 2048 or what the model
            has), ``sparsity`` of the blocks' linears (``none``).

    Returns:
        Entries in the order of writing, one for every stored weight (norms and LayerNorm biases
        in float32, linears' biases in float16) and two rotary tables, ``rope.cos`` and
        ``rope.sin``. A tied head has none. ``settings`` gains ``container_bytes``: what
        ``weight.bin`` holds in addition (records, alignment, the zero biases that MIL requires).

    Raises:
        GridError: a grid that Core ML cannot store.
        UnsupportedModelError: a deployment target other than iOS 18.
        UsageError: more context than the model has.
    """
    chosen, choices = DEFAULTS | dict(request.settings), request.choices
    most = config.rope_switch or config.max_context
    if chosen["preset"] == ANE:
        chosen["grid"] = request.settings.get("grid", ANE_GRID)
    asked = [key for key in GRID_KEYS if key in chosen]
    if request.context is not None:
        chosen["context"] = min(request.context, config.rope_switch or request.context)
    chosen.setdefault("embedding", with_bits(chosen["grid"], partial(tied_bits, config)))
    chosen.setdefault("value", with_bits(chosen["grid"], partial(value_bits, config)))
    chosen.setdefault("context", min(DEFAULT_CONTEXT, most))
    folded = config.scalars
    if config.experts is not None:
        raise UnsupportedModelError(
            "coreml: experts are not supported: the Neural Engine cannot choose weights by token, "
            "so that it would have to run all experts for every token",
        )
    if any(kind.taps for kind in config.kinds):
        raise UnsupportedModelError(
            "coreml: layers that convolve in place of attention are not supported: packlight has "
            "no Core ML state for them"
        )
    if folded:
        config = folded_config(config, folded)
    _check(config, chosen)
    if chosen["preset"] == ANE:
        from exporters.coreml.ane.planning import plan_chunks

        return plan_chunks(config, chosen, choices, request.model_name, folded)
    prefix = ""
    if chosen.get("sparsity", "none") != "none" and (pattern := pattern_of(chosen["sparsity"])):
        prefix = f"{pattern.name}-"
    entries = tuple(_entries(config, chosen, choices, prefix))
    sparse = [entry for entry in entries if entry.grid not in (*GRIDS, *FLOATS)]
    chosen["container_bytes"] = weight_file_bytes(config, entries) - sum(e.nbytes for e in entries)
    return Plan(
        format="coreml",
        type_name=mix_name(entries, config) if choices else prefix + chosen["grid"],
        model_name=request.model_name,
        entries=entries,
        settings=chosen,
        notes=(*context_notes(config, chosen), *(sparse_notes(sparse) if sparse else ())),
        max_context=chosen["context"],
        folded=folded,
        doubt=next(
            (f"{key} {chosen[key]}: {IN_VAIN}" for key in asked if "lut" in chosen[key]), ""
        ),
    )


def with_bits(name: str, wanted: Callable[[int], int]) -> str:
    """A grid's name with the bits that are wanted instead of its own. Palettes with other bits
    become ``int8-channel``, which the Neural Engine runs as well."""
    grid = get_grid(name) if name in GRIDS else None
    if not isinstance(grid, (Affine, Palette)) or (bits := wanted(grid.bits)) == grid.bits:
        return name
    return replace(grid, bits=bits).name if isinstance(grid, Affine) else "int8-channel"


def _check(config: DecoderConfig, settings: Mapping[str, Any]) -> None:
    for key in GRID_KEYS:
        if settings[key] not in GRIDS:
            raise GridError(
                f"coreml: {key} {settings[key]!r} is not a grid that Core ML stores",
                hint="int4-g32, int8-channel, int4-g128-asym, lut4-g8, lut6-tensor, F16 …",
            )
    if settings["deployment"] != "iOS18":
        raise UnsupportedModelError(
            f"coreml: deployment {settings['deployment']!r} is not supported",
            hint="iOS18 (also macOS 15): the first with states and 4-bit weights",
        )
    context = settings["context"]
    most = config.rope_switch or config.max_context
    if not 2 <= context <= most:
        raise UsageError(
            f"coreml: context {context} is not between 2 and the {most} positions of this model",
            hint=f"--context {most}, or targets.coreml.context in the recipe",
        )


def candidates(
    entry: PlanEntry, settings: Mapping[str, Any], wanted: Sequence[str] = ()
) -> list[Candidate]:
    """See ``compress.formats``.

    With palettes in the settings, which the Neural Engine runs, there are no candidates of integer
    blocks, which it does not.
    """
    if len(entry.shape) != 2 or not entry.name.endswith(".weight"):
        return []
    if entry.name == "embed_positions.weight":
        return []
    shape = (entry.shape[0], entry.shape[1])
    palettes = settings["preset"] == ANE or isinstance(get_grid(settings["grid"]), Palette)
    grids = [*PALETTES, "int8-channel"] if palettes else [*PALETTES, *BLOCKS]
    if entry.name == "embed_tokens.weight":
        grids.append("F16")
    fitting = [grid for grid in wanted or grids if fitting_grid(grid, shape) == grid]
    sizes = {grid: container_bytes(parts(grid, shape)) for grid in fitting}
    return [Candidate(grid, sizes[grid]) for grid in sorted(sizes, key=lambda grid: sizes[grid])]


def checked(name: str, grid: str, shape: tuple[int, int]) -> str:
    """Check that Core ML can store a tensor on a chosen grid, and return the grid.

    Raises:
        GridError: it cannot.
    """
    try:
        inner = dense_name(grid)
    except GridError:  # no such grid
        inner = ""
    if inner and inner != grid:
        get_grid(grid).check(shape)
    if inner not in GRIDS or fitting_grid(inner, shape) != inner:
        raise GridError(f"{name}: Core ML cannot store {shape[0]}×{shape[1]} as {grid}")
    return grid


def _entries(
    config: DecoderConfig, settings: Mapping[str, Any], choices: Mapping[str, str], prefix: str
) -> Iterator[PlanEntry]:
    shapes = WeightMap(config)
    table = (settings["context"], config.ropes[0].rotary_dim // 2)
    for rope in sorted({kind.rope for kind in config.kinds if kind.rope is not None}):
        end = f"_{rope}" if rope else ""
        for name in (f"rope.cos{end}", f"rope.sin{end}"):
            yield planned(name, "F16", table)
    for name in shapes.names(tied_head=False, repeats=False):
        block, role, _ = split_name(name)
        shape = shapes.shape(name)
        if len(shape) == 1:
            yield planned(name, "F32" if role.endswith("norm") else "F16", shape)
            continue
        if role == "embed_positions":
            yield planned(name, "F16", shape)
            continue
        if name in choices:
            yield planned(name, checked(name, choices[name], (shape[0], shape[1])), shape)
            continue
        asked = settings[{"embed_tokens": "embedding", "v_proj": "value"}.get(role, "grid")]
        grid = fitting_grid(asked, (shape[0], shape[1]))
        note = "" if grid == asked else f"{shape[0]}×{shape[1]} does not divide into {asked}"
        if block is not None and prefix:  # not embeddings and head
            grid = checked(name, prefix + grid, (shape[0], shape[1]))
        yield planned(name, grid, shape, note)


def planned(name: str, grid: str, shape: tuple[int, ...], note: str = "") -> PlanEntry:
    nbytes = sum(part.nbytes for part in parts(grid, shape))
    # MIL allows letters, digits and underscores.
    target = name.replace("blocks.", "block_").replace(".", "_")
    return PlanEntry(name, target, grid, shape, nbytes, note)


def dense_name(grid: str) -> str:
    """A grid's name, or its inner grid's where it is sparse: ``2of4-lut4-g8`` → ``lut4-g8``."""
    found = get_grid(grid)
    return found.inner.name if isinstance(found, SparseGrid) else grid


def weight_file_bytes(config: DecoderConfig, entries: tuple[PlanEntry, ...]) -> int:
    """Bytes of ``weight.bin``, exact except for the unwritten padding of its last array."""
    arrays = [part for entry in entries for part in parts(entry.grid, entry.shape)]
    # Linears without a bias share one vector of zeros per number of rows.
    roles = [role for role in (*config.linear_roles, "lm_head") if not config.has_bias(role)]
    rows = {config.weight_shape(role)[0] for role in roles}
    arrays += [Part("val", "fp16", (size,)) for size in sorted(rows)]
    return ALIGNMENT + container_bytes(arrays)


def container_bytes(arrays: Iterable[Part]) -> int:
    """Bytes of arrays in ``weight.bin``, each with its record, both aligned."""
    sizes = (part.nbytes for part in arrays if not part.in_graph)
    return sum(ALIGNMENT + -(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def context_notes(config: DecoderConfig, settings: Mapping[str, Any]) -> Iterator[str]:
    context = settings["context"]
    cache = context * config.kv_cache_bytes_per_token()
    yield (
        f"the KV cache is allocated whole, {cache:,} bytes for {context} positions, and "
        "its size costs speed: a smaller context is faster"
    )
    most = config.rope_switch or config.max_context
    if most < config.max_position_embeddings and context == most:
        why = f"{config.ropes[0].kind} rotary factors are those for short prompts"
        if not config.ropes[0].original_context:
            why = f"attention changes beyond {context} positions"
        yield f"{why}: the package holds {context} positions, not {config.max_position_embeddings}"
    if config.head_dim % NEURAL_ENGINE_MULTIPLE:
        yield (
            f"heads of {config.head_dim} are not a multiple of 32, which the Neural "
            "Engine is reported to refuse for states; CPU and GPU take them"
        )


def sparse_notes(sparse: Sequence[PlanEntry]) -> Iterator[str]:
    """Notes on the bytes that sparse grids save."""
    weights = sum(math.prod(entry.shape) for entry in sparse)
    dense = sum(planned(e.name, dense_name(e.grid), e.shape).nbytes for e in sparse)
    now, before = (8 * n / weights for n in (sum(e.nbytes for e in sparse), dense))
    saved = "" if now < before else ": nothing is saved"
    yield (
        f"sparse linears take {now:.3f} bits per weight, {before:.3f} without zeros{saved}. The "
        "file has a mask bit for every weight, so the break-even is a quarter of zeros at 4 bits, "
        "an eighth at 8; whether zeros save time is up to the device"
    )
