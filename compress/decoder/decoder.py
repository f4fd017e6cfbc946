"""The reference decoder: one float32 torch implementation of every family in ``families.FAMILIES``.

It computes the baseline's logits, the inputs that calibration collects, and the logits of weights
that were quantized and decoded again. Weights are streamed: a block's are read when the block runs
and dropped after it, so peak memory is one block or the head, not the model.

    tokens ─ embed ─┬─────────────┬─ + ─┬────────── + ─ ... ─ norm ─ lm_head ─ logits
                    └ norm ─ attn ┘     └ norm ─ mlp ┘
    parallel (phi): x + attn(norm(x)) + mlp(norm(x)), one norm.

Shapes: hidden states are float32 ``[positions, hidden]``, one sequence at a time; there is no
batch dimension. Reference: the modelling files of transformers 4.57.6; tests compare the logits
within 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from compress.decoder.config import FUSED, DecoderConfig, split_name
from compress.decoder.kv_cache import Past
from compress.errors import UsageError
from compress.machine import available_memory, set_torch_threads

Float32 = NDArray[np.float32]

STATES_SHARE = 1 / 8  # of the available memory, for the hidden states of a batch

Read = Callable[[str], Float32]
"""``read(name)``: a weight by packlight's name, e.g. ``Weights.read``, ``reader(config, dict)``."""

OnInput = Callable[[str, Tensor], None]
"""``on_input("blocks.3.q_proj.weight", x)``: called with a linear's input, ``[n, columns]``.

For linears that share an input (q, k, v; gate, up) it is called in sequence with the same tensor
object.
"""


def reader(config: DecoderConfig, weights: Mapping[str, Float32]) -> Read:
    """A ``read(name)`` function over a dict of fused names, unfused names, or a mixture.

    A tied head may be left out. ``read`` raises KeyError for a missing weight.
    """

    def rows(role: str) -> int:
        return config.weight_shape(role)[0]

    def read(name: str) -> Float32:
        if name in weights:
            return weights[name]
        block, role, kind = split_name(name)
        if role == "lm_head" and kind == "weight" and config.tie_word_embeddings:
            return weights["embed_tokens.weight"]
        for fused, members in FUSED.items():
            whole = f"blocks.{block}.{fused}.{kind}"
            if role in members and whole in weights:
                start = sum(rows(member) for member in members[: members.index(role)])
                return weights[whole][start : start + rows(role)]
        raise KeyError(name)

    return read


