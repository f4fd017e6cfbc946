"""What kind of decoder a checkpoint holds: ``config.json`` becomes one ``DecoderConfig``, and a
``WeightMap`` says where on disk each weight is. A family is a row in ``FAMILIES``, not a file.

No torch here. Sources: the ``config.json`` keys and tensor names of transformers 4.57.6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from compress.checkpoint import Checkpoint

Float32 = NDArray[np.float32]

FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, reduced to what a runtime needs.

    Attributes:
        theta: the base.
        kind: ``default``, ``linear``, ``llama3`` or ``longrope``.
        rotary_dim: leading dimensions of a head that rotate (halves: NEOX layout).
        factors: float, ``[rotary_dim / 2]``: inverse frequencies are divided by these
            (1.0 for ``default``; the *short* list for ``longrope``).
        long_factors: the other list of ``longrope``, for metadata only; empty otherwise.
        attention_factor: multiplied into cos and sin, also for short prompts (``longrope``).
        original_context: positions up to which ``factors`` hold.
    """

    theta: float
    kind: str
    rotary_dim: int
    factors: tuple[float, ...]
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    original_context: int = 0

    def inverse_frequencies(self) -> Float32:
        """float32 ``[rotary_dim / 2]``, rounded where transformers rounds.

        One unit in the last place here is 2e-4 radians at position 4096, so the order matters:
        float32 exponent, correctly rounded power, float32 product and reciprocal.
        """
        exponent = np.arange(0, self.rotary_dim, 2, dtype=np.float32) / np.float32(self.rotary_dim)
        base = np.power(self.theta, exponent.astype(np.float64)).astype(np.float32)
        factors = np.asarray(self.factors, np.float32)
        return np.asarray(np.float32(1.0) / (factors * base), np.float32)

    def cos_sin(self, positions: int) -> tuple[Float32, Float32]:
        """Tables of cos and sin, each float32 ``[positions, rotary_dim / 2]``, scaled."""
        angle = np.outer(np.arange(positions, dtype=np.float32), self.inverse_frequencies())
        scale = np.float32(self.attention_factor)
        return np.cos(angle) * scale, np.sin(angle) * scale


