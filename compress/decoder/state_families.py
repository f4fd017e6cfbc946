"""Rows of families whose layers keep other states than keys and values. Sources: configuration and
modelling files of transformers 4.57.6.
"""

from __future__ import annotations

from typing import Any

from compress.decoder.config_json import Config, flag, number, whole
from compress.decoder.family import (
    BLOCK,
    FULL,
    LLAMA_NAMES,
    MOST_LAYERS,
    MOST_WIDE,
    Family,
    layer_kinds,
)
from compress.decoder.grammar import ATTENTION, CONVOLUTION, AttentionKind
from compress.errors import UnsupportedModelError

MOST_TAPS = 16


def _lfm2(config: Config) -> dict[str, Any]:
    """Keys of Liquid's first configs (``block_ff_dim``, ``theta``, ``tie_embedding``) win over
    llama's, as in transformers."""
    if flag(config, "conv_bias"):
        raise UnsupportedModelError("lfm2 with conv_bias is not supported")
    count = whole(config, "num_hidden_layers", most=MOST_LAYERS)
    attending = config.get("full_attn_idxs")
    chosen = set(range(count)) if attending is None else set(attending)
    kinds = {
        FULL: AttentionKind(absent=frozenset((*CONVOLUTION, "conv"))),
        "conv": AttentionKind(
            rope=None,
            normed=False,
            taps=whole(config, "conv_L_cache", 3, most=MOST_TAPS),
            absent=frozenset((*ATTENTION, "q_norm", "k_norm")),
        ),
    }
    changes = layer_kinds(config, kinds, lambda block: FULL if block in chosen else "conv")
    if all(kind.taps for kind in changes["kinds"]):
        raise UnsupportedModelError("lfm2 without a layer that attends is not supported")
    theta = config.get("theta") or config.get("rope_theta") or 1e6
    tied = "tie_embedding" if "tie_embedding" in config else "tie_word_embeddings"
    return changes | {
        "intermediate_size": _adjusted(config),
        "num_key_value_heads": whole(config, "num_key_value_heads", 8, most=MOST_WIDE),
        "norm_eps": number(config, "norm_eps", 1e-5),
        "qk_norm": "head",
        "ropes": ({**config, "rope_theta": theta},),
        "tie_word_embeddings": flag(config, tied, True),
    }


def _adjusted(config: Config) -> int:
    """The MLP's width: two thirds of the config's, in multiples, unless
    ``block_auto_adjust_ff_dim`` is false."""
    key = "block_ff_dim" if "block_ff_dim" in config else "intermediate_size"
    width = whole(config, key, 12288, most=MOST_WIDE)
    if not flag(config, "block_auto_adjust_ff_dim", True):
        return width
    width = int(2 * width / 3)
    if config.get("block_ffn_dim_multiplier", 1.0) is None:
        return width
    step = whole(config, "block_multiple_of", 256, most=MOST_WIDE)
    width = int(number(config, "block_ffn_dim_multiplier", 1.0) * width)
    return -(-width // step) * step


LFM2_NAMES = LLAMA_NAMES | {
    "norm": "model.embedding_norm",
    "input_layernorm": BLOCK + "operator_norm",
    "post_attention_layernorm": BLOCK + "ffn_norm",
    "o_proj": BLOCK + "self_attn.out_proj",
    "q_norm": BLOCK + "self_attn.q_layernorm",
    "k_norm": BLOCK + "self_attn.k_layernorm",
    "in_proj": BLOCK + "conv.in_proj",
    "conv": BLOCK + "conv.conv",
    "out_proj": BLOCK + "conv.out_proj",
    "gate_proj": BLOCK + "feed_forward.w1",
    "up_proj": BLOCK + "feed_forward.w3",
    "down_proj": BLOCK + "feed_forward.w2",
}

STATES: dict[str, Family] = {
    "lfm2": Family(
        LFM2_NAMES, _lfm2, "lfm2", "Lfm2ForCausalLM", norm_eps=1e-5, positions=128_000, tied=True
    ),
}
"""Rows by model type."""
