"""The reference decoder: one float32 torch implementation of every family in ``families.FAMILIES``.

It computes the baseline's logits, the inputs that calibration collects, and the logits of weights
that were quantized and decoded again. Weights are streamed: a block's are read when the block runs
and dropped after it, so peak memory is one block or the head, not the model.

    tokens ─ embed ─┬─────────────┬─ + ─┬────────── + ─ ... ─ norm ─ lm_head ─ logits
                    └ norm ─ attn ┘     └ norm ─ mlp ┘
    parallel (phi): x + attn(norm(x)) + mlp(norm(x)), one norm; two in gpt_neox.
    post norms (gemma2, olmo2): x + norm(attn(…)); the norm before the branch may be missing.

Scalars (``embed_scale``, ``residual_scale`` …) are computed as the model's authors wrote them; a
target whose graph has no place for them gets them inside its weights
(``compress.checkpoint.scalars``), and each is the other's test.

Shapes: hidden states are float32 ``[positions, hidden]``, one sequence at a time; there is no
batch dimension. Reference: the modelling files of transformers 4.57.6; tests compare the logits
within 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from compress.decoder.config import FUSED, DecoderConfig, split_name
from compress.decoder.kv_cache import Past
from compress.decoder.layers import (
    ACTIVATIONS,
    RopeTable,
    RopeTables,
    as_tensor,
    capped_attention,
    finished,
    normalize,
    switching,
    visible,
)
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
        self.kind = config.kinds[config.layers[index]]
        self._stem = f"blocks.{index}."
        self.weights: dict[str, Tensor] = {}
        for role in (*config.norm_roles, *config.linear_roles) if roles is None else roles:
            if role in self.kind.absent:
                continue
            if role in ("q_norm", "k_norm") and not self.kind.normed:
                continue
            kinds = ("weight", "bias") if config.has_bias(role) else ("weight",)
            for kind in kinds:
                name = f"{self._stem}{role}.{kind}"
                self.weights[f"{role}.{kind}"] = as_tensor(read(name))

    def __call__(
        self,
        hidden: Tensor,
        rope: RopeTables,
        past: Past | None = None,
        on_input: OnInput | None = None,
    ) -> Tensor:
        """Run the block, ``[n, hidden]`` → ``[n, hidden]``; with ``past``, after its positions."""
        c = self.config
        normed = hidden
        if "input_layernorm" in c.norms:
            normed = self._norm("input_layernorm", hidden, c.norm_eps)
        branch = self.attention(normed, rope, past, on_input)
        if "attention_post_norm" in c.norms:
            branch = self._norm("attention_post_norm", branch, c.branch_eps)
        attended = hidden + (branch if c.residual_scale == 1.0 else branch * c.residual_scale)
        before = hidden if c.parallel_residual else attended
        if "post_attention_layernorm" in c.norms:
            normed = self._norm("post_attention_layernorm", before, c.norm_eps)
        elif not c.parallel_residual:
            normed = before
        branch = self.mlp(normed, on_input)
        if "mlp_post_norm" in c.norms:
            branch = self._norm("mlp_post_norm", branch, c.branch_eps)
        return attended + (branch if c.residual_scale == 1.0 else branch * c.residual_scale)

    def run(
        self, states: Sequence[Tensor], rope: RopeTables, on_input: OnInput | None = None
    ) -> list[Tensor]:
        """Run many sequences, ``[n, hidden]`` each."""
        return [self(hidden, rope, on_input=on_input) for hidden in states]

    def _linear(self, role: str, x: Tensor, on_input: OnInput | None) -> Tensor:
        if on_input is not None:
            on_input(f"{self._stem}{role}.weight", x)
        return F.linear(x, self.weights[f"{role}.weight"], self.weights.get(f"{role}.bias"))

    def _norm(self, role: str, x: Tensor, eps: float) -> Tensor:
        weight, bias = self.weights[f"{role}.weight"], self.weights.get(f"{role}.bias")
        if role in ("q_norm", "k_norm"):
            return F.rms_norm(x, weight.shape, weight, eps)
        return normalize(self.config, x, weight, bias, eps)

    def _head_norm(self, role: str, x: Tensor) -> Tensor:
        """The norm of q or k, ``[heads, n, head_dim]``, each head by itself."""
        if self.config.qk_norm == "unit":
            return F.rms_norm(x, x.shape[-1:], None, self.config.branch_eps)
        return self._norm(role, x, self.config.branch_eps)

    def attention(
        self,
        x: Tensor,
        rope: RopeTables,
        past: Past | None = None,
        on_input: OnInput | None = None,
    ) -> Tensor:
        """The attention output for one normed sequence ``x``, ``[n, hidden]``, without residual; or
        the convolution's, in a layer that has one."""
        c = self.config
        if self.kind.taps:
            from compress.decoder.convolution import convolved

            taps = self.weights["conv.weight"]
            return convolved(self._linear, taps, x, past, on_input)
        count, start = x.shape[0], past.length if past is not None else 0
        flat = [self._linear(role, x, on_input) for role in ("q_proj", "k_proj", "v_proj")]
        if c.qk_norm == "projection":
            for i, role in enumerate(("q_norm", "k_norm")):
                flat[i] = self._norm(role, flat[i], c.branch_eps)
        query, key, value = (
            part.view(count, -1, c.head_dim).transpose(0, 1) for part in flat
        )  # [heads, n, head_dim]
        by_head = c.qk_norm in ("head", "unit") and self.kind.normed
        if by_head and not c.qk_norm_after_rope:
            query, key = self._head_norm("q_norm", query), self._head_norm("k_norm", key)
        if self.kind.rope is not None:
            table = rope[self.kind.rope]
            query, key = (table.rotate(part, start, pairs=c.rope_pairs) for part in (query, key))
        if by_head and c.qk_norm_after_rope:
            query, key = self._head_norm("q_norm", query), self._head_norm("k_norm", key)
        if past is not None:
            key, value = past.append(key, value)
        # Every key-value head serves a group of query heads: [kv heads, group, n, head_dim].
        shape = (c.num_key_value_heads, -1, count, c.head_dim)
        grouped = query.reshape(shape)
        group = grouped.shape[1]
        mask = visible(count, start, self.kind.window)
        keys = key.unsqueeze(1).expand(-1, group, -1, -1)
        values = value.unsqueeze(1).expand(-1, group, -1, -1)
        if c.score_cap or c.sinks:
            sinks, scale = self.weights.get("sinks.weight"), c.attention_scale
            mixed = capped_attention(grouped, keys, values, mask, scale, c.score_cap, sinks)
        else:
            mixed = F.scaled_dot_product_attention(
                grouped,
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None and count > 1,
                scale=c.attention_scale,
            )
        merged = mixed.reshape(c.num_attention_heads, count, c.head_dim).transpose(0, 1)
        return self._linear("o_proj", merged.reshape(count, -1), on_input)

    def mlp(self, x: Tensor, on_input: OnInput | None = None) -> Tensor:
        """The MLP output, of the same shape as ``x``; rows are independent."""
        activate = ACTIVATIONS[self.config.activation]
        if self.config.gated_mlp:
            gate = activate(self._linear("gate_proj", x, on_input))
            inner = gate * self._linear("up_proj", x, on_input)
        else:
            inner = activate(self._linear("up_proj", x, on_input))
        return self._linear("down_proj", inner, on_input)


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
        self._fed: list[int] = []  # the tokens of the cache
        self._rope: RopeTables = ()
        self._positions = 0  # of the tables

    # --- pieces ------------------------------------------------------------------------------

    def block(self, index: int) -> Block:
        """Block ``index`` with its weights read."""
        if index in self._blocks:
            return self._blocks[index]
        if self.config.experts is not None:
            from compress.decoder.experts import ExpertBlock

            block: Block = ExpertBlock(self.config, index, self._read, resident=self.resident)
        else:
            block = Block(self.config, index, self._read)
        if self.resident:
            self._blocks[index] = block
        return block

    def rope(self, positions: int) -> RopeTables:
        """Tables for at least ``positions`` positions.

        Raises:
            UsageError: more than ``config.max_context``, where this decoder differs from the model.
        """
        limit = self.config.max_context
        if positions > limit:
            raise UsageError(f"{positions} tokens, but the model is verified up to {limit}")
        if positions > self._positions:
            self._positions = min(limit, max(256, 2 * positions))
            tables = (rope.cos_sin(self._positions) for rope in self.config.ropes)
            self._rope = [RopeTable(*map(torch.from_numpy, table)) for table in tables]
            if self.config.rope_switch:
                self._rope = switching(self.config, self._rope)
        return self._rope

    def embed(self, windows: Sequence[Sequence[int]], start: int = 0) -> list[Tensor]:
        """Token ids → hidden states before block 0; the embedding is read once.

        Args:
            windows: token ids.
            start: position of their first tokens.

        Raises:
            UsageError: an empty sequence, or an id outside the vocabulary.
        """
        for tokens in windows:
            if not tokens or min(tokens) < 0 or max(tokens) >= self.config.vocab_size:
                raise UsageError(f"token ids must be in [0, {self.config.vocab_size}), at least 1")
        table, scale = self._weight("embed_tokens.weight"), self.config.embed_scale
        states = [table[torch.tensor(tokens)] for tokens in windows]
        if scale != 1.0:
            states = [hidden * scale for hidden in states]
        if self.config.learned_positions:
            places = self._weight("embed_positions.weight")[start:]
            states = [hidden + places[: len(hidden)] for hidden in states]
        return states

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
            normed = normalize(config, hidden, norm, norm_bias, config.norm_eps)
            found = F.linear(normed, head, head_bias)
            if config.logit_scale != 1.0 or config.logit_cap:
                found = finished(config, found)
            return found

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
            states = block.run(states, rope, on_input)
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
        if self.config.experts is not None:  # the stream, its norm, the experts' sum
            room //= 4
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
        self._past, self._fed = [], []

    def feed(self, tokens: Sequence[int], *, every: bool = False) -> Float32:
        """Append tokens to the cached sequence; logits after the last one, float32 ``[vocab]``, or
        for ``every`` one, ``[len(tokens), vocab]``.

        A text that grows beyond ``rope_switch`` is computed again: its keys rotate otherwise.
        """
        count, start = len(tokens), self._past[0].length if self._past else 0
        rope = self.rope(start + count)
        fed = [*self._fed, *tokens]
        if 0 < start <= self.config.rope_switch < start + count:
            self._past, tokens, start = [], fed, 0
        (hidden,) = self.embed([tokens], start)
        if not self._past:
            self._past = [Past() for _ in range(self.config.num_hidden_layers)]
        self._fed = fed
        for index, past in enumerate(self._past):
            hidden = self.block(index)(hidden, rope, past)
        if every:
            return self.head()(hidden[-count:]).numpy()
        return self.head()(hidden[-1:])[0].numpy()

    def extend(self, tokens: Sequence[int]) -> Float32:
        """``feed`` with the logits at every new position, float32 ``[len(tokens), vocab]``."""
        return self.feed(tokens, every=True)

    def rewind(self, length: int) -> int:
        """Keep the first ``length`` positions of the KV cache; returns how many were kept."""
        if length <= self.config.rope_switch < len(self._fed):
            self.reset()  # its keys have the other rotation
        del self._fed[length:]
        for past in self._past:
            past.cut(length)
        return self._past[0].length if self._past else 0

    def close(self) -> None:
        """Drop the resident weights and the cache."""
        self._loaded.clear()
        self._blocks.clear()
        self.reset()