@dataclass(frozen=True)
class RopeTable:
    """cos and sin by position, ``[positions, rotary_dim / 2]``, already scaled."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor, start: int) -> Tensor:
        """Rotate the leading dimensions of ``x``, ``[heads, n, head_dim]``, from ``start`` on."""
        positions = slice(start, start + x.shape[1])
        cos, sin = self.cos[positions], self.sin[positions]
        half = cos.shape[1]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        rotated = (first * cos - second * sin, second * cos + first * sin, rest)
        return torch.cat(rotated, dim=-1)


class Block:
    """One decoder block with its weights in memory.

    Args:
        config: the decoder.
        index: of the block.
        read: weights by name.
        roles: only these weights, of the half that will be run; None for all.

    Attributes:
        weights: by role and kind (``q_proj.weight``), float32; healing replaces them.
    """

    def __init__(
        self, config: DecoderConfig, index: int, read: Read, roles: Sequence[str] | None = None
    ) -> None:
        self.config = config
        self.index = index
        self._stem = f"blocks.{index}."
        self.weights: dict[str, Tensor] = {}
        for role in (*config.norm_roles, *config.linear_roles) if roles is None else roles:
            kinds = ("weight", "bias") if config.has_bias(role) else ("weight",)
            for kind in kinds:
                name = f"{self._stem}{role}.{kind}"
                self.weights[f"{role}.{kind}"] = as_tensor(read(name))

    def __call__(
        self,
        hidden: Tensor,
        rope: RopeTable,
        past: Past | None = None,
        on_input: OnInput | None = None,
    ) -> Tensor:
        """Run the block, ``[n, hidden]`` → ``[n, hidden]``; with ``past``, after its positions."""
        normed = self._norm("input_layernorm", hidden)
        attended = hidden + self.attention(normed, rope, past, on_input)
        if self.config.parallel_residual:
            return attended + self.mlp(normed, on_input)
        normed = self._norm("post_attention_layernorm", attended)
        return attended + self.mlp(normed, on_input)

    def _linear(self, role: str, x: Tensor, on_input: OnInput | None) -> Tensor:
        if on_input is not None:
            on_input(f"{self._stem}{role}.weight", x)
        return F.linear(x, self.weights[f"{role}.weight"], self.weights.get(f"{role}.bias"))

    def _norm(self, role: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{role}.weight"], self.weights.get(f"{role}.bias")
        return normalize(self.config, x, weight, bias)

    def attention(
        self,
        x: Tensor,
        rope: RopeTable,
        past: Past | None = None,
        on_input: OnInput | None = None,
    ) -> Tensor:
        """The attention output for one normed sequence ``x``, ``[n, hidden]``, without residual."""
        c = self.config
        count, start = x.shape[0], past.length if past is not None else 0
        query, key, value = (
            self._linear(role, x, on_input).view(count, -1, c.head_dim).transpose(0, 1)
            for role in ("q_proj", "k_proj", "v_proj")
        )  # [heads, n, head_dim]
        if c.qk_norm:
            query, key = self._norm("q_norm", query), self._norm("k_norm", key)
        query, key = rope.rotate(query, start), rope.rotate(key, start)
        if past is not None:
            key, value = past.append(key, value)
        # Every key-value head serves a group of query heads: [kv heads, group, n, head_dim].
        shape = (c.num_key_value_heads, -1, count, c.head_dim)
        grouped = query.reshape(shape)
        group = grouped.shape[1]
        mask = visible(count, start, c.sliding_window)
        mixed = F.scaled_dot_product_attention(
            grouped,
            key.unsqueeze(1).expand(-1, group, -1, -1),
            value.unsqueeze(1).expand(-1, group, -1, -1),
            attn_mask=mask,
            is_causal=mask is None and count > 1,
        )
        merged = mixed.reshape(c.num_attention_heads, count, c.head_dim).transpose(0, 1)
        return self._linear("o_proj", merged.reshape(count, -1), on_input)

    def mlp(self, x: Tensor, on_input: OnInput | None = None) -> Tensor:
        """The MLP output, of the same shape as ``x``; rows are independent."""
        if self.config.gated_mlp:
            gate = F.silu(self._linear("gate_proj", x, on_input))
            inner = gate * self._linear("up_proj", x, on_input)
        else:
            inner = F.gelu(self._linear("up_proj", x, on_input), approximate="tanh")
        return self._linear("down_proj", inner, on_input)


def visible(count: int, start: int, window: int | None) -> Tensor | None:
    """The attention mask of ``count`` queries after ``start`` cached positions.

    bool ``[count, start + count]``; None where plain causal attention from position 0, or a single
    query that attends to everything, is equivalent.
    """
    end = start + count
    windowed = window is not None and end > window
    if not windowed and (start == 0 or count == 1):
        return None
    query = torch.arange(start, end)[:, None]
    key = torch.arange(end)[None, :]
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    return mask


def normalize(config: DecoderConfig, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The model's norm over the last dimension: RMSNorm, or LayerNorm with a bias."""
    if config.norm == "layernorm":
        return F.layer_norm(x, weight.shape, weight, bias, config.norm_eps)
    return F.rms_norm(x, weight.shape, weight, config.norm_eps)


