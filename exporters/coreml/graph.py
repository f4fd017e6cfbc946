"""Builds the decoder as a MIL program, operation by operation, from a ``DecoderConfig``.

Inputs, states and outputs have the names that swift-transformers expects::

    inputIds    int32 [1, q]            causalMask  float16 [1, 1, q or 1, n]
    keyCache    float16 [layers, 1, kv_heads, context, head_dim]    valueCache  the same
    logits      float16 [1, q, vocab]

``n`` counts the positions in the cache after the call, so the ``q`` tokens go to slots
``n - q … n - 1``. There are two kinds of callers. Apple's article passes a mask ``[1, 1, q, n]``
with its own triangle of ``-inf``. swift-transformers passes zeros ``[1, 1, 1, tokens + 1]``: no
triangle, and every token one slot further, so that slot 0 is never written. The program is correct
for both: it builds the causal triangle (and the sliding window) itself, masks slot 0 unless it was
written, and adds the caller's mask.

Everything is float16, as Core ML runs it, except the norms: a residual beyond 255 has a square
beyond float16, and massive activations of several hundred are common, so ``x * rsqrt(mean(x²))``
is computed in float32 between two casts, as transformers does.

Each cache is read once, and then follows the chain of ``coreml_update_state``: coremltools' pass
``remove_redundant_ops``, if it is ever run, silently breaks a second read of a state after a write.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from compress.decoder.config import DecoderConfig

__all__ = ["Constants", "Decoder"]

# Added to the score of a hidden position; finite, because -inf - (-inf) is not a number.
HIDDEN = np.float16(-30000.0)

Var = Any  # coremltools has no types


class Constants(Protocol):
    """The source of the graph's constants; calls with the same name return the same one."""

    def weight(self, name: str) -> Var:
        """A weight of the checkpoint: a matrix, compressed or float16, ``[rows, columns]``; a
        norm's weight or a bias, in the plan's float type."""
        ...

    def array(self, name: str, shape: tuple[int, ...]) -> Var:
        """A float16 constant that is not in the checkpoint: a rotary table or zeros."""
        ...


