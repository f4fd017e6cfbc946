"""Plans the tensors of a GGUF file from a ``DecoderConfig`` and a type name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compress.checkpoint.scalars import folded_config
from compress.decoder.config import DecoderConfig, WeightMap, split_name
from compress.errors import GridError, UnsupportedModelError, did_you_mean
from compress.plan.shapes import Candidate, Plan, PlanEntry, PlanRequest, mix_name
from exporters.gguf.architectures import ARCHITECTURES, Architecture
from exporters.gguf.metadata import ROPE_TENSORS, rope_tensors, target_name
from exporters.gguf.mixes import BLOCKS, Mix, fitting, tensor_bytes
from exporters.gguf.tokenizer import read_vocabulary

GRIDS = tuple(BLOCKS)  # ggml's types, of which presets are mixed

FLOAT = ("embed_positions", "router", "shared_gate", "conv")  # matrices that stay float32

# llama.cpp rounds a context up to a multiple of this (GGML_PAD in llama-context.cpp).
CONTEXT_STEP = 256

# Candidate grids of a budget. Rows that are multiples of 256: the K-quants, which are better than
# the older types at the same bytes, and IQ4_NL's table; other rows: types with blocks of 32.
WIDE = (
    "Q2_K", "IQ3_XXS", "Q3_K", "IQ3_S", "IQ4_XS", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "Q8_0",
)  # fmt: skip
NARROW = ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def plan(config: DecoderConfig, request: PlanRequest) -> Plan:
    """See ``compress.formats``; the setting is ``type`` (default Q4_K_M). With input statistics,
    llama.cpp's presets give fewer tensors more bits.

    Raises:
        GridError: an unknown type.
        CheckpointError: a damaged tokenizer.
        UnsupportedModelError: a model or a tokenizer that llama.cpp cannot express.
    """
    architecture = ARCHITECTURES[config.family]
    folded = config.scalars - architecture.own
    if (
        "attention" in folded
        and config.attention_scale == (config.hidden_size / config.num_attention_heads) ** -0.5
        and LARGEST.get(architecture.name) == config.num_hidden_layers
    ):
        folded -= {"attention"}
    if architecture.name == "gpt2" and not config.qkv_bias:  # the graph has them
        folded |= {"bias"}
    if folded:
        config = folded_config(config, folded)
    check_expressible(config)
    importance = bool(request.importance or request.settings.get("importance", False))
    mix = Mix.parse(str(request.settings.get("type", "Q4_K_M")), importance=importance)
    entries = tuple(plan_entries(config, mix, request.choices))
    context, caveats = context_limit(config)
    if request.tokenizer:
        caveats += read_vocabulary(request.tokenizer, config).notes
    fallbacks = Counter(entry.note for entry in entries if entry.note)
    notes = [f"{n} tensor{'s' if n > 1 else ''} in {note}" for note, n in fallbacks.items()]
    return Plan(
        format="gguf",
        type_name=mix_name(entries, config) if request.choices else mix.name,
        model_name=request.model_name,
        entries=entries,
        settings={"type": mix.name, **({"importance": True} if importance else {})},
        notes=(*notes, *caveats),
        max_context=context,
        folded=folded,
    )


def plan_entries(
    config: DecoderConfig, mix: Mix, choices: Mapping[str, str]
) -> Iterator[PlanEntry]:
    """Every tensor of the file, in order of writing.

    Raises:
        GridError: a choice that the tensor's rows cannot hold.
    """
    weights = WeightMap(config)
    architecture = ARCHITECTURES[config.family]
    # llama.cpp reuses token_embd.
    for name in weights.names(tied_head=False, fused=architecture.fused):
        block, role, kind = split_name(name)
        shape = weights.shape(name)
        grid, note = "F32", ""  # norms and biases
        if role == "shared_gate":
            shape = shape[1:]
        target = target_name(name, architecture.renamed)
        if role.startswith("experts.") and config.experts and config.experts.packed:
            grid = "MXFP4" if kind == "weight" else grid
        elif kind == "weight" and len(shape) > 1 and role not in FLOAT:
            grid, note = fitting(mix.wish(role, block or 0, config), shape[-1])
            if name in choices:
                grid, note = choices[name], ""
                check_choice(name, grid, shape[-1])
        yield PlanEntry(name, target, grid, shape, tensor_bytes(grid, shape), note)
    for name, values in rope_tensors(config).items():
        shape = (len(values),)
        yield PlanEntry(name, ROPE_TENSORS[name], "F32", shape, tensor_bytes("F32", shape))


def check_choice(name: str, grid: str, columns: int) -> None:
    """Refuse a chosen type that does not fit rows of ``columns`` weights.

    Raises:
        GridError: not a ggml type, or its blocks do not divide the row.
    """
    if grid not in BLOCKS:
        raise GridError(f"{name}: there is no GGUF type {grid!r}", hint=did_you_mean(grid, BLOCKS))
    if columns % BLOCKS[grid][0]:
        raise GridError(
            f"{name}: rows of {columns} are not a multiple of {BLOCKS[grid][0]}, which {grid} needs"
        )


def candidates(
    entry: PlanEntry, settings: Mapping[str, Any], wanted: Sequence[str] = ()
) -> list[Candidate]:
    """See ``compress.formats``: llama.cpp loads any type for any matrix."""
    if len(entry.shape) != 2 or not entry.name.endswith(".weight"):
        return []
    if split_name(entry.name)[1] in FLOAT:
        return []
    columns = entry.shape[1]
    grids = list(WIDE if columns % 256 == 0 else NARROW if columns % 32 == 0 else ("F16",))
    if entry.name == "embed_tokens.weight":
        grids.append("F16")
    fitting = [grid for grid in wanted or dict.fromkeys(grids) if columns % BLOCKS[grid][0] == 0]
    # Tensors start at multiples of the file's alignment.
    sizes = {grid: -(-tensor_bytes(grid, entry.shape) // 32) * 32 for grid in fitting}
    return [Candidate(grid, sizes[grid]) for grid in sorted(sizes, key=lambda grid: sizes[grid])]


def check_expressible(config: DecoderConfig) -> None:
    """Refuse what llama.cpp's graphs cannot express.

    Raises:
        UnsupportedModelError: with the reason.
    """
    architecture = ARCHITECTURES[config.family]
    arch = architecture.name
    width = config.num_attention_heads * config.head_dim
    if arch in NARROW_HEADS and width != config.hidden_size:
        raise UnsupportedModelError(
            f"llama.cpp's {arch} needs heads x head_dim ({width}) to equal hidden_size "
            f"({config.hidden_size})",
            hint="a model with pruned heads can go to onnx or coreml",
        )
    rotates = any(kind.rope is not None for kind in config.kinds)
    if rotates and architecture.whole_heads and config.ropes[0].rotary_dim != config.head_dim:
        raise UnsupportedModelError(f"llama.cpp's {arch} rotates whole heads, this model does not")
    if (
        config.ropes[0].kind in ("llama3", "longrope")
        and config.ropes[0].kind not in architecture.factors
    ):
        raise UnsupportedModelError(
            f"llama.cpp's {arch} has no {config.ropes[0].kind} rope scaling",
        )
    if (
        config.ropes[0].yarn is not None
        and not config.ropes[0].yarn.usual
        and arch not in EXACT_YARN
    ):
        raise UnsupportedModelError(
            f"llama.cpp's {arch} has yarn with its usual bounds only, not this model's beta_fast, "
            "beta_slow or truncate"
        )
    if arch in ("qwen2", "qwen3") and (config.o_bias or (arch == "qwen3" and config.qkv_bias)):
        raise UnsupportedModelError(f"llama.cpp's {arch} has no place for these attention biases")
    if len(config.kinds) > 1:
        check_layers(config, arch)
    if config.experts is not None:
        check_experts(config, architecture)
    if config.ropes[0].kind == "longrope" and config.ropes[0].original_context < CONTEXT_STEP:
        raise UnsupportedModelError(
            f"longrope with an original context of {config.ropes[0].original_context}: llama.cpp "
            f"rounds contexts up to {CONTEXT_STEP} and would use the long factors"
        )
    if config.rope_switch % CONTEXT_STEP:
        raise UnsupportedModelError(
            f"longrope beyond an original context of {config.rope_switch}: llama.cpp rounds "
            f"contexts up to {CONTEXT_STEP}, so that texts near it would have the long factors",
            hint=f"--context {config.rope_switch // CONTEXT_STEP * CONTEXT_STEP}",
        )


def check_experts(config: DecoderConfig, architecture: Architecture) -> None:
    """Refuse mixtures of experts that differ from the one that llama.cpp's graph has compiled in.

    Raises:
        UnsupportedModelError: with the reason.
    """
    arch = architecture.name
    assert config.experts is not None
    if arch == "phimoe":
        raise UnsupportedModelError(
            "llama.cpp's phimoe computes another model: RMSNorm in place of LayerNorm, and a "
            "softmax over the two best experts in place of sparsemixer"
        )
    if config.experts.renormalize != architecture.renormalizes:
        does = "divides" if architecture.renormalizes else "does not divide"
        raise UnsupportedModelError(
            f"llama.cpp's {arch} {does} the chosen experts' probabilities by their sum, and this "
            f"model's norm_topk_prob is {str(config.experts.renormalize).lower()}"
        )
    if arch == "olmoe" and config.num_key_value_heads != config.num_attention_heads:
        raise UnsupportedModelError("llama.cpp's olmoe has no grouped key-value heads")


# Graphs that read YaRN's factors from a tensor, and gpt-oss, for which there is a note.
EXACT_YARN = ("llama", "gpt-oss")

# Graphs whose o_proj is square.
NARROW_HEADS = ("phi2", "phi3", "nemotron", "chatglm", "gpt2", "gptneox", "falcon")

# Layers of the largest gemma models, for which llama.cpp scales scores by hidden size / heads.
LARGEST = {"gemma2": 46, "gemma3": 62}


def check_layers(config: DecoderConfig, arch: str) -> None:
    """Refuse orders of layers that differ from the one that llama.cpp's graph has compiled in.

    Raises:
        UnsupportedModelError: with the reason.
    """
    kinds = [config.kinds[config.layers[block]] for block in range(config.num_hidden_layers)]
    if arch == "qwen3" and any(kind.rope is None for kind in kinds):
        raise UnsupportedModelError(
            "llama.cpp has no architecture for this model's layers without rotation (NoPE)"
        )
    every_fourth = [bool((block + 1) % 4) for block in range(len(kinds))]
    expected = {
        "smollm3": ("rotate", every_fourth, [kind.rope is not None for kind in kinds]),
        "gpt-oss": (
            "have a window",
            [block % 2 == 0 for block in range(len(kinds))],
            [kind.window is not None for kind in kinds],
        ),
        "cohere2": ("have a window", every_fourth, [kind.window is not None for kind in kinds]),
        "gemma2": (
            "have a window",
            [block % 2 == 0 for block in range(len(kinds))],
            [kind.window is not None for kind in kinds],
        ),
    }
    what, graph, model = expected.get(arch, ("", [], []))
    if graph != model:
        raise UnsupportedModelError(
            f"llama.cpp's {arch} has compiled in which layers {what}, and this model's are others"
        )
    if arch == "exaone4" and config.num_hidden_layers != 64:
        raise UnsupportedModelError(
            "llama.cpp's exaone4 has windows in models of 64 layers only, this one has "
            f"{config.num_hidden_layers}"
        )


def context_limit(config: DecoderConfig) -> tuple[int, list[str]]:
    """Positions up to which llama.cpp agrees with the float model, and notes why no further."""
    context, notes = config.max_context, []
    if config.rope_switch:
        notes.append(
            f"longrope: llama.cpp uses the long factors in every context (-c) of more than "
            f"{config.rope_switch} tokens, for shorter texts, too, where the float model does not: "
            f"run texts of up to {config.rope_switch} tokens in a context of that size"
        )
    elif config.ropes[0].kind == "longrope":
        context = config.ropes[0].original_context // CONTEXT_STEP * CONTEXT_STEP
        notes.append(
            f"longrope: run with a context of at most {context} tokens (llama.cpp's -c); "
            "above it llama.cpp uses the long factors from the first token on"
        )
    if config.sinks and config.ropes[0].yarn is not None and not config.ropes[0].yarn.usual:
        notes.append(
            "llama.cpp rounds the bounds of YaRN to whole pairs, which this model does not "
            "(truncate: false): its rotations differ a little from the float model's"
        )
    if config.experts is not None and config.experts.packed:
        notes.append("the experts are the checkpoint's MXFP4 blocks, bit for bit")
    windows = ARCHITECTURES[config.family].windows
    if config.sliding_window is not None and config.sliding_window < context and not windows:
        context = config.sliding_window
        notes.append(
            f"llama.cpp ignores the sliding window of {config.sliding_window}: "
            f"equal to the float model up to {config.sliding_window} tokens"
        )
    if config.block_repeat > 1:
        notes.append(
            f"shared blocks are written {config.block_repeat} times: GGUF cannot share tensors"
        )
    return context, notes
