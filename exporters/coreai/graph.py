"""Builds the decoder as a Core AI graph, operation by operation, from a ``DecoderConfig``.

Inputs, states and output have the names and order that Apple's runner expects
(``CoreAILanguageModel`` of github.com/apple/coreai-models)::

    input_ids     int32 [1, q]                                position_ids  int32 [1, n]
    keyCache      float16 [layers, 1, kv_heads, slots, head_dim]            valueCache  the same
    logits        float16 [1, q, vocab]

``n`` counts the positions after the call, so the ``q`` tokens go to slots ``n - q … n - 1``; only
the length of ``position_ids`` is used. The number of slots is the caller's: Apple's runner begins
with 256 and doubles it. Where slices begin is computed from shapes alone: Apple's GPU and Neural
Engine compilers crash on a begin that depends on values (apple/coreai-models, issue 5).

Everything is float16 except the norms, which are computed in float32 between two casts: squares of
the residual stream exceed float16. The query heads of a key-value head are the rows of one product
with its keys, so that keys and values are not repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from compress.decoder.config import DecoderConfig
from exporters.coreai.library import CoreAI, Dim, Value

__all__ = ["INPUTS", "STATES", "Decoder", "build"]

INPUTS = ("input_ids", "position_ids")
STATES = {"keyCache": "new_keys", "valueCache": "new_values"}  # → the result that updates it
# Added to the score of a hidden position; finite, because -inf - (-inf) is not a number.
HIDDEN = np.float16(-30000.0)
LAST = np.array(-1, np.int32)
ZERO, ONE = np.array(0, np.int32), np.array(1, np.int32)

Constant = Callable[[str], Value]
"""``constant(name)``: a decoded weight, bias or rotary table by packlight's name."""


def signed(*values: int) -> Any:
    """Axes and bounds of slices are int32."""
    return np.array(values, np.int32)


def unsigned(*values: int) -> Any:
    """Permutations, sizes and repetitions are uint32."""
    return np.array(values, np.uint32)


def build(
    library: CoreAI, config: DecoderConfig, context: int, constant: Callable[[], Constant]
) -> Any:
    """The program: one function, ``main``.

    Args:
        context: most positions.
        constant: makes the source of the weights, inside the program.

    Returns:
        The MLIR module.
    """
    ir = library.ir
    cache = (config.num_hidden_layers, 1, config.num_key_value_heads, None, config.head_dim)
    with library.program() as module:
        ids, states = library.tensor("int32", (1, None)), library.tensor("fp16", cache)
        names = [*INPUTS, *STATES]
        graph = library.graph_type("main", [ids, ids, states, states], [], input_names=names)
        with graph.block:
            decoder = Decoder(library, config, context, constant())
            graph.outputs_spec = list(
                zip(("logits", *STATES.values()), decoder.build(*graph.arguments), strict=True)
            )
        # Apple's rewrite makes states of the arguments that have this attribute.
        graph.arg_attrs = [
            ir.DictAttr.get(
                {item.name: item.attr for item in given}
                | (
                    {"MutableBuffers.buffer_mutation": ir.StringAttr.get(STATES[name])}
                    if name in STATES
                    else {}
                )
            )
            for name, given in zip(names, graph.arg_attrs, strict=True)
        ]
    return module