def as_tensor(values: Float32) -> Tensor:
    """A float32 tensor over the same memory, or a copy where the memory is read-only."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    return torch.from_numpy(values if values.flags.writeable else values.copy())


class Decoder:
    """Embedding, blocks, final norm, head. Satisfies ``compress.plan.shapes.Runtime``.

    Args:
        config: the decoder.
        read: ``read(name)`` → float32.
        threads: for torch, process-wide; 0 does not change the setting.
        resident: keep every weight after its first use (float32: 4 bytes per parameter), as a
            float runtime would; to measure the baseline's speed. Otherwise weights stream.
    """

    def __init__(
        self, config: DecoderConfig, read: Read, *, threads: int = 0, resident: bool = False
    ) -> None:
        if threads:
            set_torch_threads(threads)
        self.config = config
        self.resident = resident
        self._read = read
        self._loaded: dict[str, Tensor] = {}
        self._blocks: dict[int, Block] = {}
        self._past: list[Past] = []
        self._rope = RopeTable(torch.empty(0, 0), torch.empty(0, 0))

    # --- pieces ------------------------------------------------------------------------------

    def block(self, index: int) -> Block:
        """Block ``index`` with its weights read."""
        if index in self._blocks:
            return self._blocks[index]
        block = Block(self.config, index, self._read)
        if self.resident:
            self._blocks[index] = block
        return block

    def rope(self, positions: int) -> RopeTable:
        """Tables for at least ``positions`` positions.

        Raises:
            UsageError: more than ``config.max_context``, where this decoder differs from the model.
        """
        limit = self.config.max_context
        if positions > limit:
            raise UsageError(f"{positions} tokens, but the model is verified up to {limit}")
        if positions > self._rope.cos.shape[0]:
            cos, sin = self.config.rope.cos_sin(min(limit, max(256, 2 * positions)))
            self._rope = RopeTable(torch.from_numpy(cos), torch.from_numpy(sin))
        return self._rope

    def embed(self, windows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Token ids → hidden states before block 0; the embedding is read once.

        Raises:
            UsageError: an empty sequence, or an id outside the vocabulary.
        """
        for tokens in windows:
            if not tokens or min(tokens) < 0 or max(tokens) >= self.config.vocab_size:
                raise UsageError(f"token ids must be in [0, {self.config.vocab_size}), at least 1")
        table = self._weight("embed_tokens.weight")
        return [table[torch.tensor(tokens)] for tokens in windows]

    def _weight(self, name: str) -> Tensor:
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            name = "embed_tokens.weight"
        if name in self._loaded:
            return self._loaded[name]
        tensor = as_tensor(self._read(name))
        if self.resident:
            self._loaded[name] = tensor
        return tensor

    def _bias(self, role: str) -> Tensor | None:
        return self._weight(f"{role}.bias") if self.config.has_bias(role) else None

    def head(self) -> Callable[[Tensor], Tensor]:
        """Final norm and head with their weights read: ``[n, hidden]`` → ``[n, vocab]``."""
        norm, norm_bias = self._weight("norm.weight"), self._bias("norm")
        head, head_bias = self._weight("lm_head.weight"), self._bias("lm_head")
        config = self.config

        def logits(hidden: Tensor) -> Tensor:
            return F.linear(normalize(config, hidden, norm, norm_bias), head, head_bias)

        return logits

    # --- many sequences, one block in memory ---------------------------------------------------

    def walk(
        self, windows: Sequence[Sequence[int]], on_input: OnInput | None = None
    ) -> Iterator[list[Tensor]]:
        """Run all windows through block 0, then all through block 1 …

        Yields the windows' hidden states, one tensor ``[len, hidden]`` each: first the embedded
        tokens, then after every block; ``num_hidden_layers + 1`` times.
        """
        rope = self.rope(max((len(tokens) for tokens in windows), default=0))
        states = self.embed(windows)
        yield states
        for index in range(self.config.num_hidden_layers):
            block = self.block(index)
            states = [block(hidden, rope, on_input=on_input) for hidden in states]
            del block
            yield states

    def stream_logits(
        self,
        windows: Sequence[Sequence[int]],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Float32]:
        """Logits of each window, float32 ``[len, vocab]``, in order.

        Every weight is read once for each of ``batches``, usually one.

        Args:
            progress: ``progress(done, total)`` after each block and each window.
        """
        batches = self.batches(windows)
        total = len(batches) * self.config.num_hidden_layers + len(windows)
        done = 0
        for batch in batches:
            states: list[Tensor] = []
            for step, states in enumerate(self.walk(batch)):  # noqa: B007
                if progress is not None:
                    progress(done + step, total)
            done += self.config.num_hidden_layers
            head = self.head()
            for hidden in states:
                yield head(hidden).numpy()
                done += 1
                if progress is not None:
                    progress(done, total)
            del head, hidden

    def batches(self, windows: Sequence[Sequence[int]]) -> list[Sequence[Sequence[int]]]:
        """Batches of windows whose hidden states fit in ``STATES_SHARE`` of the memory, of at least
        one window each."""
        room = int(available_memory() * STATES_SHARE)
        longest = max([1, *map(len, windows)])
        count = max(room // (4 * self.config.hidden_size * longest), 1)
        return [windows[start : start + count] for start in range(0, len(windows), count)]

    # --- Runtime -----------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name and version of the runtime, for the report."""
        return f"torch {torch.__version__}, float32"

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return self.config.vocab_size

    def logits(self, tokens: Sequence[int]) -> Float32:
        """Logits at every position of a fresh sequence, float32 ``[len(tokens), vocab]``."""
        self.reset()
        return next(self.stream_logits([tokens]))

    def reset(self) -> None:
        """Empty the KV cache."""
        self._past = []

    def feed(self, tokens: Sequence[int]) -> Float32:
        """Append tokens to the cached sequence; logits after the last one, float32 ``[vocab]``."""
        if not self._past:
            self._past = [Past() for _ in range(self.config.num_hidden_layers)]
        rope = self.rope(self._past[0].length + len(tokens))
        (hidden,) = self.embed([tokens])
        for index, past in enumerate(self._past):
            hidden = self.block(index)(hidden, rope, past)
        return self.head()(hidden[-1:])[0].numpy()

    def close(self) -> None:
        """Drop the resident weights and the cache."""
        self._loaded.clear()
        self._blocks.clear()
        self.reset()
