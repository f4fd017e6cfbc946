"""Plans the grid of every tensor and its exact bytes; reads no weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from compress.checkpoint.scalars import folded_config
from compress.decoder.config import DecoderConfig, WeightMap, split_name
from compress.errors import GridError, UnsupportedModelError, UsageError
from compress.grids import get_grid
from compress.plan.shapes import (
    Candidate,
    Plan,
    PlanEntry,
    PlanRequest,
    mix_name,
    tied_bits,
    value_bits,
)
from exporters.onnx.packing import ALIGNMENT, layout

GROUP_SIZES = (16, 32, 64, 128, 256)
GRIDS = (
    *(
        f"int{bits}-g{group}{kind}"
        for bits in (4, 8)
        for group in GROUP_SIZES
        for kind in ("", "-asym")
    ),
    "F16",
)
# Candidate grids of a budget.
CHOICES = (
    *(f"int4-g{group}{kind}" for group in GROUP_SIZES for kind in ("", "-asym")),
    *(f"int8-g{group}" for group in (32, 64, 128, 256)),
)
DEFAULTS: dict[str, Any] = {
    "bits": 4,
    "group_size": 32,
    "symmetric": True,
    "accuracy_level": 4,
}
# Key of the model's metadata: positions of the tables of cos and sin.
CONTEXT_KEY = "packlight.context"
TYPE_KEY = "packlight.type"  # name of a chosen mix
# The cache is float32: GroupQueryAttention computes in the type of its cache.
KV_BYTES = 4
# Model types whose num_key_value_heads, and whose head_dim, optimum-onnx 0.1.0 reads.
OPTIMUM_GROUPED = frozenset(
    (
        "arcee", "cohere", "falcon", "gemma", "gemma3_text", "glm", "granite", "helium", "llama",
        "mistral", "nemotron", "qwen2", "qwen3", "smollm3", "stablelm",
    )
)  # fmt: skip
OPTIMUM_WIDE = frozenset(("gemma", "gemma3_text", "nemotron"))
# Model types that Transformers.js 4.3 does not load; of falcon, it wants keys and values in one.
NOT_IN_TRANSFORMERS_JS = frozenset(
    (
        "exaone4", "falcon", "glm4", "granitemoe", "granitemoeshared", "mixtral", "nemotron",
        "olmoe",
    )
)  # fmt: skip
FLOAT = ("embed_positions", "router", "shared_gate")  # matrices that are not quantized
FLOAT_BYTES = {"F16": 2, "F32": 4}
# A browser cannot hold a larger external data file in one ArrayBuffer.
BROWSER_LIMIT = 2**31


def plan(config: DecoderConfig, request: PlanRequest) -> Plan:
    """Plan the ONNX artifact.

    Args:
        config: the model.
        request: its settings are ``bits`` 4|8 (default 4), ``group_size`` 16…256 (32),
            ``symmetric`` (true), ``embedding_bits`` 4|8|16 and ``head_bits`` 4|8 (both
            default to ``bits``; where they are one matrix, each to the other, else to
            ``tied_bits``), ``value_bits`` 4|8 (of v_proj; default: ``value_bits``),
            ``accuracy_level`` 0|4 (4: MatMulNBits may round activations to int8), ``context``
            (positions of the tables; default: the model's).

    Returns:
        Entries in the order of writing, with two computed tables, ``rope.cos`` and ``rope.sin``. A
        tied head has an entry only if its grid differs from the embedding's; else both nodes read
        the same bytes. q, k and v are one entry, except where v has other bits.

    Raises:
        GridError: the group size does not divide the rows; the hint names one that does.
        UnsupportedModelError: rotary dimensions that GroupQueryAttention does not support.
        UsageError: more context than the model has.
    """
    folded = config.scalars
    if folded:
        config = folded_config(config, folded)
    if any(kind.rope is not None for kind in config.kinds) and config.ropes[0].rotary_dim % 16:
        raise UnsupportedModelError(
            f"onnx: {config.ropes[0].rotary_dim} rotary dimensions per head are not a multiple of "
            "16, which onnxruntime's GroupQueryAttention needs"
        )
    chosen, choices = DEFAULTS | dict(request.settings), request.choices
    bits = tied_bits(config, chosen["bits"])
    if config.tie_word_embeddings:  # one matrix for both, except beside a float16 embedding
        chosen.setdefault("embedding_bits", chosen.get("head_bits", bits))
        if chosen["embedding_bits"] != 16:
            chosen.setdefault("head_bits", chosen["embedding_bits"])
    chosen = {"embedding_bits": bits, "head_bits": bits} | chosen
    chosen.setdefault("value_bits", value_bits(config, chosen["bits"]))
    context = int(chosen.get("context") or config.max_context)
    if context > config.max_context:
        raise UsageError(
            f"targets.onnx.context is {context}, the model has {config.max_context} positions"
        )
    _check_group_size(config, chosen["group_size"])
    entries = tuple(_entries(config, chosen, choices))
    if choices:  # the graph's name has the bits of its linears
        matrices = [e for e in entries if e.name != "embed_tokens.weight"]
        linears = [e.grid for e in matrices if candidates(e, chosen)]
        chosen["bits"] = 4 if any(get_grid(grid).bits == 4 for grid in linears) else 8
    return Plan(
        format="onnx",
        type_name=mix_name(entries, config) if choices else _grid_name(chosen, chosen["bits"]),
        model_name=request.model_name,
        entries=entries,
        settings=chosen,
        notes=tuple(_notes(config, entries, context, int(chosen["accuracy_level"]))),
        max_context=context,
        kv_bytes_per_value=KV_BYTES,
        folded=folded,
    )


def _check_group_size(config: DecoderConfig, group_size: int) -> None:
    """Refuse a group size that does not fit, with a hint for the whole model: a grid's own error
    knows only one tensor."""
    columns = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "attention heads x head_dim": config.num_attention_heads * config.head_dim,
    }
    if config.experts is not None:
        columns["intermediate_size"] = config.experts.width
        columns["the shared expert's width"] = config.experts.shared_width
    for what, size in columns.items():
        if size % group_size:
            fitting = [g for g in GROUP_SIZES if not any(n % g for n in columns.values())]
            raise GridError(
                f"onnx: group_size {group_size} does not divide rows of {size} ({what})",
                hint=f"group_size: {fitting[-1]} fits every row"
                if fitting
                else "no group_size between 16 and 256 fits every row",
            )


def candidates(
    entry: PlanEntry, settings: Mapping[str, Any], wanted: Sequence[str] = ()
) -> list[Candidate]:
    """See ``compress.formats``."""
    if len(entry.shape) != 2 or not entry.name.endswith(".weight"):
        return []
    if split_name(entry.name)[1] in FLOAT:
        return []
    embedding = entry.name == "embed_tokens.weight"
    grids = [
        grid
        for grid in wanted or (*CHOICES, "F16")
        if (embedding if grid == "F16" else entry.shape[1] % get_grid(grid).group_size == 0)
    ]
    sizes = {grid: layout_bytes(replace(entry, grid=grid)) for grid in grids}
    return [Candidate(grid, sizes[grid]) for grid in sorted(sizes, key=lambda grid: sizes[grid])]


def checked(name: str, grid: str, columns: int) -> str:
    """Check that the runtime supports a chosen grid for a tensor, and return the grid.

    Raises:
        GridError: it does not.
    """
    if grid not in GRIDS or (grid == "F16" and name != "embed_tokens.weight"):
        raise GridError(f"{name}: onnxruntime has no {grid} for it", hint=", ".join(CHOICES))
    if grid != "F16" and columns % get_grid(grid).group_size:
        raise GridError(f"{name}: {grid} does not divide rows of {columns}")
    return grid


def layout_bytes(entry: PlanEntry) -> int:
    """Bytes of an entry's arrays in the data file, each padded to a multiple of 64."""
    return sum(-(-piece.nbytes // ALIGNMENT) * ALIGNMENT for piece in layout([entry]).values())


def _entries(
    config: DecoderConfig, settings: Mapping[str, Any], choices: Mapping[str, str]
) -> Iterator[PlanEntry]:
    shapes = WeightMap(config)
    embedding = _grid_name(settings, settings["embedding_bits"])
    head = _grid_name(settings, settings["head_bits"])
    body, value = (_grid_name(settings, settings[key]) for key in ("bits", "value_bits"))
    fused = ("qkv_proj", "experts") if value == body else ("experts",)
    for name in shapes.names(repeats=False, fused=fused):
        if ".experts.up_proj" in name:  # its rows are among those of the gate
            continue
        name = name.replace(".experts.gate_proj", ".experts.gate_up_proj")
        shape = shapes.shape(name)
        if len(shape) == 1 or split_name(name)[1] in ("router", "shared_gate"):
            yield _entry(name, "F32", shape)
        elif name == "embed_positions.weight":
            yield _entry(name, "F16", shape)
        elif name in choices:
            yield _entry(name, checked(name, choices[name], shape[1]), shape)
        elif name == "embed_tokens.weight":
            yield _entry(name, embedding, shape)
        elif name != "lm_head.weight":
            yield _entry(name, value if name.endswith(".v_proj.weight") else body, shape)
        elif not (config.tie_word_embeddings and head == embedding):
            yield _entry(name, head, shape)
    table = (settings.get("context") or config.max_context, config.ropes[0].rotary_dim // 2)
    for rope in sorted({kind.rope for kind in config.kinds if kind.rope is not None}):
        for name in rope_names(rope):
            yield _entry(name, "F32", table)


def rope_names(rope: int) -> tuple[str, str]:
    """Names of the tables of a rotary embedding, an index into ``DecoderConfig.ropes``."""
    return ("rope.cos", "rope.sin") if rope == 0 else (f"rope.cos_{rope}", f"rope.sin_{rope}")


def _entry(name: str, grid: str, shape: tuple[int, ...]) -> PlanEntry:
    target = name.replace("blocks.", "model.layers.", 1)
    return PlanEntry(name, target, grid, shape, entry_bytes(grid, shape))


def entry_bytes(grid: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor on a grid."""
    if grid in FLOAT_BYTES:
        return math.prod(shape) * FLOAT_BYTES[grid]
    *many, columns = shape  # rows, or experts and rows
    return get_grid(grid).nbytes((math.prod(many), columns))


def _grid_name(settings: Mapping[str, Any], bits: int) -> str:
    if bits == 16:
        return "F16"
    kind = "" if settings["symmetric"] else "-asym"
    return f"int{bits}-g{settings['group_size']}{kind}"


def _notes(
    config: DecoderConfig, entries: Sequence[PlanEntry], context: int, accuracy_level: int
) -> Iterator[str]:
    nbytes = sum(entry.nbytes for entry in entries)
    tables = sum(entry.nbytes for entry in entries if entry.name.startswith("rope."))
    if 100 * tables > nbytes:
        yield (
            f"tables of cos and sin for {context} positions are {tables:,} bytes, "
            f"{100 * tables / nbytes:.1f} % of the file; a smaller targets.onnx.context makes "
            "them smaller"
        )
    if config.max_context < config.max_position_embeddings and context == config.max_context:
        why = f"{config.ropes[0].kind} rotary factors are those for short prompts"
        if not config.ropes[0].original_context:
            why = f"attention changes beyond {config.max_context} positions"
        yield (
            f"{why}: the artifact holds {config.max_context} positions, not "
            f"{config.max_position_embeddings}"
        )
    if config.experts is not None and any(
        ".experts." in entry.name and entry.grid.startswith("int8") for entry in entries
    ):
        yield "onnxruntime rounds the inputs of experts of 8 bits to int8; of 4 bits it need not"
    if config.model_type in NOT_IN_TRANSFORMERS_JS:
        yield (f"Transformers.js 4.3 cannot run {config.model_type}; onnxruntime and ORT GenAI can")
    elif config.experts is not None:
        # Its onnxruntime's QMoE has no such attribute; that of WebGPU ignores the router's weights.
        elsewhere = ", elsewhere with targets.onnx.accuracy_level=0 only" if accuracy_level else ""
        yield f"Transformers.js 4.3 does not run experts right on WebGPU{elsewhere}"
    # optimum-onnx 0.1.0 computes the shape of the cache from config.json itself.
    if (
        config.model_type not in OPTIMUM_GROUPED
        and config.num_key_value_heads != config.num_attention_heads
    ):
        yield (
            f"optimum-onnx 0.1.0 ignores num_key_value_heads for {config.model_type} and "
            "cannot run this folder; onnxruntime and ORT GenAI can"
        )
    if (
        config.head_dim * config.num_attention_heads != config.hidden_size
        and config.model_type not in OPTIMUM_WIDE
    ):
        yield (
            "optimum-onnx 0.1.0 ignores head_dim and cannot run this folder; onnxruntime "
            "and ORT GenAI can"
        )
    if nbytes >= BROWSER_LIMIT:
        yield (
            "the external data file exceeds 2 GiB, more than a browser can load; "
            "a larger group_size makes it smaller"
        )
