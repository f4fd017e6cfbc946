"""Metadata of a GGUF file: tensor names, architecture keys, rope tables.

Keys and names are llama.cpp's (``gguf-py/gguf/constants.py``); values are what its converter
(``conversion/*.py``) writes for the same checkpoint. No dates and no paths: equal inputs give
equal bytes.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from compress.decoder.config import DecoderConfig, split_name

if TYPE_CHECKING:
    import gguf

    from compress.decoder.rope import Yarn

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
# Positions up to which llama.cpp agrees with the float model, where that is not all of them.
CONTEXT_KEY = "packlight.context"
# What a chosen mix is called: ``general.file_type`` has numbers for llama.cpp's presets only.
TYPE_KEY = "packlight.type"

# Family → ``general.architecture``.
ARCHITECTURES: dict[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "mobilellm": "llama",
    "phi3": "phi3",
    "phi": "phi2",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}

_TOP = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "gate_up_proj": "ffn_up",  # phi3: gate first, then up, in one tensor
    "down_proj": "ffn_down",
}

# Tables that llama.cpp reads as tensors; our name → its name.
ROPE_TENSORS: dict[str, str] = {
    "rope.factors": "rope_freqs.weight",
    "rope.long_factors": "rope_factors_long.weight",
    "rope.short_factors": "rope_factors_short.weight",
}


def target_name(name: str) -> str:
    """``blocks.3.q_proj.weight`` → ``blk.3.attn_q.weight``."""
    block, role, kind = split_name(name)
    if block is None:
        return f"{_TOP[role]}.{kind}"
    return f"blk.{block}.{_BLOCK[role]}.{kind}"


def rope_tensors(config: DecoderConfig) -> dict[str, tuple[float, ...]]:
    """Our name → divisors of the rotary frequencies, ``[rotary_dim / 2]``; often none."""
    rope = config.rope
    if rope.kind == "llama3" or (rope.yarn is not None and not rope.yarn.usual):
        return {"rope.factors": rope.factors}
    if rope.kind == "longrope":
        return {"rope.long_factors": rope.long_factors, "rope.short_factors": rope.factors}
    return {}


def display_name(model_name: str, *, strips_after_special: bool) -> str:
    """``general.name``, chosen with care: llama.cpp reads behaviour out of it.

    A name with ``phi-3`` or ``phi3`` makes its tokenizer drop whitespace after special tokens
    (and needs ``<|endoftext|>`` in the vocabulary); ``modern-bert`` has a meaning too.

    Args:
        strips_after_special: whether this tokenizer does drop it.
    """
    phi3 = re.compile(r"phi-?3", re.IGNORECASE)
    if strips_after_special:
        return model_name if phi3.search(model_name) else f"{model_name} (phi-3 tokens)"
    name = phi3.sub("Phi 3", model_name)
    return re.sub(r"modern-bert", "modern bert", name, flags=re.IGNORECASE)


def write_architecture(writer: gguf.GGUFWriter, config: DecoderConfig) -> None:
    """The keys of the architecture: sizes, norm, rope."""
    import gguf

    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.norm == "layernorm":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
    rope = config.rope  # its tables go in as tensors
    writer.add_rope_dimension_count(rope.rotary_dim)
    writer.add_rope_freq_base(rope.theta)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factors[0])
    usual = rope.yarn is not None and rope.yarn.usual
    if rope.kind == "longrope" or (rope.yarn is not None and not usual):
        writer.add_rope_scaling_attn_factors(rope.attention_factor)
    if rope.yarn is not None and usual:
        write_yarn(writer, rope.yarn, rope.attention_factor)
    if ARCHITECTURES[config.family] == "phi3":
        if rope.yarn is None:
            original = rope.original_context or config.max_position_embeddings
            writer.add_rope_scaling_orig_ctx_len(original)
        # llama.cpp wants the key and ignores the window; 0 says that there is none.
        writer.add_sliding_window(config.sliding_window or 0)


def write_yarn(writer: gguf.GGUFWriter, yarn: Yarn, attention_factor: float) -> None:
    """The keys of YaRN, of which llama.cpp makes factors by the paper's bounds; it does not read
    those of a file.

    llama.cpp multiplies cos and sin by ``1 + 0.1 ln(factor)`` by itself, and by ``attn_factor``,
    which is what is left of the model's factor.
    """
    import gguf

    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(yarn.factor)
    writer.add_rope_scaling_orig_ctx_len(yarn.original_context)
    left = attention_factor / (1 + 0.1 * math.log(yarn.factor))
    if abs(left - 1) > 1e-6:
        writer.add_rope_scaling_attn_factors(left)