class Decoder:
    """Emits the operations of one function.

    Args:
        library: coreai-core, with a program under construction.
        config: the model.
        context: most positions.
        constant: source of the weights.
    """

    def __init__(
        self, library: CoreAI, config: DecoderConfig, context: int, constant: Constant
    ) -> None:
        self.library, self.ops = library, library.ops
        self.config, self.context, self.constant = config, context, constant
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.masks: dict[int | None, Value] = {}
        self.tables: dict[int, tuple[Value, Value]] = {}

    def build(
        self, ids: Value, positions: Value, keys: Value, values: Value
    ) -> tuple[Value, Value, Value]:
        """Emit the program; returns logits and both updated caches."""
        ops, c = self.ops, self.config
        self.caches = [keys, values]
        self.place(ids, positions)
        x = ops.gather_nd(self.constant("embed_tokens.weight"), ops.expand_dims(ids, signed(2)))
        if c.learned_positions:
            table = self.constant("embed_positions.weight")
            x = ops.add(x, ops.expand_dims(self.rows(table, c.hidden_size), signed(0)))
        for block in range(c.num_hidden_layers):
            x = self.block(block, x)
        x = self.linear("lm_head", self.norm("norm", x))
        if c.logit_cap:
            x = ops.tanh(self.times(x, 1 / c.logit_cap))
            x = self.times(x, c.logit_cap)
        return x, self.caches[0], self.caches[1]

    # --- small pieces ----------------------------------------------------------------------------

    def times(self, x: Value, factor: float, dtype: Any = np.float16) -> Value:
        return self.ops.broadcasting_mul(x, np.array(factor, dtype))

    def size(self, x: Value, axis: int) -> Value:
        """A size of a tensor, int32 ``[1]``."""
        ops = self.ops
        part = ops.slice_(ops.get_shape(x), signed(axis), signed(axis + 1), signed(1))
        return ops.cast(part, np.int32)

    def joined(self, *parts: Any) -> Value:
        """Sizes and constants as one vector."""
        return self.ops.concat(ZERO, list(parts))

    def shaped(self, x: Value, sizes: Sequence[Any], shape: Sequence[Dim], dtype: str) -> Value:
        """``x`` reshaped to ``sizes`` (uint32 vectors), which are ``shape`` as far as known."""
        target = self.library.tensor(dtype, shape)
        return self.ops.ReshapeOp(x, self.joined(*sizes), results=[target]).result

    def sliced(
        self, x: Value, begin: Value, end: Value, shape: Sequence[Dim], dtype: str = "fp16"
    ) -> Value:
        """``x[begin:end]`` along every axis, of ``shape`` as far as known."""
        ops, strides = self.ops, signed(*(1 for _ in shape))
        target = self.library.tensor(dtype, shape)
        return ops.SliceOp(x, begin, end, ops.constant(strides), results=[target]).result

    def rows(self, table: Value, width: int) -> Value:
        """A table's rows of this call's positions, ``[q, width]``."""
        begin, end = self.joined(self.begin, signed(0)), self.joined(self.end, signed(width))
        return self.sliced(table, begin, end, (None, width))

    def counted(self, end: Value) -> Value:
        """``0 … end - 1``, int32 ``[end]``."""
        ops, target = self.ops, self.library.tensor("int32", (None,))
        last = ops.shrink_dims(end, signed(0))
        begin, step = ops.constant(ZERO), ops.constant(ONE)
        return ops.RangeOp(begin, last, step, results=[target]).result

    # --- positions and the mask -------------------------------------------------------------------

    def place(self, ids: Value, positions: Value) -> None:
        """Emit the tokens' cache slots, their rotary tables and the attention masks."""
        ops, c = self.ops, self.config
        count = self.size(ids, 1)
        self.end = self.size(positions, 1)
        self.begin = ops.sub(self.end, count)
        self.count, self.rows_count = (
            ops.cast(count, np.uint32),
            ops.cast(self.times(count, self.group, np.int32), np.uint32),
        )
        half = c.ropes[0].rotary_dim // 2
        for rope in sorted({kind.rope for kind in c.kinds if kind.rope is not None}):
            end = f"_{rope}" if rope else ""
            cosines, sines = (
                self.rows(self.constant(f"rope.{name}{end}"), half) for name in ("cos", "sin")
            )
            self.tables[rope] = (cosines, sines)
        row = ops.expand_dims(ops.broadcasting_add(self.counted(count), self.begin), signed(1))
        column = ops.expand_dims(self.counted(self.end), signed(0))
        for window in sorted({kind.window for kind in c.kinds}, key=lambda window: window or 0):
            self.masks[window] = self._mask(row, column, window)

    def _mask(self, row: Value, column: Value, window: int | None) -> Value:
        """float16 ``[1, 1, group * q, n]``: 0 where visible, else very low."""
        ops = self.ops
        hidden = ops.cast(ops.broadcasting_greater(column, row), np.float16)  # later
        if window is not None and window < self.context:
            first = ops.broadcasting_sub(row, np.array(window - 1, np.int32))
            hidden = ops.add(hidden, ops.cast(ops.broadcasting_greater(first, column), np.float16))
        mask = ops.expand_dims(ops.broadcasting_mul(hidden, np.array(HIDDEN)), signed(0, 1))
        return mask if self.group == 1 else ops.tile(mask, unsigned(1, 1, self.group, 1))

    # --- a block ----------------------------------------------------------------------------------

    def block(self, block: int, x: Value) -> Value:
        """One decoder block; the residual stream in and out, float16 ``[1, q, hidden]``."""
        ops, c, weights = self.ops, self.config, f"blocks.{block}"
        normed = x
        if "input_layernorm" in c.norms:
            normed = self.norm(f"{weights}.input_layernorm", x)
        branch = self.attention(block, normed)
        if "attention_post_norm" in c.norms:
            branch = self.norm(f"{weights}.attention_post_norm", branch)
        before, x = x, ops.add(x, branch)
        if not c.parallel_residual:
            normed = before = x
        if "post_attention_layernorm" in c.norms:
            normed = self.norm(f"{weights}.post_attention_layernorm", before)
        branch = self.mlp(weights, normed)
        if "mlp_post_norm" in c.norms:
            branch = self.norm(f"{weights}.mlp_post_norm", branch)
        return ops.add(x, branch)

    def norm(self, weight: str, x: Value) -> Value:
        """RMSNorm or LayerNorm over the last axis, in float32 inside, float16 outside."""
        ops, c = self.ops, self.config
        x = ops.cast(x, np.float32)
        layer_norm = c.norm == "layernorm" and not weight.endswith(("q_norm", "k_norm"))
        if layer_norm:
            x = ops.broadcasting_sub(x, ops.reduce_mean(x, signed(-1)))
        of_branch = weight.endswith(("q_norm", "k_norm", "post_norm"))
        epsilon = np.array(c.branch_eps if of_branch else c.norm_eps, np.float32)
        mean = ops.reduce_mean(ops.mul(x, x), signed(-1))  # keeps the axis
        x = ops.broadcasting_mul(x, ops.rsqrt(ops.broadcasting_add(mean, epsilon)))
        x = ops.broadcasting_mul(x, self.constant(f"{weight}.weight"))
        if layer_norm and c.norm_bias:
            x = ops.broadcasting_add(x, self.constant(f"{weight}.bias"))
        return ops.cast(x, np.float16)

    def linear(self, weight: str, x: Value) -> Value:
        """``x @ weight.T + bias``."""
        ops, c = self.ops, self.config
        tied = weight == "lm_head" and c.tie_word_embeddings
        matrix = self.constant("embed_tokens.weight" if tied else f"{weight}.weight")
        x = ops.broadcasting_batch_matmul(x, ops.transpose(matrix, unsigned(1, 0)))
        if c.has_bias(weight.rpartition(".")[2]):
            x = ops.broadcasting_add(x, self.constant(f"{weight}.bias"))
        return x

    def mlp(self, weights: str, x: Value) -> Value:
        ops, c = self.ops, self.config
        up = inner = self.linear(f"{weights}.up_proj", x)
        if c.gated_mlp:
            inner = self.linear(f"{weights}.gate_proj", x)
        match c.activation:
            case "silu":
                inner = ops.silu(inner)
            case "relu2":
                inner = ops.relu(inner)
                inner = ops.mul(inner, inner)
            case activation:
                inner = ops.gelu(inner, approximate="tanh" if activation == "gelu_new" else "none")
        return self.linear(f"{weights}.down_proj", ops.mul(inner, up) if c.gated_mlp else inner)

    # --- attention --------------------------------------------------------------------------------

    def attention(self, block: int, x: Value) -> Value:
        ops, c, weights = self.ops, self.config, f"blocks.{block}"
        kind = c.kinds[c.layers[block]]
        by_heads = []  # [1, heads, q, head_dim] each
        for role in ("q_proj", "k_proj", "v_proj"):
            heads = c.num_attention_heads if role == "q_proj" else c.num_key_value_heads
            flat = self.linear(f"{weights}.{role}", x)
            if c.qk_norm == "projection" and role != "v_proj":
                flat = self.norm(f"{weights}.{role[0]}_norm", flat)
            sizes = (unsigned(1), self.count, unsigned(heads, c.head_dim))
            split = self.shaped(flat, sizes, (1, None, heads, c.head_dim), "fp16")
            by_heads.append(ops.transpose(split, unsigned(0, 2, 1, 3)))
        query, key, value = by_heads
        by_head = c.qk_norm == "head" and kind.normed
        for after_rope in (False, True):
            if by_head and c.qk_norm_after_rope == after_rope:
                query = self.norm(f"{weights}.q_norm", query)
                key = self.norm(f"{weights}.k_norm", key)
            if kind.rope is not None and not after_rope:
                query, key = self.rotated(query, kind.rope), self.rotated(key, kind.rope)
        keys, values = self.cached(0, block, key), self.cached(1, block, value)
        kv, group, size = c.num_key_value_heads, self.group, c.head_dim
        if group > 1:  # the query heads of a key-value head one below the other
            sizes = (unsigned(1, kv), self.rows_count, unsigned(size))
            query = self.shaped(query, sizes, (1, kv, None, size), "fp16")
        query = self.times(query, size**-0.5 / (c.score_cap or 1))
        transposed = ops.transpose(keys, unsigned(0, 1, 3, 2))
        scores = ops.broadcasting_batch_matmul(query, transposed)
        if c.score_cap:
            scores = self.times(ops.tanh(scores), c.score_cap)
        shares = ops.softmax(ops.broadcasting_add(scores, self.masks[kind.window]), LAST)
        mixed = ops.broadcasting_batch_matmul(shares, values)
        heads = c.num_attention_heads
        if group > 1:
            sizes = (unsigned(1, heads), self.count, unsigned(size))
            mixed = self.shaped(mixed, sizes, (1, heads, None, size), "fp16")
        mixed = ops.transpose(mixed, unsigned(0, 2, 1, 3))
        sizes = (unsigned(1), self.count, unsigned(heads * size))
        return self.linear(
            f"{weights}.o_proj", self.shaped(mixed, sizes, (1, None, heads * size), "fp16")
        )

    def rotated(self, x: Value, rope: int) -> Value:
        """Rotary embedding of the leading ``rotary_dim`` dimensions, in halves (NEOX layout)."""
        ops, half = self.ops, self.config.ropes[0].rotary_dim // 2
        cosines, sines = self.tables[rope]
        rest = self.config.head_dim - 2 * half
        sizes = (half, half, rest) if rest else (half, half)
        first, second, *tail = ops.split(x, unsigned(*sizes), LAST)
        mul = ops.broadcasting_mul
        turned = [
            ops.sub(mul(first, cosines), mul(second, sines)),
            ops.add(mul(second, cosines), mul(first, sines)),
        ]
        return ops.concat(LAST, [*turned, *tail])

    def cached(self, which: int, block: int, new: Value) -> Value:
        """Write ``new`` into a cache; returns the block's layer of it up to ``end``,
        ``[1, kv_heads, n, head_dim]``."""
        ops, kv, size = self.ops, self.config.num_key_value_heads, self.config.head_dim
        begin = self.joined(signed(block, 0, 0), self.begin, signed(0))
        end = self.joined(signed(block + 1, 1, kv), self.end, signed(size))
        self.caches[which] = ops.slice_update(
            self.caches[which], begin, end, signed(1, 1, 1, 1, 1), ops.expand_dims(new, signed(0))
        )
        first = ops.constant(signed(block, 0, 0, 0, 0))
        layer = self.sliced(self.caches[which], first, end, (1, 1, kv, None, size))
        return ops.shrink_dims(layer, signed(0))
