"""A block whose MLP is a mixture of experts, in the reference decoder.

    x ─ norm ─┬─ router ─ softmax ─ the best k ─────┐
              ├─ each expert on its tokens ─ × ─────┴─ + ─┬─ x + …
              └─ shared expert (× its gate) ──────────────┘

In memory are the attention half and one matrix of one expert at a time. Rows of an MLP are
independent, so many windows go through the experts together (``run``) and each matrix is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.decoder.config import DecoderConfig, Experts
from compress.decoder.decoder import Block, OnInput, Read
from compress.decoder.kv_cache import Past
from compress.decoder.layers import ACTIVATIONS, RopeTables, as_tensor

ROWS = 1024  # tokens that an expert computes at a time

Empty = Callable[[int, int], Tensor]
"""``empty(rows, columns)``: an uninitialized float32 tensor for an expert's activations."""


def cut(x: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """The rows of a tensor in parts of these lengths; views."""
    ends = list(accumulate(lengths))
    return [x[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def in_parts(x: Tensor) -> list[Tensor]:
    """The rows of a tensor in parts of at most ``ROWS``; views."""
    return [x[start : start + ROWS] for start in range(0, len(x), ROWS)]


def sparsemixer(scores: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """The two experts of each token, ``[n, 2]``, and the weights of their outputs.

    Args:
        scores: of the router, ``[n, experts]``.
        jitter: see ``Experts``; arXiv 2409.12136.
    """
    chosen, weights, left = [], [], scores
    for _ in range(2):
        best, expert = left.max(dim=-1, keepdim=True)
        far = (best - left) / torch.maximum(scores.abs(), best) > 2 * jitter
        probabilities = left.masked_fill(far, -torch.inf).softmax(dim=-1)
        chosen.append(expert)
        weights.append(probabilities.gather(-1, expert))
        left = left.scatter(-1, expert, -torch.inf)
    return torch.cat(chosen, dim=-1), torch.cat(weights, dim=-1)


def clamped(gate: Tensor, most: float) -> Tensor:
    """The activation of gpt_oss's gate."""
    gate = gate.clamp(max=most)
    return gate * torch.sigmoid(1.702 * gate)


class ExpertBlock(Block):
    """One decoder block with a mixture of experts, whose matrices are read when they are used.

    Args:
        config, index, read: as ``Block``.
        resident: keep the experts' matrices after their first use.
        empty: allocates activations of an expert; memory-mapped ones keep the peak low.
    """

    def __init__(
        self,
        config: DecoderConfig,
        index: int,
        read: Read,
        *,
        resident: bool = False,
        empty: Empty = torch.empty,
    ) -> None:
        linears = [role for role in config.linear_roles if not role.startswith("experts.")]
        super().__init__(config, index, read, (*config.norm_roles, *linears))
        assert config.experts is not None
        self.experts: Experts = config.experts
        self._read, self._resident, self._empty = read, resident, empty
        self._matrices: dict[str, Tensor] = {}

    def __call__(
        self,
        hidden: Tensor,
        rope: RopeTables,
        past: Past | None = None,
        on_input: OnInput | None = None,
    ) -> Tensor:
        """See ``Block``."""
        hidden, normed = self.attended(hidden, rope, past, on_input)
        return hidden + self.mlp(normed, on_input) * self.config.residual_scale

    def run(
        self, states: Sequence[Tensor], rope: RopeTables, on_input: OnInput | None = None
    ) -> list[Tensor]:
        """Run many sequences, ``[n, hidden]`` each: all through attention, then through each
        expert."""
        lengths = [len(hidden) for hidden in states]
        stream = torch.empty(sum(lengths), self.config.hidden_size)
        normed = torch.empty_like(stream)
        start = 0
        for hidden, length in zip(states, lengths, strict=True):
            part = slice(start, start + length)
            stream[part], normed[part] = self.attended(hidden, rope, None, on_input)
            start += length
        stream += self.mlp(normed, on_input) * self.config.residual_scale
        return cut(stream, lengths)

    def attended(
        self, hidden: Tensor, rope: RopeTables, past: Past | None, on_input: OnInput | None
    ) -> tuple[Tensor, Tensor]:
        """The stream after attention, and its norm, which the router and the experts read."""
        c = self.config
        normed = self._norm("input_layernorm", hidden, c.norm_eps)
        hidden = hidden + self.attention(normed, rope, past, on_input) * c.residual_scale
        return hidden, self.normed(hidden)

    def normed(self, hidden: Tensor) -> Tensor:
        """The norm of the stream after attention."""
        return self._norm("post_attention_layernorm", hidden, self.config.norm_eps)

    def mlp(self, x: Tensor, on_input: OnInput | None = None) -> Tensor:
        """The shared expert's output plus the chosen experts', ``[n, hidden]``."""
        mixed = self.shared(x, on_input)
        listen = None if on_input is None else (lambda name, values, _: on_input(name, values))
        chosen, weights = self.route(x)
        for expert in range(self.experts.count):
            rows, place = torch.where(chosen == expert)
            if not len(rows):
                continue
            factors = iter(in_parts(weights[rows, place, None]))
            for part, output in self.expert(expert, x.__getitem__, in_parts(rows), listen):
                mixed.index_add_(0, part, output.mul_(next(factors)))
        return mixed

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's experts, ``[n, chosen]``, and the weights of their outputs."""
        scores = F.linear(x, self.weights["router.weight"], self.weights.get("router.bias"))
        if self.experts.jitter:
            return sparsemixer(scores, self.experts.jitter)
        weights, chosen = scores.softmax(dim=-1).topk(self.experts.chosen, dim=-1)
        if self.experts.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return chosen, weights

    def shared(self, x: Tensor, on_input: OnInput | None = None) -> Tensor:
        """The output of the expert that every token passes; zeros where there is none."""
        if not self.experts.shared_width:
            return torch.zeros_like(x)
        activate = ACTIVATIONS[self.config.activation]
        mixed = torch.empty_like(x)
        # By parts: its activations are as wide as an expert's.
        for start in range(0, len(x), ROWS):
            part = x[start : start + ROWS]
            inner = activate(self._linear("shared.gate_proj", part, on_input))
            inner *= self._linear("shared.up_proj", part, on_input)
            output = self._linear("shared.down_proj", inner, on_input)
            if self.experts.shared_gate:
                output *= F.linear(part, self.weights["shared_gate.weight"]).sigmoid()
            mixed[start : start + ROWS] = output
        return mixed

    def expert(
        self,
        expert: int,
        take: Callable[[Tensor], Tensor],
        parts: Sequence[Tensor],
        on_input: Callable[[str, Tensor, int], None] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Run one expert; its three matrices are read one after the other.

        Args:
            expert: its number.
            take: row numbers → those rows of the MLP's input.
            parts: row numbers, in parts that are computed one at a time.
            on_input: ``on_input(name, x, part)``: called with the inputs of its linears.

        Yields the row numbers of each part, and the output, ``[rows, hidden]``.
        """
        stem = f"{self._stem}experts.{expert}."
        activate, most = ACTIVATIONS[self.config.activation], self.experts.clamp
        inner = cut(self._empty(sum(map(len, parts)), self.experts.width), [*map(len, parts)])

        def product(role: str, inputs: Iterable[Tensor]) -> Iterator[Tensor]:
            name = f"{stem}{role}.weight"
            matrix = self._matrix(name)
            bias = self._matrix(f"{stem}{role}.bias") if self.experts.biased else None
            for part, x in enumerate(inputs):
                if on_input is not None:
                    on_input(name, x, part)
                yield F.linear(x, matrix, bias)

        for values, gate in zip(inner, product("gate_proj", map(take, parts)), strict=True):
            values[:] = clamped(gate, most) if most else activate(gate)
        for values, up in zip(inner, product("up_proj", map(take, parts)), strict=True):
            values *= up.clamp_(-most, most).add_(1) if most else up
        yield from zip(parts, product("down_proj", inner), strict=True)

    def _matrix(self, name: str) -> Tensor:
        if name in self._matrices:
            return self._matrices[name]
        matrix = as_tensor(self._read(name))
        if self._resident:
            self._matrices[name] = matrix
        return matrix
