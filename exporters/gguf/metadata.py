"""Metadata of a GGUF file: tensor names, architecture keys, rope tables.

Keys and names are llama.cpp's (``gguf-py/gguf/constants.py``); values are what its converter
(``conversion/*.py``) writes for the same checkpoint. No dates and no paths: equal inputs give
equal bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint.checkpoint import Checkpoint
from compress.decoder.config import DecoderConfig, split_name
from compress.plan.job import read_card
from exporters.gguf.architectures import ARCHITECTURES, Architecture

if TYPE_CHECKING:
    import gguf

    from compress.decoder.rope import Yarn

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
# Key with the positions up to which llama.cpp agrees with the float model, where limited.
CONTEXT_KEY = "packlight.context"
# Key with the name of a chosen mix: ``general.file_type`` only has numbers for presets.
TYPE_KEY = "packlight.type"

_TOP = {
    "embed_tokens": "token_embd",
    "embed_positions": "position_embd",
    "norm": "output_norm",
    "lm_head": "output",
}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "attention_post_norm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp_post_norm": "post_ffw_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_output",
    "in_proj": "shortconv.in_proj",
    "conv": "shortconv.conv",
    "out_proj": "shortconv.out_proj",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "gate_up_proj": "ffn_up",  # gate first, then up, in one tensor
    "down_proj": "ffn_down",
    "sinks": "attn_sinks",
    "router": "ffn_gate_inp",
    "experts.gate_proj": "ffn_gate_exps",
    "experts.up_proj": "ffn_up_exps",
    "experts.down_proj": "ffn_down_exps",
    "shared_gate": "ffn_gate_inp_shexp",
    "shared.gate_proj": "ffn_gate_shexp",
    "shared.up_proj": "ffn_up_shexp",
    "shared.down_proj": "ffn_down_shexp",
}

# Tables that llama.cpp reads as tensors: packlight's name → GGUF name.
ROPE_TENSORS: dict[str, str] = {
    "rope.factors": "rope_freqs.weight",
    "rope.long_factors": "rope_factors_long.weight",
    "rope.short_factors": "rope_factors_short.weight",
}


def target_name(name: str, renamed: Mapping[str, str] | None = None) -> str:
    """``blocks.3.q_proj.weight`` → ``blk.3.attn_q.weight``; ``renamed``: of ``Architecture``."""
    block, role, kind = split_name(name)
    stem = (renamed or {}).get(role) or (_TOP if block is None else _BLOCK)[role]
    return f"{stem}.{kind}" if block is None else f"blk.{block}.{stem}.{kind}"


def rope_tensors(config: DecoderConfig) -> dict[str, tuple[float, ...]]:
    """Packlight's name → divisors of the rotary frequencies, ``[rotary_dim / 2]``; often empty."""
    rope = config.ropes[0]
    if rope.kind == "llama3" or (rope.yarn is not None and not rope.yarn.usual):
        return {"rope.factors": rope.factors}
    if rope.kind == "longrope":
        return {"rope.long_factors": rope.long_factors, "rope.short_factors": rope.factors}
    return {}


def display_name(model_name: str, *, strips_after_special: bool) -> str:
    """``general.name``, adapted because llama.cpp derives behaviour from it.

    A name with ``phi-3`` or ``phi3`` makes its tokenizer drop whitespace after special tokens
    (and needs ``<|endoftext|>`` in the vocabulary); ``modern-bert`` has an effect, too.

    Args:
        strips_after_special: whether the model's tokenizer drops it.
    """
    phi3 = re.compile(r"phi-?3", re.IGNORECASE)
    if strips_after_special:
        return model_name if phi3.search(model_name) else f"{model_name} (phi-3 tokens)"
    name = phi3.sub("Phi 3", model_name)
    return re.sub(r"modern-bert", "modern bert", name, flags=re.IGNORECASE)


LONGEST = 2000  # characters of a card's text
MOST = 200  # entries of a card's list
# Keys of a card of which gguf-py takes one text; of others it takes a list, too.
ONE_TEXT = {
    prefix + key
    for prefix in ("", "model_")
    for key in (
        "name", "author", "creator", "version", "organization", "description", "finetune",
        "basename", "type", "size_label", "url", "doi", "uuid", "repo_url",
    )
} | {"license_name", "license_link", "_name_or_path"}  # fmt: skip
# Numbers of generation_config.json with which llama.cpp samples unless it is told others.
SAMPLING = {
    "top_k": ("sampling_top_k", int),
    "top_p": ("sampling_top_p", float),
    "min_p": ("sampling_min_p", float),
    "temperature": ("sampling_temp", float),
}


