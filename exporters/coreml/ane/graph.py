"""Builds the functions of ``iphone-ane``'s packages: layouts and operations of the Neural Engine.

Activations are float16 ``[1, channels, 1, ids]``, linears are 1×1 convolutions, softmax and norms
run over the channels. Attention is that of one head at a time, as products ``nchw,nwhu->nchu``:
scores ``[1, keys, 1, ids]`` of keys ``[1, keys, 1, head_dim]`` and a query ``[1, head_dim, 1,
ids]``, then values ``[1, head_dim, 1, keys]`` and shares. The caches are inputs that are only read,
and scores of the cache and of the new ids are computed apart, so that no cache is copied. Shapes
are static, there are no states, no bools, no integers and no float32.

    key_cache    [blocks, context, 1, kv_heads * head_dim]      new_keys    [blocks, ids, 1, …]
    value_cache  [blocks, kv_heads * head_dim, 1, context]      new_values  [blocks, …, 1, ids]
    mask         [1, context + ids, 1, ids], 0 or -40000: slots of the cache, then the new ids

Norms divide by the largest magnitude first: in ``x * rsqrt(mean(x²))`` the square of a residual of
more than 255 would be beyond float16. The epsilon is divided by the magnitude's square.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from compress.decoder.config import DecoderConfig
from exporters.coreml import graph

__all__ = ["HIDDEN", "Functions", "mask_name", "table_names"]

HIDDEN = -40000.0  # added to the score of a hidden position; -inf is not for the Neural Engine
SMALLEST = np.float16(2.0**-14)  # float16's smallest normal number
PRODUCT = "nchw,nwhu->nchu"

Var = Any  # coremltools has no types


class Constants(graph.Constants, Protocol):
    """The source of the constants, with the head's pieces."""

    @property
    def head_pieces(self) -> int: ...


def mask_name(window: int | None) -> str:
    """The input with the mask of a window; None: of all positions."""
    return f"mask_{window}" if window else "mask"


def table_names(rope: int) -> tuple[str, str]:
    """The inputs with cosines and sines of a rotary embedding, ``[1, rotary_dim / 2, 1, ids]``."""
    end = f"_{rope}" if rope else ""
    return f"cos{end}", f"sin{end}"


def factors(value: float) -> tuple[np.float16, np.float16]:
    """Two float16 numbers near its root whose product is ``value`` to a millionth: one float16 is
    off by up to a two-thousandth."""
    near = np.float16(value**0.5)
    first = (np.arange(512, dtype=np.int16) + near.view(np.int16)).view(np.float16)
    second = (value / first.astype(np.float64)).astype(np.float16)
    off = np.abs(first.astype(np.float64) * second.astype(np.float64) - value)
    best = int(off.argmin())
    return first[best], second[best]


