"""Plans the grid of every tensor and its exact bytes; reads no weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compress.decoder.config import DecoderConfig, WeightMap, split_name
from compress.errors import GridError
from compress.grids import get_grid
from compress.grids.biased import Biased
from compress.plan.shapes import Candidate, Plan, PlanEntry, PlanRequest, mix_name, tied_bits
from exporters.mlx.models import model_class, target_name, written_names

MXFP4 = "mxfp4"
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
GRIDS = (
    MXFP4,
    *(f"affine{b}-g{group}{kind}" for b in BITS for group in GROUP_SIZES for kind in ("", "-bf16")),
)
DEFAULTS: dict[str, Any] = {"bits": 4, "group_size": 64, "mode": "affine"}
FLOATS = {"float16": "F16", "bfloat16": "BF16"}  # the setting → the grid of what stays float
KV_BYTES = 2  # the cache has the type of the activations


def plan(config: DecoderConfig, request: PlanRequest) -> Plan:
    """Plan the MLX folder.

    Args:
        config: the model; mlx-lm's class computes its scalars itself, so none is folded.
        request: its settings are ``bits`` (default 4), ``group_size`` (64), ``mode`` (affine;
            with mxfp4, matrices of 4 bits are on that grid), ``embedding_bits``
            (default: as ``tied_bits`` where the head is the embedding, else ``bits``),
            ``head_bits`` (default: ``bits``), ``dtype`` of scales, biases and norms.

    Returns:
        Entries in the order of writing. A tied head has none.

    Raises:
        GridError: a chosen grid that does not fit a tensor.
        UnsupportedModelError: mlx-lm has no class for the model.
    """
    found = model_class(config)
    chosen, choices = DEFAULTS | dict(request.settings), request.choices
    chosen.setdefault("embedding_bits", tied_bits(config, chosen["bits"]))
    chosen.setdefault("head_bits", chosen["bits"])
    chosen.setdefault("dtype", "bfloat16" if found.wide else "float16")
    plain = found.plain_embedding and config.tie_word_embeddings
    entries = tuple(_entries(config, chosen, choices, plain=plain))
    context, notes = config.rope_switch or config.max_context, []
    if config.sliding_window is not None and config.sliding_window < context and not found.windows:
        context = config.sliding_window
        notes.append(
            f"mlx-lm ignores the sliding window of {context}: equal to the float model up to "
            f"{context} tokens"
        )
    if plain:
        notes.append(f"mlx-lm's {config.family} multiplies by the embedding itself: it stays float")
    return Plan(
        format="mlx",
        type_name=mix_name(entries, config) if choices else grid_name(chosen, chosen["bits"]),
        model_name=request.model_name,
        entries=entries,
        settings=chosen,
        notes=tuple(notes),
        max_context=context,
        kv_bytes_per_value=KV_BYTES,
    )


def candidates(
    entry: PlanEntry, settings: Mapping[str, Any], wanted: Sequence[str] = ()
) -> list[Candidate]:
    """See ``compress.formats``. Matrices that stay float have none."""
    if len(entry.shape) != 2 or entry.grid in FLOATS.values():
        return []
    kind = "-bf16" if settings["dtype"] == "bfloat16" else ""
    affine = [f"affine{bits}-g{group}{kind}" for bits in BITS for group in GROUP_SIZES]
    grids = wanted or [*affine, MXFP4]
    shape = (entry.shape[0], entry.shape[1])
    sizes = {
        grid: get_grid(grid).nbytes(shape)
        for grid in grids
        if grid in GRIDS and shape[1] % get_grid(grid).group_size == 0
    }
    return [Candidate(grid, sizes[grid]) for grid in sorted(sizes, key=lambda grid: sizes[grid])]


def _entries(
    config: DecoderConfig, settings: Mapping[str, Any], choices: Mapping[str, str], *, plain: bool
) -> Iterator[PlanEntry]:
    shapes, floats = WeightMap(config), FLOATS[settings["dtype"]]
    bits = {"embed_tokens": settings["embedding_bits"], "lm_head": settings["head_bits"]}
    stays = ("embed_positions", "conv", "embed_tokens" if plain else "")
    for name in written_names(config):
        _, role, _ = split_name(name)
        shape, note, grid = shapes.shape(name), "", floats
        if name in choices:
            grid = checked(name, choices[name], shape)
        elif len(shape) == 2 and role not in stays:
            asked = grid_name(settings, bits.get(role, settings["bits"]))
            grid = fitting_grid(asked, shape[1]) or floats
            note = "" if grid == asked else f"{shape[1]} columns do not divide into {asked}"
        if role == "conv":  # mlx's Conv1d has [channels, taps, 1]
            shape = (*shape, 1)
        nbytes = entry_bytes(grid, shape)
        yield PlanEntry(name, target_name(config, name), grid, shape, nbytes, note)


def grid_name(settings: Mapping[str, Any], bits: int) -> str:
    """``affine4-g64``, with the settings' group and type; or ``mxfp4``."""
    if bits == 4 and settings["mode"] == MXFP4:
        return MXFP4
    kind = "-bf16" if settings["dtype"] == "bfloat16" else ""
    return f"affine{bits}-g{settings['group_size']}{kind}"


def fitting_grid(asked: str, columns: int) -> str:
    """The grid, or that with the next smaller groups that divide the rows; empty for none: such a
    matrix stays float, as in mlx-lm."""
    grid = get_grid(asked)
    if not isinstance(grid, Biased):
        return asked if columns % grid.group_size == 0 else ""
    for size in (128, 64, 32):
        if size <= grid.group_size and columns % size == 0:
            return Biased(grid.bits, size, grid.bfloat16).name
    return ""


def checked(name: str, grid: str, shape: tuple[int, ...]) -> str:
    """Check that MLX can store a matrix on a chosen grid, and return the grid.

    Raises:
        GridError: it cannot.
    """
    if grid not in GRIDS or len(shape) != 2:
        raise GridError(f"{name}: MLX has no {grid} for it", hint="affine4-g64, affine8-g32 …")
    get_grid(grid).check((shape[0], shape[1]))
    return grid


def entry_bytes(grid: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's arrays."""
    if grid in FLOATS.values():
        return 2 * math.prod(shape)
    return get_grid(grid).nbytes((shape[0], shape[1]))