def write_general(
    writer: gguf.GGUFWriter,
    checkpoint: Checkpoint,
    folder: str,
    name: str,
    parameters: tuple[int, int, int, int],
) -> None:
    """Write the ``general.*`` keys: licence, base models, tags, languages, parts of the name.

    gguf-py derives them, as for llama.cpp's converter: from the YAML head of the checkpoint's model
    card, ``_name_or_path`` of its config and the name of its folder. The card is untrusted: values
    that are neither text nor lists of texts, and very long ones, are left out.

    Args:
        folder: the model's name.
        name: ``general.name``; see ``display_name``.
        parameters: of the model, for its size where its name has none: of all, of those outside
            the experts, and of an expert; and the number of experts.
    """
    import gguf

    stated = {**read_card(checkpoint), "_name_or_path": checkpoint.config.get("_name_or_path")}
    stated["_name_or_path"] = stated["_name_or_path"] or checkpoint.source
    card: dict[str, Any] = {}
    for key, value in stated.items():
        texts = value if isinstance(value, list) and key not in ONE_TEXT else [value]
        if len(texts) <= MOST and all(
            isinstance(text, str) and len(text) <= LONGEST and text.isprintable() for text in texts
        ):
            card[key] = value
    facts = gguf.Metadata.apply_metadata_heuristic(
        gguf.Metadata(), card, {"_name_or_path": card.pop("_name_or_path", None)}, Path(folder),
        parameters[0],
    )  # fmt: skip
    facts.name, facts.quantized_by = name, "packlight"
    facts.size_label = facts.size_label or gguf.size_label(*parameters)
    for key, (field, kind) in SAMPLING.items():
        number = checkpoint.generation_config.get(key)
        # gguf-py has these fields since 0.18; in the file they have 32 bits.
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if abs(number) < 2**31 and hasattr(facts, field):
            setattr(facts, field, kind(number))
    facts.set_gguf_meta_model(writer)


def write_architecture(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    """Write the keys of the architecture: sizes, norm, rope."""
    import gguf

    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    taps = [config.kinds[kind].taps for kind in config.layers]
    if any(taps):
        writer.add_shortconv_l_cache(max(taps))
        writer.add_head_count_kv([0 if n else config.num_key_value_heads for n in taps])
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.norm == "layernorm":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
    rope = config.ropes[0]  # its tables are written as tensors
    writer.add_rope_dimension_count(rope.rotary_dim)
    writer.add_rope_freq_base(rope.theta)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factors[0])
    architecture = ARCHITECTURES[config.family]
    usual = rope.yarn is not None and (rope.yarn.usual or architecture.name == "gpt-oss")
    if rope.kind == "longrope" or (rope.yarn is not None and not usual):
        writer.add_rope_scaling_attn_factors(rope.attention_factor)
    if rope.yarn is not None and usual:
        write_yarn(writer, rope.yarn, rope.attention_factor)
    if architecture.name == "phi3":
        if rope.yarn is None:
            original = rope.original_context or config.max_position_embeddings
            writer.add_rope_scaling_orig_ctx_len(original)
        # llama.cpp requires the key and ignores the window; 0 means none.
        writer.add_sliding_window(config.sliding_window or 0)
    elif architecture.own or architecture.windows or architecture.name == "gptneox":
        write_extras(writer, config, architecture)
    if config.experts is not None:
        writer.add_expert_count(config.experts.count)
        writer.add_expert_used_count(config.experts.chosen)
        if architecture.name in ("qwen2moe", "qwen3moe", "gpt-oss"):
            writer.add_expert_feed_forward_length(config.experts.width)
        if config.experts.shared_width:
            writer.add_expert_shared_feed_forward_length(config.experts.shared_width)


def write_extras(
    writer: gguf.GGUFWriter, config: DecoderConfig, architecture: Architecture
) -> None:
    """Write the keys of scalars, caps, windows and parallel blocks.

    Args:
        config: with the scalars that are not folded.
    """
    name, layers = architecture.name, config.num_hidden_layers
    if name in ("granite", "granitemoe"):
        writer.add_embedding_scale(config.embed_scale)
        writer.add_residual_scale(config.residual_scale)
        writer.add_attention_scale(config.attention_scale or config.head_dim**-0.5)
        writer.add_logit_scale(1 / config.logit_scale)  # a divisor
        if config.kinds[0].rope is None:
            writer.add_rope_scaling_finetuned(False)
    elif "logits" in architecture.own:
        writer.add_logit_scale(config.logit_scale)
    if config.score_cap:
        writer.add_attn_logit_softcapping(config.score_cap)
    if config.logit_cap:
        writer.add_final_logit_softcapping(config.logit_cap)
    if name == "gptneox":
        writer.add_parallel_residual(config.parallel_residual)
    if architecture.windows and config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
        windowed = [
            config.kinds[config.layers[block]].window is not None for block in range(layers)
        ]
        if name in ("gemma3", "olmo2"):
            writer.add_sliding_window_pattern(windowed)
        if name == "gemma3":
            writer.add_float32(f"{name}.rope.freq_base_swa", config.ropes[-1].theta)


def write_yarn(writer: gguf.GGUFWriter, yarn: Yarn, attention_factor: float) -> None:
    """Write the keys of YaRN, from which llama.cpp computes factors by the paper's bounds; it does
    not read factors from a file.

    llama.cpp multiplies cos and sin by ``1 + 0.1 ln(factor)``, and by ``attn_factor``, which is the
    rest of the model's factor.
    """
    import gguf

    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(yarn.factor)
    writer.add_rope_scaling_orig_ctx_len(yarn.original_context)
    left = attention_factor / (1 + 0.1 * math.log(yarn.factor))
    if abs(left - 1) > 1e-6:
        writer.add_rope_scaling_attn_factors(left)