class Functions(graph.Decoder):
    """Emits functions with coremltools' builder ``mb``.

    Args:
        config: the model.
        context: slots of the caches.
        constants: source of the weights.
        ids: number of ids in a call.
    """

    def __init__(
        self, mb: Any, config: DecoderConfig, context: int, constants: Constants, ids: int
    ) -> None:
        super().__init__(mb, config, context, constants)
        self.ids, self.pieces = ids, constants
        self.inputs: Mapping[str, Var] = {}
        self.first = 0
        self.new: tuple[list[Var], list[Var]] = ([], [])

    # --- the packages -------------------------------------------------------------------------

    def embedding(self, ids: Var, positions: Var) -> list[Var]:
        """``hidden`` and the rotary tables of ids ``[1, n]`` at positions ``[n]``."""
        mb, c = self.mb, self.config
        x = self.rows("embed_tokens", self.constants.weight("embed_tokens.weight"), ids)
        if c.learned_positions:
            weight = self.constants.weight("embed_positions.weight")
            x = mb.add(x=x, y=self.rows("embed_positions", weight, positions), name="embed_placed")
        x = mb.transpose(x=x, perm=[0, 2, 1], name="embed_channels_first")
        found = [mb.expand_dims(x=x, axes=[2], name="hidden")]
        half = c.ropes[0].rotary_dim // 2
        for rope in sorted({kind.rope for kind in c.kinds if kind.rope is not None}):
            for name in table_names(rope):
                table = self.constants.array(f"rope_{name}", (self.context, half))
                taken = self.rows(f"{name}_rows", table, positions)  # [n, half]
                turned = mb.transpose(x=taken, perm=[1, 0], name=f"{name}_channels_first")
                found.append(mb.reshape(x=turned, shape=[1, half, 1, self.ids], name=name))
        return found

    def blocks(self, first: int, last: int, inputs: Mapping[str, Var]) -> list[Var]:
        """``hidden_next``, ``new_keys`` and ``new_values`` of blocks ``first`` to ``last - 1``."""
        mb, x = self.mb, inputs["hidden"]
        self.inputs, self.first = inputs, first
        for block in range(first, last):
            x = self.block(block, x)
        found = [mb.identity(x=x, name="hidden_next")]
        for name, new in zip(("new_keys", "new_values"), self.new, strict=True):
            if len(new) == 1:
                found.append(mb.identity(x=new[0], name=name))
            else:
                found.append(mb.concat(values=new, axis=0, name=name))
        return found

    def head(self, hidden: Var) -> list[Var]:
        """``logits_1`` …: pieces of the vocabulary, ``[1, rows, 1, n]`` each."""
        mb, c = self.mb, self.config
        x = self.norm("norm", hidden, "norm")
        found = []
        for number in range(1, self.pieces.head_pieces + 1):
            name = f"logits_{number}"
            bias = {}
            if c.lm_head_bias:
                bias = {"bias": self.constants.weight(f"lm_head.bias.{number}")}
            weight = self.constants.weight(f"lm_head.weight.{number}")
            if not c.logit_cap:
                found.append(mb.conv(x=x, weight=weight, **bias, name=name))
                continue
            y = mb.conv(x=x, weight=weight, **bias, name=f"{name}_uncapped")
            for place, part in enumerate(factors(1 / c.logit_cap)):
                y = mb.mul(x=y, y=part, name=f"{name}_divided_{place}")
            y = mb.tanh(x=y, name=f"{name}_tanh")
            found.append(mb.mul(x=y, y=np.float16(c.logit_cap), name=name))
        return found

    # --- operations ---------------------------------------------------------------------------

    def rows(self, name: str, table: Var, indices: Var) -> Var:
        """Rows of a table."""
        return self.mb.gather(x=table, indices=indices, axis=0, validate_indices=False, name=name)

    def linear(self, weight: str, x: Var, name: str) -> Var:
        """A linear as a 1×1 convolution."""
        bias = {}
        if self.config.has_bias(weight.rpartition(".")[2]):
            bias = {"bias": self.constants.weight(f"{weight}.bias")}
        matrix = self.constants.weight(f"{weight}.weight")
        return self.mb.conv(x=x, weight=matrix, **bias, name=name)

    def norm(self, weight: str, x: Var, name: str) -> Var:
        """RMSNorm or LayerNorm over the channels, scaled by the largest magnitude."""
        mb, c = self.mb, self.config
        own = weight.endswith(("q_norm", "k_norm"))
        epsilon = c.branch_eps if own or weight.endswith("post_norm") else c.norm_eps
        size = mb.abs(x=x, name=f"{name}_abs")
        peak = mb.reduce_max(x=size, axes=[1], keep_dims=True, name=f"{name}_peak")
        peak = mb.maximum(x=peak, y=SMALLEST, name=f"{name}_largest")
        z = mb.real_div(x=x, y=peak, name=f"{name}_divided")
        centered = c.norm == "layernorm" and not own
        if centered:
            mean = mb.reduce_mean(x=z, axes=[1], keep_dims=True, name=f"{name}_center")
            z = mb.sub(x=z, y=mean, name=f"{name}_centered")
        square = mb.mul(x=z, y=z, name=f"{name}_square")
        mean = mb.reduce_mean(x=square, axes=[1], keep_dims=True, name=f"{name}_mean")
        one, other = (
            mb.real_div(x=factor, y=peak, name=f"{name}_{which}_root")
            for which, factor in zip(("one", "other"), factors(epsilon), strict=True)
        )
        least = mb.mul(x=one, y=other, name=f"{name}_epsilon")
        mean = mb.add(x=mean, y=least, name=f"{name}_mean_epsilon")
        inverse = mb.rsqrt(x=mean, epsilon=np.float16(0), name=f"{name}_rsqrt")
        normed = mb.mul(x=z, y=inverse, name=f"{name}_normed")
        scale = self.constants.weight(f"{weight}.weight")
        if not (centered and c.norm_bias):
            return mb.mul(x=normed, y=scale, name=name)
        scaled = mb.mul(x=normed, y=scale, name=f"{name}_scaled")
        return mb.add(x=scaled, y=self.constants.weight(f"{weight}.bias"), name=name)

    def attention(self, block: int, x: Var) -> Var:
        """Attention of one head at a time over the cache and the new ids."""
        mb, c, stem, weights = self.mb, self.config, f"block_{block}", f"blocks.{block}"
        kind, heads, shared = c.kinds[c.layers[block]], c.num_attention_heads, c.num_key_value_heads
        by_head = c.qk_norm == "head" and kind.normed
        turned = []
        for role, count in (("q_proj", heads), ("k_proj", shared)):
            name, norm = f"{stem}_{role}", f"{role[0]}_norm"
            y = self.linear(f"{weights}.{role}", x, name)
            if c.qk_norm == "projection":
                y = self.norm(f"{weights}.{norm}", y, f"{stem}_{norm}")
            y = mb.reshape(x=y, shape=[count, c.head_dim, 1, self.ids], name=f"{name}_heads")
            if by_head and not c.qk_norm_after_rope:
                y = self.norm(f"{weights}.{norm}", y, f"{stem}_{norm}")
            if kind.rope is not None:
                y = self.rotate(y, f"{name}_turned", kind.rope)
            if by_head and c.qk_norm_after_rope:
                y = self.norm(f"{weights}.{norm}", y, f"{stem}_{norm}")
            turned.append(y)
        width = shared * c.head_dim
        keys = mb.reshape(x=turned[1], shape=[1, width, 1, self.ids], name=f"{stem}_keys_wide")
        keys = mb.transpose(x=keys, perm=[0, 3, 2, 1], name=f"{stem}_new_keys")
        values = self.linear(f"{weights}.v_proj", x, f"{stem}_v_proj")
        self.new[0].append(keys)
        self.new[1].append(values)
        pairs = (
            (self.split(keys, shared, 3), self.split(values, shared, 1)),
            (self.split(self.layer("key_cache", block), shared, 3),
             self.split(self.layer("value_cache", block), shared, 1)),
        )  # fmt: skip
        factor, query = c.head_dim**-0.5 / (c.score_cap or 1.0), turned[0]
        exact = float(np.float16(factor)) == factor  # of heads of 64, for one
        for place, part in enumerate([np.float16(factor)] if exact else factors(factor)):
            query = mb.mul(x=query, y=part, name=f"{stem}_query_scaled_{place}")
        mask, mixed = self.inputs[mask_name(kind.window)], []
        for head, one in enumerate(self.split(query, heads, 0)):
            place = head * shared // heads
            new, old = ((k[place], v[place]) for k, v in pairs)
            mixed.append(self.one_head(one, old, new, mask, f"{stem}_head_{head}"))
        y = mb.concat(values=mixed, axis=1, name=f"{stem}_attention") if heads > 1 else mixed[0]
        return self.linear(f"{weights}.o_proj", y, f"{stem}_o_proj")

    def one_head(
        self, query: Var, old: tuple[Var, Var], new: tuple[Var, Var], mask: Var, name: str
    ) -> Var:
        """``[1, head_dim, 1, ids]`` of a query, over the cache's keys and values and new ones."""
        mb, cap = self.mb, self.config.score_cap
        scores = [
            mb.einsum(values=(keys, query), equation=PRODUCT, name=f"{name}_{which}_scores")
            for which, (keys, _) in (("old", old), ("new", new))
        ]
        x = mb.concat(values=scores, axis=1, name=f"{name}_scores")
        if cap:
            x = mb.tanh(x=x, name=f"{name}_tanh")
            x = mb.mul(x=x, y=np.float16(cap), name=f"{name}_capped")
        x = mb.add(x=x, y=mask, name=f"{name}_masked")
        x = mb.softmax(x=x, axis=1, name=f"{name}_shares")
        sizes = [self.context, self.ids]
        parts = mb.split(x=x, split_sizes=sizes, axis=1, name=f"{name}_shares_apart")
        mixed = [
            mb.einsum(values=(values, part), equation=PRODUCT, name=f"{name}_{which}")
            for which, (_, values), part in zip(("old", "new"), (old, new), parts, strict=True)
        ]
        return mb.add(x=mixed[0], y=mixed[1], name=name)

    def rotate(self, x: Var, name: str, rope: int) -> Var:
        """Rotary embedding of the leading ``rotary_dim`` channels, in halves (NEOX layout)."""
        mb, half = self.mb, self.config.ropes[0].rotary_dim // 2
        cosines, sines = (self.inputs[table] for table in table_names(rope))
        rest = self.config.head_dim - 2 * half
        sizes = [half, half, rest] if rest else [half, half]
        first, second, *tail = mb.split(x=x, split_sizes=sizes, axis=1, name=f"{name}_split")
        first_cos = mb.mul(x=first, y=cosines, name=f"{name}_first_cos")
        second_sin = mb.mul(x=second, y=sines, name=f"{name}_second_sin")
        second_cos = mb.mul(x=second, y=cosines, name=f"{name}_second_cos")
        first_sin = mb.mul(x=first, y=sines, name=f"{name}_first_sin")
        halves = [
            mb.sub(x=first_cos, y=second_sin, name=f"{name}_first"),
            mb.add(x=second_cos, y=first_sin, name=f"{name}_second"),
        ]
        return mb.concat(values=[*halves, *tail], axis=1, name=name)

    def layer(self, cache: str, block: int) -> Var:
        """A block's keys or values of a cache."""
        held = self.inputs[cache]
        begin, size = [block - self.first, 0, 0, 0], [1, *held.shape[1:]]
        name = f"block_{block}_{cache}"
        return self.mb.slice_by_size(x=held, begin=begin, size=size, name=name)

    def split(self, x: Var, count: int, axis: int) -> Sequence[Var]:
        """Equal parts of an axis."""
        if count == 1:
            return [x]
        found: Sequence[Var] = self.mb.split(
            x=x, num_splits=count, axis=axis, name=f"{x.name}_by_head"
        )
        return found
