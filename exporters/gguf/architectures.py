"""Which of llama.cpp's graphs runs a family, and what that graph has of its own. Each row was
compared with the float model through llama.cpp (docs/families.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

ROPES = frozenset(("pairs",))


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's graphs.

    Attributes:
        name: ``general.architecture``.
        own: scalars that the graph multiplies by itself (``compress.checkpoint.scalars``), from a
            key or its code; ``pairs`` where it rotates neighbours. The others are folded.
        fused: roles that are written as one tensor; ``experts``: each matrix of all of them.
        renormalizes: what its mixture of experts does with the chosen ones' probabilities.
        whole_heads: it rotates whole heads only.
        windows: it has the windows of the family's layers; else files are capped at the window.
        factors: kinds of rope scaling that it reads from tensors.
        renamed: role → name of its tensor, where that differs from other graphs'.
    """

    name: str
    own: frozenset[str] = frozenset()
    fused: tuple[str, ...] = ()
    whole_heads: bool = False
    windows: bool = False
    factors: tuple[str, ...] = ()
    renormalizes: bool = True
    renamed: Mapping[str, str] = field(default_factory=dict)


_LLAMA = Architecture("llama", ROPES, whole_heads=True, factors=("llama3", "longrope", "yarn"))
_QKV = ("qkv_proj",)
_EXPERTS = ("experts",)
_GRANITE = ROPES | {"embedding", "residual", "attention", "logits"}
_GEMMA = frozenset(("embedding",))

# Family → architecture.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mobilellm": _LLAMA,
    "ministral": _LLAMA,
    "helium": _LLAMA,
    "phi3": Architecture(
        "phi3", fused=("qkv_proj", "gate_up_proj"), factors=("llama3", "longrope")
    ),
    "phi": Architecture("phi2"),
    "qwen2": Architecture("qwen2", whole_heads=True),
    "qwen3": Architecture("qwen3", whole_heads=True),
    "llama4_text": Architecture("qwen3", whole_heads=True),
    "gemma": Architecture("gemma", _GEMMA, whole_heads=True),
    "gemma2": Architecture("gemma2", _GEMMA, whole_heads=True, windows=True),
    "gemma3_text": Architecture("gemma3", _GEMMA, whole_heads=True, windows=True),
    "granite": Architecture("granite", _GRANITE, whole_heads=True),
    "granitemoehybrid": Architecture("granite", _GRANITE, whole_heads=True),
    "smollm3": Architecture("smollm3", ROPES, whole_heads=True),
    "olmo2": Architecture("olmo2", whole_heads=True),
    "olmo3": Architecture("olmo2", whole_heads=True, windows=True),
    "gpt2": Architecture("gpt2", fused=_QKV),
    "gpt_neo": Architecture("gpt2", fused=_QKV),
    "gpt_neox": Architecture("gptneox", fused=_QKV),
    "stablelm": Architecture("stablelm"),
    "starcoder2": Architecture("starcoder2", whole_heads=True),
    "cohere": Architecture("command-r", ROPES | {"logits"}, whole_heads=True),
    "cohere2": Architecture("cohere2", ROPES | {"logits"}, whole_heads=True, windows=True),
    "exaone4": Architecture("exaone4", whole_heads=True, factors=("llama3",)),
    "glm": Architecture("chatglm", ROPES, fused=("gate_up_proj",)),
    "glm4": Architecture("glm4", ROPES, fused=("gate_up_proj",)),
    "ernie4_5": Architecture("ernie4_5", ROPES, whole_heads=True),
    "hunyuan_v1_dense": Architecture("hunyuan-dense", whole_heads=True),
    "nemotron": Architecture("nemotron"),
    "arcee": Architecture("arcee", ROPES, whole_heads=True),
    "falcon": Architecture("falcon", fused=_QKV, whole_heads=True),
    "lfm2": Architecture("lfm2", whole_heads=True, renamed={"norm": "token_embd_norm"}),
    "falcon-40b": Architecture(
        "falcon",
        fused=_QKV,
        whole_heads=True,
        renamed={"input_layernorm": "attn_norm_2", "post_attention_layernorm": "attn_norm"},
    ),
    "mixtral": replace(_LLAMA, fused=_EXPERTS),
    "phimoe": Architecture("phimoe", fused=_EXPERTS, whole_heads=True),
    "qwen2_moe": Architecture("qwen2moe", fused=_EXPERTS, whole_heads=True, renormalizes=False),
    "qwen3_moe": Architecture("qwen3moe", fused=_EXPERTS, whole_heads=True),
    "olmoe": Architecture("olmoe", fused=_EXPERTS, whole_heads=True, renormalizes=False),
    "gpt_oss": Architecture(
        "gpt-oss",
        fused=_EXPERTS,
        whole_heads=True,
        windows=True,
        renamed={"post_attention_layernorm": "post_attention_norm"},
    ),
    "granitemoe": Architecture("granitemoe", _GRANITE, _EXPERTS, whole_heads=True),
    "granitemoeshared": Architecture("granitemoe", _GRANITE, _EXPERTS, whole_heads=True),
}
