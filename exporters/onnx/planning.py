"""Which tensor gets which grid, and its exact bytes. Arithmetic only; nothing is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from compress.arch import DecoderConfig, WeightMap
from compress.errors import GridError, UnsupportedModelError
from compress.grids import get_grid
from compress.model import Plan, PlanEntry

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
DEFAULTS: dict[str, Any] = {
    "bits": 4,
    "group_size": 32,
    "symmetric": True,
    "accuracy_level": 4,
}
# In the model's metadata: positions that the tables of cos and sin hold.
CONTEXT_KEY = "packlight.context"
# The cache is float32: GroupQueryAttention computes in the type of its cache.
KV_BYTES = 4
FLOAT_BYTES = {"F16": 2, "F32": 4}
# A browser cannot hold a larger external data file in one ArrayBuffer.
BROWSER_LIMIT = 2**31


def make_plan(config: DecoderConfig, settings: Mapping[str, Any], model_name: str) -> Plan:
    """Plan the ONNX artifact.

    Args:
        config: the model.
        settings: ``bits`` 4|8 (default 4), ``group_size`` 16…256 (32), ``symmetric`` (true),
            ``embedding_bits`` 4|8|16 and ``head_bits`` 4|8 (both default to ``bits``),
            ``accuracy_level`` 0|4 (4: MatMulNBits may round activations to int8).
        model_name: base name, for the report.

    Returns:
        Entries in the order of writing. Besides the weights there are two tables of cos and sin,
        ``rope.cos`` and ``rope.sin``, computed from the config. A tied head has no entry unless
        its grid differs from the embedding's: both nodes then read the same bytes.

    Raises:
        GridError: rows that the group size does not divide; the hint names one that does.
        UnsupportedModelError: rotary dimensions that GroupQueryAttention refuses.
    """
    if config.rope.rotary_dim % 16:
        raise UnsupportedModelError(
            f"onnx: {config.rope.rotary_dim} rotary dimensions per head are not a multiple of 16, "
            "which onnxruntime's GroupQueryAttention needs"
        )
    chosen = DEFAULTS | dict(settings)
    chosen.setdefault("embedding_bits", chosen["bits"])
    chosen.setdefault("head_bits", chosen["bits"])
    _check_group_size(config, chosen["group_size"])
    entries = tuple(_entries(config, chosen))
    return Plan(
        format="onnx",
        type_name=_grid_name(chosen, chosen["bits"]),
        model_name=model_name,
        entries=entries,
        settings=chosen,
        notes=tuple(_notes(config, sum(entry.nbytes for entry in entries))),
        max_context=config.max_context,
        kv_bytes_per_value=KV_BYTES,
    )


def _check_group_size(config: DecoderConfig, group_size: int) -> None:
    """One hint for the whole model, where a grid's own knows only one tensor."""
    columns = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "attention heads x head_dim": config.num_attention_heads * config.head_dim,
    }
    for what, size in columns.items():
        if size % group_size:
            fitting = [g for g in GROUP_SIZES if not any(n % g for n in columns.values())]
            raise GridError(
                f"onnx: group_size {group_size} does not divide rows of {size} ({what})",
                hint=f"group_size: {fitting[-1]} fits every row"
                if fitting
                else "no group_size between 16 and 256 fits every row",
            )


def weight_names(config: DecoderConfig) -> Iterator[str]:
    """Every stored weight and bias, in order of execution; q, k and v as one matrix."""
    yield "embed_tokens.weight"
    mlp = ("gate_proj", "up_proj", "down_proj") if config.gated_mlp else ("up_proj", "down_proj")
    roles = (*config.norm_roles, "qkv_proj", "o_proj", *mlp)
    stems = [
        (f"blocks.{block}.{role}", role)
        for block in range(0, config.num_hidden_layers, config.block_repeat)
        for role in roles
    ]
    for stem, role in (*stems, ("norm", "norm"), ("lm_head", "lm_head")):
        yield f"{stem}.weight"
        if config.has_bias(role):
            yield f"{stem}.bias"


def _entries(config: DecoderConfig, settings: Mapping[str, Any]) -> Iterator[PlanEntry]:
    shapes = WeightMap(config)
    embedding = _grid_name(settings, settings["embedding_bits"])
    head = _grid_name(settings, settings["head_bits"])
    body = _grid_name(settings, settings["bits"])
    for name in weight_names(config):
        shape = shapes.shape(name)
        if len(shape) == 1:
            yield _entry(name, "F32", shape)
        elif name == "embed_tokens.weight":
            yield _entry(name, embedding, shape)
        elif name != "lm_head.weight":
            yield _entry(name, body, shape)
        elif not (config.tie_word_embeddings and head == embedding):
            yield _entry(name, head, shape)
    table = (config.max_context, config.rope.rotary_dim // 2)
    yield _entry("rope.cos", "F32", table)
    yield _entry("rope.sin", "F32", table)


def _entry(name: str, grid: str, shape: tuple[int, ...]) -> PlanEntry:
    target = name.replace("blocks.", "model.layers.", 1)
    return PlanEntry(name, target, grid, shape, entry_bytes(grid, shape))


def entry_bytes(grid: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor on a grid."""
    if grid in FLOAT_BYTES:
        return math.prod(shape) * FLOAT_BYTES[grid]
    return get_grid(grid).nbytes((shape[0], shape[1]))


def _grid_name(settings: Mapping[str, Any], bits: int) -> str:
    if bits == 16:
        return "F16"
    kind = "" if settings["symmetric"] else "-asym"
    return f"int{bits}-g{settings['group_size']}{kind}"


def _notes(config: DecoderConfig, nbytes: int) -> Iterator[str]:
    if config.max_context < config.max_position_embeddings:
        yield (
            f"{config.rope.kind} rotary factors are those for short prompts: the artifact "
            f"holds {config.max_context} positions, not {config.max_position_embeddings}"
        )
    # optimum-onnx 0.1.0 takes the shape of the cache from its own reading of config.json.
    if (
        config.model_type in ("phi3", "phi")
        and config.num_key_value_heads != config.num_attention_heads
    ):
        yield (
            f"optimum-onnx 0.1.0 ignores num_key_value_heads for {config.model_type} and "
            "cannot run this folder; onnxruntime and ORT GenAI can"
        )
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        yield (
            "optimum-onnx 0.1.0 ignores head_dim and cannot run this folder; onnxruntime "
            "and ORT GenAI can"
        )
    if nbytes >= BROWSER_LIMIT:
        yield (
            "the external data file exceeds 2 GiB, more than a browser can load; "
            "a larger group_size makes it smaller"
        )
