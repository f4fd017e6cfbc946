"""The architecture of a checkpoint: ``config.json`` becomes a ``DecoderConfig``, and a
``WeightMap`` says where on disk each weight is. A family is a row in ``compress.decoder.families``.

Does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress.decoder.config_json import short, token_ids
from compress.decoder.families import FAMILIES, describe, find_family
from compress.decoder.grammar import (
    ATTENTION,
    CONVOLUTION,
    GATED,
    AttentionKind,
    Experts,
    expert_roles,
)
from compress.decoder.names import BUFFERS, compare_tables, explain_names
from compress.decoder.rope import Rope
from compress.errors import CheckpointError, UnsupportedModelError, one_line

if TYPE_CHECKING:
    from compress.checkpoint.checkpoint import Checkpoint

__all__ = [
    "FUSED", "AttentionKind", "DecoderConfig", "Experts", "Part", "Rope", "WeightMap", "split_name",
]  # fmt: skip

Float32 = NDArray[np.float32]

FUSED: dict[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class DecoderConfig:
    """The architecture of one decoder, of any family. Names are Hugging Face's.

    Attributes:
        family: row of ``FAMILIES``.
        model_type: for the ``config.json`` beside an artifact (MobileLLM → ``llama``).
        architecture: class name for the same.
        norms: roles of a block's norms of the residual stream and of branch outputs, in order of
            execution: ``input_layernorm`` (before attention), ``attention_post_norm`` (of its
            output), ``post_attention_layernorm`` (before the MLP), ``mlp_post_norm``.
        norm: ``rmsnorm`` or ``layernorm``.
        norm_bias: whether norms have a bias.
        norm_offset: on disk a norm's weight lacks this much (gemma: 1); added when it is read.
        norm_eps: of the norms of the residual stream.
        branch_eps: of q and k norms and of norms of branch outputs.
        activation: ``silu``, ``gelu``, ``gelu_new`` (the tanh approximation) or ``relu2``.
        gated_mlp: ``down(act(gate(x)) * up(x))``, else ``down(act(up(x)))``.
        parallel_residual: attention and MLP read the same stream and are added together: with one
            norm (phi), or one for each where ``norms`` has ``post_attention_layernorm`` (neox).
        qkv_bias, o_bias, mlp_bias, lm_head_bias: which linears have a bias.
        qk_norm: RMSNorm of q and k: ``head`` (each head, qwen3), ``projection`` (all heads
            together, olmo2), ``unit`` (each head, without a weight, llama4) or ``""``.
        qk_norm_after_rope: it follows the rotation (hunyuan).
        ropes: rotary embeddings; the first is the one that metadata names.
        rope_pairs: rotation of neighbours (2i, 2i+1), else of halves (i, i + rotary_dim / 2).
        kinds, layers: kinds of attention, and the kind of each block.
        sliding_window: the smallest window of any kind, or None.
        learned_positions: rows of ``embed_positions``, added to the embedding (gpt2); 0 for none.
        score_cap, logit_cap: ``cap * tanh(x / cap)`` of attention scores and logits; 0 for none.
        embed_scale, residual_scale, logit_scale: factors of the embedding, of a branch before it
            is added, of the logits.
        attention_scale: factor of the scores; None for ``head_dim ** -0.5``.
        scalars: names of the scalars that llama does not have (``compress.checkpoint.scalars``).
        max_context: positions up to which artifacts are exported and verified (``longrope``:
            the original context, or more where it is wanted; else ``max_position_embeddings``).
        rope_switch: a text of more positions rotates by the ``long_factors`` from its first token
            on (``longrope`` with a larger ``max_context``); 0 for never.
        block_repeat: each stored block runs this many times in a row (MobileLLM-LS).
        sinks: each head's softmax has one more score, a weight of its own, whose probability is
            dropped (gpt_oss).
        experts: the mixture of experts in place of every block's MLP, or None.
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
    norm_eps: float
    branch_eps: float
    activation: str
    gated_mlp: bool
    parallel_residual: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    lm_head_bias: bool
    tie_word_embeddings: bool
    ropes: tuple[Rope, ...]
    kinds: tuple[AttentionKind, ...]
    layers: tuple[int, ...]
    sliding_window: int | None
    max_position_embeddings: int
    max_context: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    block_repeat: int = 1
    rope_switch: int = 0
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm: str = "rmsnorm"
    norm_bias: bool = False
    norm_offset: float = 0.0
    qk_norm: str = ""
    qk_norm_after_rope: bool = False
    rope_pairs: bool = False
    learned_positions: int = 0
    score_cap: float = 0.0
    logit_cap: float = 0.0
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    logit_scale: float = 1.0
    scalars: frozenset[str] = frozenset()
    sinks: bool = False
    experts: Experts | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_hf(
        cls,
        keys: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        context: int = 0,
    ) -> DecoderConfig:
        """Read ``config.json`` (and ``generation_config.json`` for the end-of-text ids).

        Args:
            context: positions that are wanted; more than ``longrope``'s original context make
                ``max_context`` larger.

        Raises:
            UnsupportedModelError: an architecture or a setting that is not in ``FAMILIES``.
            CheckpointError: a key is missing or has an impossible value.
        """
        family = find_family(keys)
        try:
            token_ids(generation or {}, "eos_token_id")
        except ValueError as error:
            raise CheckpointError(f"generation_config.json: {error}") from error
        try:
            fields = describe(FAMILIES[family], keys, generation or {}, context)
            config = cls(family=family, **fields)
            if config.num_attention_heads % config.num_key_value_heads:
                raise ValueError(
                    f"num_attention_heads ({config.num_attention_heads}) is not a multiple of "
                    f"num_key_value_heads ({config.num_key_value_heads})"
                )
        except (KeyError, ValueError) as error:
            what = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(f"config.json: {what}") from error
        except (ArithmeticError, AttributeError, IndexError, TypeError) as error:
            raise CheckpointError(
                f"config.json: a value is impossible: {one_line(error)}"
            ) from error
        expected = FAMILIES[family].activation
        if config.activation != expected:
            raise UnsupportedModelError(
                f"hidden_act {short(config.activation)} is not supported for {family}, "
                f"only {expected}"
            )
        return config

    @property
    def linear_roles(self) -> tuple[str, ...]:
        """Roles of a block's linears, unfused, in order of execution; a block lacks those that are
        ``absent`` of its kind."""
        if self.experts is not None:
            return expert_roles(self.experts)
        mixers = (*CONVOLUTION, *ATTENTION) if any(kind.taps for kind in self.kinds) else ATTENTION
        return (*mixers, *(GATED if self.gated_mlp else GATED[1:]))

    @property
    def norm_roles(self) -> tuple[str, ...]:
        """Roles of a block's norms, of sinks and of a convolution's taps: all stay float."""
        own = self.qk_norm in ("head", "projection")
        taps = ("conv",) if any(kind.taps for kind in self.kinds) else ()
        sinks = ("sinks",) if self.sinks else ()
        return (*self.norms, *(("q_norm", "k_norm") if own else ()), *taps, *sinks)

    def has_bias(self, role: str) -> bool:
        """Whether the weight of ``role`` (fused or not) has a bias."""
        if role in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
            return self.qkv_bias
        if role == "o_proj":
            return self.o_bias
        if role in ("gate_proj", "up_proj", "down_proj", "gate_up_proj"):
            return self.mlp_bias
        if role == "lm_head":
            return self.lm_head_bias
        if self.experts is not None and (role == "router" or role.startswith("experts.")):
            return self.experts.biased
        return self.norm_bias and (role == "norm" or role in self.norms)

    def weight_shape(self, role: str) -> tuple[int, ...]:
        """``[rows, columns]`` of a linear or embedding, ``[n]`` of a norm; of all experts together
        (``experts.up_proj``) ``[experts, rows, columns]``."""
        heads, kv = self.num_attention_heads, self.num_key_value_heads
        hidden, ffn, head = self.hidden_size, self.intermediate_size, self.head_dim
        if self.experts is not None:
            mixture = {"router": (self.experts.count, hidden), "shared_gate": (1, hidden)}
            if role in mixture:
                return mixture[role]
            group, _, role = role.rpartition(".")
            ffn = self.experts.shared_width if group == "shared" else self.experts.width
            if group == "experts":
                shape = (2 * ffn, hidden) if role == "gate_up_proj" else (ffn, hidden)
                shape = (hidden, ffn) if role == "down_proj" else shape
                return (self.experts.count, *shape)
        return {
            "in_proj": (3 * hidden, hidden),
            "conv": (hidden, max(kind.taps for kind in self.kinds)),
            "out_proj": (hidden, hidden),
            "embed_tokens": (self.vocab_size, hidden),
            "embed_positions": (self.learned_positions, hidden),
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
            "q_norm": (heads * head if self.qk_norm == "projection" else head,),
            "k_norm": (kv * head if self.qk_norm == "projection" else head,),
            "norm": (hidden,),
            "sinks": (heads,),
            **dict.fromkeys(self.norms, (hidden,)),
        }[role]

    @property
    def num_parameters(self) -> int:
        """Parameters of the float model; a tied head and repeated blocks are counted once."""
        weights = WeightMap(self)
        return sum(
            math.prod(weights.shape(name)) for name in weights.names(tied_head=False, repeats=False)
        )

    def kv_cache_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes of one cached position: keys and values of every layer that attends."""
        per_layer = 2 * self.num_key_value_heads * self.head_dim
        layers = self.num_hidden_layers - sum(self.kinds[kind].taps > 0 for kind in self.layers)
        return layers * per_layer * bytes_per_value


@dataclass(frozen=True)
class Part:
    """Rows ``start:stop`` of the tensor ``source`` on disk, or columns where it is transposed; of
    the matrix of one expert where it has those of all, ``[experts, rows, columns]``; every
    ``step``-th."""

    source: str
    start: int
    stop: int
    transposed: bool = False
    expert: int | None = None
    step: int = 1


@dataclass(frozen=True)
class WeightMap:
    """Names, shapes and places on disk of a decoder's weights.

    Packlight's names: ``embed_tokens.weight``, ``norm.weight``, ``lm_head.weight`` and, per block,
    ``blocks.{i}.{role}.weight``; biases end in ``.bias``. A fused role (``qkv_proj``,
    ``gate_up_proj``) and its parts are both available, however the checkpoint stores them. With
    experts there are the roles ``router``, ``experts.{e}.up_proj``, ``shared.up_proj`` and
    ``shared_gate``.
    """

    config: DecoderConfig

    def names(
        self,
        *,
        tied_head: bool = True,
        repeats: bool = True,
        fused: Collection[str] = (),
    ) -> Iterator[str]:
        """Every weight and bias once, in order of execution.

        Args:
            tied_head: also ``lm_head.weight`` where it is the embedding.
            repeats: also the blocks that repeat the stored block before them (MobileLLM-LS).
            fused: the roles of ``FUSED`` to yield instead of their parts; ``experts``: a name
                for each matrix of all experts together (``blocks.3.experts.up_proj.weight``).
        """
        c = self.config
        whole = {part: role for role in fused for part in FUSED.get(role, ())}
        if c.experts is not None and "experts" in fused:
            for e in range(c.experts.count):
                whole |= {f"experts.{e}.{last}": f"experts.{last}" for last in GATED}
        linears = dict.fromkeys(whole.get(role, role) for role in c.linear_roles)
        roles = [(role, c.has_bias(role)) for role in (*c.norm_roles, *linears)]
        yield "embed_tokens.weight"
        if c.learned_positions:
            yield "embed_positions.weight"
        for block in range(0, c.num_hidden_layers, 1 if repeats else c.block_repeat):
            for role, biased in roles:
                kind = c.kinds[c.layers[block]]
                if role in ("q_norm", "k_norm") and not kind.normed:
                    continue
                if FUSED.get(role, (role,))[0] in kind.absent:
                    continue
                yield f"blocks.{block}.{role}.weight"
                if biased:
                    yield f"blocks.{block}.{role}.bias"
        for role in ("norm", "lm_head"):
            if role == "norm" or tied_head or not c.tie_word_embeddings:
                yield f"{role}.weight"
            if c.has_bias(role):
                yield f"{role}.bias"

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight (``[rows, columns]`` or ``[n]``) or of a bias (``[rows]``)."""
        _, role, kind = split_name(name)
        shape = self.config.weight_shape(role)
        return shape if kind == "weight" or len(shape) == 1 else shape[:-1]

    def parts(self, name: str) -> tuple[Part, ...]:
        """The row ranges on disk that, concatenated, make the weight.

        Raises:
            KeyError: the model has no such weight.
        """
        block, role, kind = split_name(name)
        if role == "lm_head" and kind == "weight" and self.config.tie_word_embeddings:
            role = "embed_tokens"
        family = FAMILIES[self.config.family]
        rows, disk = self.config.weight_shape(role)[0], family.names
        if "." in role:
            return self._of_experts(block, role, kind)
        stored, first, pieces = 0 if block is None else block // self.config.block_repeat, 0, [role]
        if role not in disk or role in family.by_group:
            whole = [f for f, members in FUSED.items() if role in (f, *members) and f in disk]
            if whole:
                pieces, members = whole, FUSED[whole[0]]
                if whole[0] in family.by_group:
                    source = f"{disk[whole[0]].format(i=stored)}.{kind}"
                    return tuple(self._by_group(role, source))
                before = members[: members.index(role)]
                first = sum(self.config.weight_shape(member)[0] for member in before)
            elif role in FUSED:
                pieces = list(FUSED[role])
            else:
                raise KeyError(name)
        parts = []
        for piece in pieces:
            if len(pieces) > 1:
                rows = self.config.weight_shape(piece)[0]
            source = disk[piece].format(i=stored)
            source += "" if piece in family.bare else f".{kind}"
            transposed = kind == "weight" and piece in family.transposed
            parts.append(Part(source, first, first + rows, transposed))
        return tuple(parts)

    def _of_experts(self, block: int | None, role: str, kind: str) -> tuple[Part, ...]:
        """``parts`` of ``experts.5.up_proj`` or ``shared.up_proj``: in a tensor of its own, or in
        one with the gate's rows first; of one expert or of all."""
        group, _, last = role.rpartition(".")
        group, _, expert = group.partition(".")
        disk, rows = FAMILIES[self.config.family].names, self.config.weight_shape(role)[0]
        own, first = disk.get(f"{group}.{last}"), 0
        if own is None:
            own, first = disk[f"{group}.gate_up_proj"], rows if last == "up_proj" else 0
        family, source = FAMILIES[self.config.family], own.format(i=block, e=expert)
        axis = int(expert) if expert and "{e}" not in own else None
        if f"{group}.{last}" in family.bare or f"{group}.gate_up_proj" in family.bare:
            source += "_bias" if kind == "bias" else ""
            assert self.config.experts is not None
            step = 1 if last == "down_proj" else 2  # gate and up by turns
            across = kind == "weight" and not self.config.experts.packed
            return (Part(source, int(last == "up_proj"), step * rows, across, axis, step),)
        source += f".{kind}"
        return (Part(source, first, first + rows, expert=axis),)

    def _by_group(self, role: str, source: str) -> Iterator[Part]:
        """Parts of a tensor with the rows of each key-value head together: its query heads, its
        key, its value (gpt_neox: a group of one; falcon)."""
        c = self.config
        group = c.num_attention_heads // c.num_key_value_heads
        sizes = {"q_proj": group * c.head_dim, "k_proj": c.head_dim, "v_proj": c.head_dim}
        for member in FUSED.get(role, (role,)):
            before = {"q_proj": 0, "k_proj": group * c.head_dim, "v_proj": (group + 1) * c.head_dim}
            for head in range(c.num_key_value_heads):
                start = head * (group + 2) * c.head_dim + before[member]
                yield Part(source, start, start + sizes[member])

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the checkpoint must hold, with its shape."""
        tensors: dict[str, tuple[int, ...]] = {}
        for name in self.names():
            columns = self.shape(name)[1:]
            for part in self.parts(name):
                known = tensors.get(part.source, (0, 0))[-1 if part.transposed else 0]
                many: tuple[int, ...] = ()
                if part.expert is not None and self.config.experts is not None:
                    many = (self.config.experts.count,)
                    known = tensors.get(part.source, (0, 0))[-1 if part.transposed else 1]
                    if self.config.experts.packed and columns:
                        scales = (*many, part.stop, columns[0] // 32)
                        tensors[f"{part.source}_scales"] = scales
                        tensors[f"{part.source}_blocks"] = (*scales, 16)
                        continue
                rows = max(part.stop, known)
                shape = (*columns, rows) if part.transposed else (rows, *columns)
                if split_name(name)[1] == "conv":  # stored as torch's Conv1d has it
                    shape = (rows, 1, *columns)
                tensors[part.source] = (*many, *shape)
        return tensors

    def check(self, checkpoint: Checkpoint) -> None:
        """Compare the checkpoint's shard headers with the config; reads no weights.

        Raises:
            CheckpointError: a tensor is missing, unexpected, or of another shape.
        """
        expected = self.expected()
        found = {name for name in checkpoint.tensors if not BUFFERS.search(name)}
        if len(found) < len(checkpoint.tensors):
            compare_tables(self.config.ropes[0], checkpoint, checkpoint.tensors.keys() - found)
        missing, unexpected = sorted(set(expected) - found), sorted(found - set(expected))
        if missing or unexpected:
            known = explain_names(expected, unexpected, self.config.family)
            if known is not None:
                raise known
        if missing:
            hint = "an incomplete download? packlight never fills in weights"
            if missing == ["lm_head.weight"]:
                hint = "if the head is the embedding, config.json should tie_word_embeddings"
            raise CheckpointError(
                f"{len(missing)} tensor(s) missing from the checkpoint, first {missing[0]!r}",
                hint=hint,
            )
        if unexpected:
            raise CheckpointError(
                f"{len(unexpected)} tensor(s) that a {self.config.family} model does not have, "
                f"first {short(unexpected[0])}",
                hint="another architecture than config.json says?",
            )
        for name, shape in expected.items():
            if checkpoint.tensors[name].shape != shape:
                raise CheckpointError(
                    f"{name} has shape {list(checkpoint.tensors[name].shape)}, "
                    f"but config.json makes it {list(shape)}",
                    hint="config.json and the weights belong to different models",
                )


def split_name(name: str) -> tuple[int | None, str, str]:
    """``blocks.3.q_proj.weight`` → ``(3, "q_proj", "weight")``; ``norm.weight`` → ``(None, …)``;
    of an expert ``(3, "experts.17.up_proj", "weight")``."""
    *stem, kind = name.split(".")
    if stem[0] == "blocks":
        return int(stem[1]), ".".join(stem[2:]), kind
    return None, stem[0], kind


def stored_block(config: DecoderConfig, block: int) -> int:
    """The first of the blocks that share the weights of ``block``."""
    return block - block % config.block_repeat


def input_roles(config: DecoderConfig) -> dict[str, str]:
    """Role of a linear, fused or not, and without an expert's number → role that names its
    input. A router has none: it stays float."""
    mlp = "gate_proj" if config.gated_mlp else "up_proj"
    if config.parallel_residual and "post_attention_layernorm" not in config.norms:
        mlp = "q_proj"
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), "q_proj")
    mlps = dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), mlp)
    own = {role: role for role in ("o_proj", "down_proj", *CONVOLUTION)}
    return {**attention, **mlps, **own}


WIDEST_HESSIAN = 8192  # columns; wider inputs are split into diagonal blocks (268 MB each)


def hessian_spans(columns: int) -> list[slice]:
    """Diagonal blocks of a Hessian: equal multiples of 256, none wider than ``WIDEST_HESSIAN``."""
    count = math.ceil(columns / WIDEST_HESSIAN)
    width = columns if count == 1 else 256 * math.ceil(columns / count / 256)
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]