@dataclass(frozen=True)
class DecoderConfig:
    """One decoder, whatever its family. Names are Hugging Face's.

    Attributes:
        family: row of ``FAMILIES``.
        model_type: for the ``config.json`` that travels with an artifact (MobileLLM → ``llama``).
        architecture: class name for the same.
        norm: ``rmsnorm`` or ``layernorm`` (with bias).
        activation: ``silu`` or ``gelu_new`` (the tanh approximation).
        gated_mlp: ``down(act(gate(x)) * up(x))``, else ``down(act(up(x)))``.
        parallel_residual: attention and MLP share one norm and are added together (phi).
        qkv_bias, o_bias, mlp_bias, lm_head_bias: which linears have a bias.
        qk_norm: RMSNorm per head on q and k before rope (qwen3).
        sliding_window: attention sees this many last positions, or None.
        max_context: positions up to which artifacts are exported and verified (``longrope``:
            the original context; else ``max_position_embeddings``).
        block_repeat: each stored block runs this many times in a row (MobileLLM-LS).
        raw: the ``config.json`` as read.
    """

    family: str
    model_type: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm: str
    norm_eps: float
    activation: str
    gated_mlp: bool
    parallel_residual: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    lm_head_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    rope: Rope
    sliding_window: int | None
    max_position_embeddings: int
    max_context: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    block_repeat: int = 1
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> DecoderConfig:
        """From ``config.json`` (and ``generation_config.json`` for the end-of-text ids).

        Raises:
            UnsupportedModelError: an architecture or a setting that is not in ``FAMILIES``.
            CheckpointError: a key is missing or has an impossible value.
        """
        family = find_family(config)
        try:
            return FAMILIES[family].describe(family, config, generation or {})
        except (KeyError, TypeError, ValueError) as error:
            what = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(f"config.json: {what}") from error

    @property
    def linear_roles(self) -> tuple[str, ...]:
        """Roles of a block's linears, unfused, in order of execution."""
        mlp = ("gate_proj", "up_proj", "down_proj") if self.gated_mlp else ("up_proj", "down_proj")
        return ("q_proj", "k_proj", "v_proj", "o_proj", *mlp)

    @property
    def norm_roles(self) -> tuple[str, ...]:
        """Roles of a block's norms."""
        second = () if self.parallel_residual else ("post_attention_layernorm",)
        return ("input_layernorm", *second, *(("q_norm", "k_norm") if self.qk_norm else ()))

    def has_bias(self, role: str) -> bool:
        """Whether the weight of ``role`` (fused or not) comes with a bias."""
        if role in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
            return self.qkv_bias
        if role == "o_proj":
            return self.o_bias
        if role in ("gate_proj", "up_proj", "down_proj", "gate_up_proj"):
            return self.mlp_bias
        if role == "lm_head":
            return self.lm_head_bias
        return role.endswith("norm") and self.norm == "layernorm"

    def weight_shape(self, role: str) -> tuple[int, ...]:
        """``[rows, columns]`` of a linear or embedding, ``[n]`` of a norm."""
        heads, kv = self.num_attention_heads, self.num_key_value_heads
        hidden, ffn, head = self.hidden_size, self.intermediate_size, self.head_dim
        return {
            "embed_tokens": (self.vocab_size, hidden),
            "lm_head": (self.vocab_size, hidden),
            "q_proj": (heads * head, hidden),
            "k_proj": (kv * head, hidden),
            "v_proj": (kv * head, hidden),
            "qkv_proj": ((heads + 2 * kv) * head, hidden),
            "o_proj": (hidden, heads * head),
            "gate_proj": (ffn, hidden),
            "up_proj": (ffn, hidden),
            "gate_up_proj": (2 * ffn, hidden),
            "down_proj": (hidden, ffn),
            "q_norm": (head,),
            "k_norm": (head,),
            "norm": (hidden,),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }[role]

    @property
    def num_parameters(self) -> int:
        """Parameters of the float model; a tied head counts once, repeated blocks once."""
        weights = WeightMap(self)
        return sum(
            math.prod(weights.shape(name))
            for name in weights.names()
            if not (name.startswith("lm_head.weight") and self.tie_word_embeddings)
            and weights.first_use(name)
        )

    def kv_cache_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes that one cached position takes: keys and values of every layer."""
        per_layer = 2 * self.num_key_value_heads * self.head_dim
        return self.num_hidden_layers * per_layer * bytes_per_value


@dataclass(frozen=True)
class Part:
    """Rows ``start:stop`` of the tensor ``source`` on disk."""

    source: str
    start: int
    stop: int


class WeightMap:
    """Where each weight is on disk.

    Our names: ``embed_tokens.weight``, ``norm.weight``, ``lm_head.weight`` and, per block,
    ``blocks.{i}.{role}.weight``; biases end in ``.bias``. A fused role (``qkv_proj``,
    ``gate_up_proj``) and its parts can both be asked for, however the checkpoint stores them.
    """

    def __init__(self, config: DecoderConfig) -> None:
        self.config = config
        self._disk = FAMILIES[config.family].names

    def names(self) -> Iterator[str]:
        """Every weight and bias once, unfused, in order of execution; a tied head included."""
        c = self.config
        yield "embed_tokens.weight"
        for block in range(c.num_hidden_layers):
            for role in (*c.norm_roles, *c.linear_roles):
                yield from self._with_bias(f"blocks.{block}.{role}", role)
        yield from self._with_bias("norm", "norm")
        yield from self._with_bias("lm_head", "lm_head")

    def _with_bias(self, stem: str, role: str) -> Iterator[str]:
        yield f"{stem}.weight"
        if self.config.has_bias(role):
            yield f"{stem}.bias"

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight (``[rows, columns]`` or ``[n]``) or of a bias (``[rows]``)."""
        _, role, kind = split_name(name)
        shape = self.config.weight_shape(role)
        return shape if kind == "weight" else shape[:1]

    def first_use(self, name: str) -> bool:
        """False for a block that repeats the stored block before it (MobileLLM-LS)."""
        block, _, _ = split_name(name)
        return block is None or block % self.config.block_repeat == 0

    def parts(self, name: str) -> tuple[Part, ...]:
        """The pieces on disk whose rows, one after the other, make the weight.

        Raises:
            KeyError: the model has no such weight.
        """
        block, role, kind = split_name(name)
        if role == "lm_head" and kind == "weight" and self.config.tie_word_embeddings:
            role = "embed_tokens"
        if role in self._disk:
            return (Part(self._source(block, role, kind), 0, self._rows(role)),)
        for fused, members in FUSED.items():
            if role in members and fused in self._disk:
                start = sum(self._rows(member) for member in members[: members.index(role)])
                stop = start + self._rows(role)
                return (Part(self._source(block, fused, kind), start, stop),)
        if role in FUSED:
            return tuple(
                Part(self._source(block, member, kind), 0, self._rows(member))
                for member in FUSED[role]
            )
        raise KeyError(name)

    def _rows(self, role: str) -> int:
        return self.config.weight_shape(role)[0]

    def _source(self, block: int | None, role: str, kind: str) -> str:
        stored = 0 if block is None else block // self.config.block_repeat
        return f"{self._disk[role].format(i=stored)}.{kind}"

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the checkpoint must hold, with its shape."""
        tensors: dict[str, tuple[int, ...]] = {}
        for name in self.names():
            columns = self.shape(name)[1:]
            for part in self.parts(name):
                rows = max(part.stop, tensors.get(part.source, (0,))[0])
                tensors[part.source] = (rows, *columns)
        return tensors

    def check(self, checkpoint: Checkpoint) -> None:
        """Hold the checkpoint's headers against the config, without reading a weight.

        Raises:
            CheckpointError: a tensor is missing, unexpected, or of another shape.
        """
        expected = self.expected()
        found = {name for name in checkpoint.tensors if not self._ignored(name)}
        missing = sorted(set(expected) - found)
        if missing:
            raise CheckpointError(
                f"{len(missing)} tensor(s) missing from the checkpoint, first {missing[0]!r}",
                hint="an incomplete download? packlight never fills in weights",
            )
        unexpected = sorted(found - set(expected))
        if unexpected:
            raise CheckpointError(
                f"{len(unexpected)} tensor(s) that a {self.config.family} model does not have, "
                f"first {unexpected[0]!r}",
                hint="an adapter, or another architecture than config.json says?",
            )
        for name, shape in expected.items():
            if checkpoint.tensors[name].shape != shape:
                raise CheckpointError(
                    f"{name} has shape {list(checkpoint.tensors[name].shape)}, "
                    f"but config.json makes it {list(shape)}",
                    hint="config.json and the weights belong to different models",
                )

    def _ignored(self, name: str) -> bool:
        # Old Llama checkpoints store the rope table; some tied models store the head again,
        # which transformers ignores too.
        tied_head = self.config.tie_word_embeddings and name == "lm_head.weight"
        return tied_head or name.endswith(".rotary_emb.inv_freq")

    def read(self, checkpoint: Checkpoint, name: str, rows: slice | None = None) -> Float32:
        """A weight as float32, whole or rows ``start:stop`` of it.

        Raises:
            CheckpointError: truncated, or with NaN or Inf.
        """
        start, stop, _ = (rows or slice(None)).indices(self.shape(name)[0])
        pieces = []
        offset = 0
        for part in self.parts(name):
            length = part.stop - part.start
            first, last = max(start - offset, 0), min(stop - offset, length)
            if first < last:
                window = slice(part.start + first, part.start + last)
                pieces.append(checkpoint.read(part.source, window))
            offset += length
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def split_name(name: str) -> tuple[int | None, str, str]:
    """``blocks.3.q_proj.weight`` → ``(3, "q_proj", "weight")``; ``norm.weight`` → ``(None, …)``."""
    *stem, kind = name.split(".")
    if stem[0] == "blocks":
        return int(stem[1]), stem[2], kind
    return None, stem[0], kind


# --- families ------------------------------------------------------------------------------

_BLOCK = "model.layers.{i}."
LLAMA_NAMES: dict[str, str] = {
    "embed_tokens": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "input_layernorm": _BLOCK + "input_layernorm",
    "post_attention_layernorm": _BLOCK + "post_attention_layernorm",
    "q_proj": _BLOCK + "self_attn.q_proj",
    "k_proj": _BLOCK + "self_attn.k_proj",
    "v_proj": _BLOCK + "self_attn.v_proj",
    "o_proj": _BLOCK + "self_attn.o_proj",
    "gate_proj": _BLOCK + "mlp.gate_proj",
    "up_proj": _BLOCK + "mlp.up_proj",
    "down_proj": _BLOCK + "mlp.down_proj",
}
QWEN3_NAMES: dict[str, str] = LLAMA_NAMES | {
    "q_norm": _BLOCK + "self_attn.q_norm",
    "k_norm": _BLOCK + "self_attn.k_norm",
}
_UNFUSED = {member for members in FUSED.values() for member in members}
PHI3_NAMES: dict[str, str] = {
    role: name for role, name in LLAMA_NAMES.items() if role not in _UNFUSED
} | {"qkv_proj": _BLOCK + "self_attn.qkv_proj", "gate_up_proj": _BLOCK + "mlp.gate_up_proj"}
PHI_NAMES: dict[str, str] = {
    "embed_tokens": "model.embed_tokens",
    "norm": "model.final_layernorm",
    "lm_head": "lm_head",
    "input_layernorm": _BLOCK + "input_layernorm",
    "q_proj": _BLOCK + "self_attn.q_proj",
    "k_proj": _BLOCK + "self_attn.k_proj",
    "v_proj": _BLOCK + "self_attn.v_proj",
    "o_proj": _BLOCK + "self_attn.dense",
    "up_proj": _BLOCK + "mlp.fc1",
    "down_proj": _BLOCK + "mlp.fc2",
}


@dataclass(frozen=True)
class Family:
    """One row of the table: where the tensors are, and how the config departs from llama's."""

    names: Mapping[str, str]
    changes: Callable[[Mapping[str, Any]], dict[str, Any]]
    model_type: str = ""
    architecture: str = ""

    def describe(
        self, family: str, config: Mapping[str, Any], generation: Mapping[str, Any]
    ) -> DecoderConfig:
        """The ``DecoderConfig``: llama's reading of the keys, then this family's changes."""
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        positions = int(config["max_position_embeddings"])
        head_dim = int(config.get("head_dim") or hidden // heads)
        rope = read_rope(config, head_dim)
        fields: dict[str, Any] = {
            "family": family,
            "model_type": self.model_type or config["model_type"],
            "architecture": self.architecture or config["architectures"][0],
            "vocab_size": int(config["vocab_size"]),
            "hidden_size": hidden,
            "intermediate_size": int(config["intermediate_size"]),
            "num_hidden_layers": int(config["num_hidden_layers"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(config.get("num_key_value_heads") or heads),
            "head_dim": head_dim,
            "norm": "rmsnorm",
            "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
            "activation": config.get("hidden_act", "silu"),
            "gated_mlp": True,
            "parallel_residual": False,
            "qkv_bias": bool(config.get("attention_bias", False)),
            "o_bias": bool(config.get("attention_bias", False)),
            "mlp_bias": bool(config.get("mlp_bias", False)),
            "lm_head_bias": False,
            "qk_norm": False,
            "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
            "rope": rope,
            "sliding_window": None,
            "max_position_embeddings": positions,
            "max_context": min(positions, rope.original_context or positions),
            "bos_token_id": config.get("bos_token_id"),
            "eos_token_ids": read_eos(config, generation),
            "pad_token_id": config.get("pad_token_id"),
            "raw": dict(config),
        }
        described = DecoderConfig(**(fields | self.changes(config)))
        check_config(described)
        return described


def _mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "sliding_window": config.get("sliding_window"),
        "qkv_bias": False,
        "o_bias": False,
    }


def _phi3(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": config.get("sliding_window")}


def _phi(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("qk_layernorm"):
        raise UnsupportedModelError("phi with qk_layernorm is not supported")
    return {
        "norm": "layernorm",
        "norm_eps": float(config.get("layer_norm_eps", 1e-5)),
        "activation": config.get("hidden_act", "gelu_new"),
        "gated_mlp": False,
        "parallel_residual": True,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "lm_head_bias": True,
    }


def _qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("use_sliding_window"):
        raise UnsupportedModelError(
            "qwen models that mix windowed and full attention (use_sliding_window) are not "
            "supported",
            hint="set use_sliding_window to false where the model was trained without it",
        )
    return {"qkv_bias": True, "o_bias": False}


def _qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    window = _qwen2(config)
    bias = bool(config.get("attention_bias", False))
    return window | {"qkv_bias": bias, "o_bias": bias, "qk_norm": True}


def _mobilellm(config: Mapping[str, Any]) -> dict[str, Any]:
    # The Hub's class ties through `share_embedding` while `tie_word_embeddings` says false;
    # read as plain llama it would get a random head.
    repeat = 2 if config.get("layer_sharing") else 1
    tied = bool(config.get("share_embedding") or config.get("tie_word_embeddings"))
    return {
        "tie_word_embeddings": tied,
        "block_repeat": repeat,
        "num_hidden_layers": repeat * int(config["num_hidden_layers"]),
    }


def _llama(config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


FAMILIES: dict[str, Family] = {
    "llama": Family(LLAMA_NAMES, _llama),
    "mistral": Family(LLAMA_NAMES, _mistral),
    "phi3": Family(PHI3_NAMES, _phi3),
    "phi": Family(PHI_NAMES, _phi),
    "qwen2": Family(LLAMA_NAMES, _qwen2),
    "qwen3": Family(QWEN3_NAMES, _qwen3),
    "mobilellm": Family(LLAMA_NAMES, _mobilellm, "llama", "LlamaForCausalLM"),
}

ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Phi3ForCausalLM": "phi3",
    "PhiForCausalLM": "phi",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MobileLLMForCausalLM": "mobilellm",
}


def find_family(config: Mapping[str, Any]) -> str:
    """The row of ``FAMILIES`` for a ``config.json``.

    Raises:
        UnsupportedModelError: not in the table; says when only remote code could run it.
    """
    architectures = config.get("architectures") or []
    name = architectures[0] if architectures else ""
    if name not in ARCHITECTURES:
        label = name or config.get("model_type") or "no architecture in config.json"
        if config.get("auto_map"):
            raise UnsupportedModelError(
                f"{label} needs the checkpoint's own code, which packlight never executes",
                hint=f"supported: {', '.join(ARCHITECTURES)}",
            )
        raise UnsupportedModelError(
            f"unknown architecture: {label}", hint=f"supported: {', '.join(ARCHITECTURES)}"
        )
    family = ARCHITECTURES[name]
    if family == "llama" and (config.get("share_embedding") or config.get("layer_sharing")):
        return "mobilellm"
    return family


def read_eos(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-text ids: generation_config's first (Phi-3's config alone never stops a chat)."""
    ids: list[int] = []
    for source in (generation, config):
        value = source.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if token is not None and token not in ids:
                ids.append(int(token))
    return tuple(ids)


def read_rope(config: Mapping[str, Any], head_dim: int) -> Rope:
    """Rotary settings from ``rope_theta``/``rope_scaling`` or the newer ``rope_parameters``.

    ``longrope`` (Phi-3-128k, 3.5, Phi-4-mini; also spelled ``su``) keeps the short factors: they
    hold up to ``original_max_position_embeddings``. Formulas: ``modeling_rope_utils`` of
    transformers 4.57.6.

    Raises:
        UnsupportedModelError: another scaling (``yarn``, ``dynamic`` …).
    """
    scaling = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    partial = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if config.get("model_type") == "phi" and "partial_rotary_factor" not in config:
        partial = 0.5
    rotary = int(head_dim * float(partial))
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    half = rotary // 2
    if kind == "default":
        return Rope(theta, "default", rotary, (1.0,) * half)
    if kind == "linear":
        return Rope(theta, "linear", rotary, (float(scaling["factor"]),) * half)
    if kind == "llama3":
        return Rope(theta, "llama3", rotary, _llama3_factors(theta, rotary, scaling))
    if kind in ("longrope", "su"):
        short = tuple(float(value) for value in scaling["short_factor"])
        long = tuple(float(value) for value in scaling["long_factor"])
        if len(short) != half or len(long) != half:
            raise ValueError(f"rope_scaling has {len(short)} factors, the heads need {half}")
        original = int(
            config.get("original_max_position_embeddings")
            or scaling.get("original_max_position_embeddings")
            or config["max_position_embeddings"]
        )
        stretch = int(config["max_position_embeddings"]) / original
        attention = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        return Rope(theta, "longrope", rotary, short, long, attention, original)
    raise UnsupportedModelError(f"rope scaling {kind!r} is not supported")


def _llama3_factors(theta: float, rotary: int, scaling: Mapping[str, Any]) -> tuple[float, ...]:
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    original = float(scaling["original_max_position_embeddings"])
    factors = []
    for i in range(0, rotary, 2):
        turns = original / (2 * math.pi * theta ** (i / rotary))  # original context ÷ wavelength
        if turns < low:
            factors.append(factor)
        elif turns > high:
            factors.append(1.0)
        else:
            smooth = (turns - low) / (high - low)
            factors.append(1.0 / ((1 - smooth) / factor + smooth))
    return tuple(factors)


def check_config(config: DecoderConfig) -> None:
    """Refuse values that no checkpoint of the family can have.

    Raises:
        ValueError: sizes that do not divide or are not positive.
        UnsupportedModelError: an activation that is not the family's.
    """
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"):
        if getattr(config, key) <= 0:
            raise ValueError(f"{key} is {getattr(config, key)}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads ({config.num_attention_heads}) is not a multiple of "
            f"num_key_value_heads ({config.num_key_value_heads})"
        )
    allowed = ("silu",) if config.gated_mlp else ("gelu_new",)
    if config.activation not in allowed:
        raise UnsupportedModelError(
            f"hidden_act {config.activation!r} is not supported for {config.family}"
        )