class Decoder:
    """Emits the operations of one function with coremltools' builder ``mb``.

    Args:
        config: the model.
        context: slots of the caches.
        constants: source of the weights.
    """

    def __init__(self, mb: Any, config: DecoderConfig, context: int, constants: Constants) -> None:
        self.mb = mb
        self.config = config
        self.masks: dict[int | None, Var] = {}
        self.tables: dict[int, tuple[Var, Var]] = {}
        self.context = context
        self.constants = constants

    def build(self, ids: Var, mask: Var, key_cache: Var, value_cache: Var) -> Var:
        """Emit the program for these inputs and states; returns ``logits``."""
        mb, c = self.mb, self.config
        self.states = (key_cache, value_cache)
        self.caches = [
            mb.read_state(input=key_cache, name="keys_before"),
            mb.read_state(input=value_cache, name="values_before"),
        ]
        self.place(ids, mask)
        x = mb.gather(
            x=self.constants.weight("embed_tokens.weight"),
            indices=ids,
            axis=0,
            validate_indices=False,
            name="embed_tokens",
        )
        if c.learned_positions:
            x = mb.add(x=x, y=self.learned, name="embed_placed")
        for block in range(c.num_hidden_layers):
            x = self.block(block, x)
        x = self.norm("norm", x, "norm")
        if not c.logit_cap:
            return self.linear("lm_head", x, "logits")
        x = self.linear("lm_head", x, "logits_uncapped")
        x = mb.mul(x=x, y=np.float16(1 / c.logit_cap), name="logits_divided")
        x = mb.tanh(x=x, name="logits_tanh")
        return mb.mul(x=x, y=np.float16(c.logit_cap), name="logits")

    # --- positions and the mask ---------------------------------------------------------------

    def place(self, ids: Var, mask: Var) -> None:
        """Emit the tokens' cache slots, their rotary tables and the attention mask."""
        mb = self.mb
        shape = mb.shape(x=ids, name="query_count_shape")
        queries = mb.slice_by_size(x=shape, begin=[1], size=[1], name="query_count")  # int32 [1]
        shape = mb.shape(x=mask, name="position_end_shape")
        self.end = mb.slice_by_size(x=shape, begin=[3], size=[1], name="position_end")
        self.begin = mb.sub(x=self.end, y=queries, name="position_begin")
        begin = mb.squeeze(x=self.begin, name="position_begin_scalar")
        end = mb.squeeze(x=self.end, name="position_end_scalar")
        positions = mb.range_1d(start=begin, end=end, step=1, name="positions")
        slots = mb.range_1d(start=0, end=end, step=1, name="slots")
        c = self.config
        table = (self.context, c.ropes[0].rotary_dim // 2)
        for rope in sorted({kind.rope for kind in c.kinds if kind.rope is not None}):
            end = f"_{rope}" if rope else ""
            cosines, sines = (
                mb.gather(
                    x=self.constants.array(name, table),
                    indices=positions,
                    axis=0,
                    validate_indices=False,
                    name=f"{name}_rows",
                )
                for name in (f"rope_cos{end}", f"rope_sin{end}")
            )
            self.tables[rope] = (cosines, sines)
        if c.learned_positions:
            self.learned = mb.gather(
                x=self.constants.weight("embed_positions.weight"),
                indices=positions,
                axis=0,
                validate_indices=False,
                name="embed_positions",
            )
        windows = {kind.window for kind in c.kinds}
        for window in sorted(windows, key=lambda window: window or 0):
            end = f"_{window}" if len(windows) > 1 else ""
            self.masks[window] = self._mask(positions, slots, mask, window, end)

    def _mask(self, positions: Var, slots: Var, given: Var, window: int | None, end: str) -> Var:
        """float16 mask ``[1, 1, group * q, n]``: 0 if visible, else very low; repeated for the
        query heads that share a key-value head.

        Args:
            end: of the operations' names, where there are several masks.
        """
        mb = self.mb
        row = mb.expand_dims(x=positions, axes=[1], name=f"positions_column{end}")  # [q, 1]
        column = mb.expand_dims(x=slots, axes=[0], name=f"slots_row{end}")  # [1, n]
        visible = mb.less_equal(x=column, y=row, name=f"is_past{end}")
        if window is not None and window < self.context:
            distance = mb.sub(x=row, y=column, name=f"distance{end}")
            near = mb.less(x=distance, y=np.int32(window), name=f"is_in_window{end}")
            visible = mb.logical_and(x=visible, y=near, name=f"is_past_in_window{end}")
        written = mb.logical_or(
            x=mb.greater(x=column, y=np.int32(0), name=f"is_not_slot_0{end}"),
            y=self._slot_0_is_written(end),
            name=f"is_written{end}",
        )
        visible = mb.logical_and(x=visible, y=written, name=f"is_visible{end}")
        hidden = mb.cast(
            x=mb.logical_not(x=visible, name=f"is_hidden{end}"), dtype="fp16", name=f"hidden{end}"
        )
        scores = mb.mul(x=hidden, y=HIDDEN, name=f"hidden_scores{end}")
        scores = mb.expand_dims(x=scores, axes=[0, 1], name=f"hidden_scores_4d{end}")
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        if group == 1:
            return mb.add(x=scores, y=given, name=f"mask{end}")
        once = mb.add(x=scores, y=given, name=f"mask_once{end}")
        return mb.tile(x=once, reps=[1, 1, group, 1], name=f"mask{end}")

    def _slot_0_is_written(self, end: str) -> Var:
        """Whether slot 0 holds a token, bool ``[1, 1]``: this call starts there, or its key is not
        zero (no written key is all zeros)."""
        mb, c = self.mb, self.config
        key = mb.slice_by_size(
            x=self.caches[0],
            begin=[0, 0, 0, 0, 0],
            size=[1, 1, c.num_key_value_heads, 1, c.head_dim],
            name=f"slot_0_key{end}",
        )
        largest = mb.reduce_max(
            x=mb.abs(x=key, name=f"slot_0_abs{end}"),
            axes=[2, 3, 4],
            keep_dims=True,
            name=f"slot_0_max{end}",
        )
        largest = mb.squeeze(x=largest, axes=[0, 1, 2], name=f"slot_0_largest{end}")  # [1, 1]
        return mb.logical_or(
            x=mb.equal(x=self.begin, y=np.int32(0), name=f"writes_slot_0{end}"),
            y=mb.greater(x=largest, y=np.float16(0), name=f"has_slot_0{end}"),
            name=f"slot_0_is_written{end}",
        )

    # --- a block ------------------------------------------------------------------------------

    def block(self, block: int, x: Var) -> Var:
        """One decoder block; the residual stream in and out, float16 ``[1, q, hidden]``."""
        mb, stem = self.mb, f"block_{block}"
        c, weights = self.config, f"blocks.{block}"
        normed = x
        if "input_layernorm" in c.norms:
            normed = self.norm(f"{weights}.input_layernorm", x, f"{stem}_input_layernorm")
        branch = self.attention(block, normed)
        if "attention_post_norm" in c.norms:
            name = "attention_post_norm"
            branch = self.norm(f"{weights}.{name}", branch, f"{stem}_{name}")
        before, x = x, mb.add(x=x, y=branch, name=f"{stem}_attention_residual")
        if not c.parallel_residual:
            normed = before = x
        if "post_attention_layernorm" in c.norms:
            name = "post_attention_layernorm"
            normed = self.norm(f"{weights}.{name}", before, f"{stem}_{name}")
        branch = self.mlp(block, normed)
        if "mlp_post_norm" in c.norms:
            branch = self.norm(f"{weights}.mlp_post_norm", branch, f"{stem}_mlp_post_norm")
        return mb.add(x=x, y=branch, name=f"{stem}_residual")

    def norm(self, weight: str, x: Var, name: str) -> Var:
        """RMSNorm or LayerNorm over the last axis, in float32 inside, float16 outside."""
        mb, c = self.mb, self.config
        wide = mb.cast(x=x, dtype="fp32", name=f"{name}_fp32")
        scale = self.constants.weight(f"{weight}.weight")
        of_branch = weight.endswith(("q_norm", "k_norm", "post_norm"))
        epsilon = np.float32(c.branch_eps if of_branch else c.norm_eps)
        if c.norm == "layernorm" and not weight.endswith(("q_norm", "k_norm")):
            beta = {"beta": self.constants.weight(f"{weight}.bias")} if c.norm_bias else {}
            normed = mb.layer_norm(
                x=wide, axes=[-1], gamma=scale, **beta, epsilon=epsilon, name=f"{name}_normed"
            )
        else:
            square = mb.mul(x=wide, y=wide, name=f"{name}_square")
            mean = mb.reduce_mean(x=square, axes=[-1], keep_dims=True, name=f"{name}_mean")
            inverse = mb.rsqrt(x=mean, epsilon=epsilon, name=f"{name}_rsqrt")
            normed = mb.mul(x=wide, y=inverse, name=f"{name}_normed")
            normed = mb.mul(x=normed, y=scale, name=f"{name}_scaled")
        return mb.cast(x=normed, dtype="fp16", name=name)

    def linear(self, weight: str, x: Var, name: str) -> Var:
        """``x @ weight.T + bias``; without a bias, one shared vector of zeros (required by MIL)."""
        tied = weight == "lm_head" and self.config.tie_word_embeddings
        matrix = self.constants.weight("embed_tokens.weight" if tied else f"{weight}.weight")
        rows = int(matrix.shape[0])
        if self.config.has_bias(weight.rpartition(".")[2]):
            vector = self.constants.weight(f"{weight}.bias")
        else:
            vector = self.constants.array(f"zeros_{rows}", (rows,))
        return self.mb.linear(x=x, weight=matrix, bias=vector, name=name)

    def mlp(self, block: int, x: Var) -> Var:
        mb, stem, weights = self.mb, f"block_{block}", f"blocks.{block}"
        up = self.linear(f"{weights}.up_proj", x, f"{stem}_up_proj")
        inner, name = up, f"{stem}_gelu"
        if self.config.gated_mlp:
            inner = self.linear(f"{weights}.gate_proj", x, f"{stem}_gate_proj")
            name = f"{stem}_gate"
        match self.config.activation:
            case "silu":
                inner = mb.silu(x=inner, name=name)
            case "relu2":
                inner = mb.square(x=mb.relu(x=inner, name=f"{name}_relu"), name=name)
            case activation:
                mode = "TANH_APPROXIMATION" if activation == "gelu_new" else "EXACT"
                inner = mb.gelu(x=inner, mode=mode, name=name)
        if self.config.gated_mlp:
            inner = mb.mul(x=inner, y=up, name=f"{stem}_gated")
        return self.linear(f"{weights}.down_proj", inner, f"{stem}_down_proj")

    # --- attention ----------------------------------------------------------------------------

    def attention(self, block: int, x: Var) -> Var:
        mb, c, stem, weights = self.mb, self.config, f"block_{block}", f"blocks.{block}"
        kind = c.kinds[c.layers[block]]
        by_heads = []  # [1, heads, q, head_dim] each
        for role in ("q_proj", "k_proj", "v_proj"):
            heads = c.num_attention_heads if role == "q_proj" else c.num_key_value_heads
            flat, name = self.linear(f"{weights}.{role}", x, f"{stem}_{role}"), f"{stem}_{role}"
            if c.qk_norm == "projection" and role != "v_proj":
                norm = f"{role[0]}_norm"
                flat = self.norm(f"{weights}.{norm}", flat, f"{stem}_{norm}")
            split = mb.reshape(x=flat, shape=[1, -1, heads, c.head_dim], name=f"{name}_heads_last")
            by_heads.append(mb.transpose(x=split, perm=[0, 2, 1, 3], name=f"{name}_heads"))
        query, key, value = by_heads
        by_head = c.qk_norm == "head" and kind.normed
        if by_head and not c.qk_norm_after_rope:
            query = self.norm(f"{weights}.q_norm", query, f"{stem}_q_norm")
            key = self.norm(f"{weights}.k_norm", key, f"{stem}_k_norm")
        if kind.rope is not None:
            query = self.rotate(query, f"{stem}_query", kind.rope)
            key = self.rotate(key, f"{stem}_key", kind.rope)
        if by_head and c.qk_norm_after_rope:
            query = self.norm(f"{weights}.q_norm", query, f"{stem}_q_norm")
            key = self.norm(f"{weights}.k_norm", key, f"{stem}_k_norm")
        # Begin and end, int32 [5], of the new positions in the block's layer of a cache.
        first = np.array([block, 0, 0], np.int32)
        last = np.array([block + 1, 1, c.num_key_value_heads], np.int32)
        zero, whole = np.array([0], np.int32), np.array([c.head_dim], np.int32)
        span = (
            mb.concat(values=[first, self.begin, zero], axis=0, name=f"{stem}_begin"),
            mb.concat(values=[last, self.end, whole], axis=0, name=f"{stem}_end"),
        )
        keys = self.cached(0, block, key, span)
        values = self.cached(1, block, value, span)
        mask = self.masks[kind.window]
        if c.num_key_value_heads < c.num_attention_heads:
            # The query heads of a key-value head become rows of one: [1, kv_heads, group * q, d].
            folded = [1, c.num_key_value_heads, -1, c.head_dim]
            query = mb.reshape(x=query, shape=folded, name=f"{stem}_query_grouped")
        # The one operation that Core ML runs fused on the GPU, scaling and softmax included.
        if c.score_cap:
            mixed = self.capped_attention(query, keys, values, mask, f"{stem}_attention")
        else:
            mixed = mb.scaled_dot_product_attention(
                query=query, key=keys, value=values, attn_mask=mask, name=f"{stem}_attention"
            )
        if c.num_key_value_heads < c.num_attention_heads:
            apart = [1, c.num_attention_heads, -1, c.head_dim]
            mixed = mb.reshape(x=mixed, shape=apart, name=f"{stem}_attention_heads")
        mixed = mb.transpose(x=mixed, perm=[0, 2, 1, 3], name=f"{stem}_attention_heads_last")
        width = c.num_attention_heads * c.head_dim
        mixed = mb.reshape(x=mixed, shape=[1, -1, width], name=f"{stem}_attention_flat")
        return self.linear(f"{weights}.o_proj", mixed, f"{stem}_o_proj")

    def capped_attention(self, query: Var, keys: Var, values: Var, mask: Var, name: str) -> Var:
        """Attention whose scores pass ``cap * tanh(score / cap)`` before the mask (gemma2)."""
        mb, cap = self.mb, self.config.score_cap
        factor = np.float16(self.config.head_dim**-0.5 / cap)
        scaled = mb.mul(x=query, y=factor, name=f"{name}_query")
        scores = mb.matmul(x=scaled, y=keys, transpose_y=True, name=f"{name}_scores")
        scores = mb.tanh(x=scores, name=f"{name}_tanh")
        scores = mb.mul(x=scores, y=np.float16(cap), name=f"{name}_capped")
        scores = mb.add(x=scores, y=mask, name=f"{name}_masked")
        shares = mb.softmax(x=scores, axis=-1, name=f"{name}_shares")
        return mb.matmul(x=shares, y=values, name=name)

    def rotate(self, x: Var, name: str, rope: int) -> Var:
        """Rotary embedding of the leading ``rotary_dim`` dimensions, in halves (NEOX layout)."""
        mb, half = self.mb, self.config.ropes[0].rotary_dim // 2
        cosines, sines = self.tables[rope]
        rest = self.config.head_dim - 2 * half
        sizes = [half, half, rest] if rest else [half, half]
        first, second, *tail = mb.split(x=x, split_sizes=sizes, axis=-1, name=f"{name}_split")
        turned = [
            mb.sub(
                x=mb.mul(x=first, y=cosines, name=f"{name}_first_cos"),
                y=mb.mul(x=second, y=sines, name=f"{name}_second_sin"),
                name=f"{name}_first",
            ),
            mb.add(
                x=mb.mul(x=second, y=cosines, name=f"{name}_second_cos"),
                y=mb.mul(x=first, y=sines, name=f"{name}_first_sin"),
                name=f"{name}_second",
            ),
        ]
        return mb.concat(values=[*turned, *tail], axis=-1, name=f"{name}_rotated")

    def cached(self, which: int, block: int, new: Var, span: tuple[Var, Var]) -> Var:
        """Write ``new`` into a cache; returns the block's layer of it up to ``end``:
        ``[1, kv_heads, n, head_dim]``.

        ``coreml_update_state`` writes the state and reads it back, which lets Core ML update it in
        place; ``self.caches`` is the chain.
        """
        mb, name = self.mb, f"block_{block}_{('keys', 'values')[which]}"
        begin, end = span
        updated = mb.slice_update(
            x=self.caches[which],
            update=mb.expand_dims(x=new, axes=[0], name=f"{name}_new"),
            begin=begin,
            end=end,
            name=f"{name}_updated",
        )
        self.caches[which] = mb.coreml_update_state(
            state=self.states[which], value=updated, name=f"{name}_cache"
        )
        return mb.slice_by_index(
            x=self.caches[which],
            begin=[block, 0, 0, 0, 0],
            end=end,
            begin_mask=[False, True, True, True, True],
            end_mask=[False, True, True, False, True],
            squeeze_mask=[True, False, False, False, False],
            name=name,
        )
