"""Builds the decoder as an ONNX graph, node by node, from a ``DecoderConfig``.

About fifteen nodes a block: packed q/k/v → GroupQueryAttention (rope, cache and window inside) →
o_proj, and the MLP; residual additions are inside the Skip…LayerNormalization nodes. Operators of
``com.microsoft``: onnxruntime ``docs/ContribOperators.md``. Where ONNX has no operator at opset 21
(RMSNorm, SiLU), standard nodes are written that onnxruntime fuses while loading.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from compress.checkpoint.scalars import folded_config
from compress.decoder.config import AttentionKind, DecoderConfig
from compress.plan.shapes import Plan, PlanEntry
from exporters.onnx.builder import MICROSOFT, Dims, GraphBuilder
from exporters.onnx.packing import Piece, affine
from exporters.onnx.planning import CONTEXT_KEY, SWITCH_KEY, TYPE_KEY, rope_names


def build(
    config: DecoderConfig, plan: Plan, pieces: Mapping[str, Piece], data_name: str
) -> ir.Model:
    """Build the model, with its weights in the external file ``data_name``.

    Inputs: ``input_ids``, ``attention_mask``, ``position_ids`` int64 and
    ``past_key_values.{i}.key/.value`` float32 ``[batch_size, kv_heads, past, head_dim]``, or
    ``past_conv.{i}`` (``exporters.onnx.convolution``).
    Outputs: ``logits`` float32 ``[batch_size, sequence_length, vocab]`` and
    ``present.{i}.key/.value``.
    """
    return DecoderGraph(config, plan, pieces, data_name).build()


class DecoderGraph(GraphBuilder):
    """Builds the decoder, block by block."""

    def __init__(
        self, config: DecoderConfig, plan: Plan, pieces: Mapping[str, Piece], data_name: str
    ) -> None:
        super().__init__(data_name)
        self.config = folded_config(config, plan.folded) if plan.folded else config
        self.entries: dict[str, PlanEntry] = {entry.name: entry for entry in plan.entries}
        mixed = plan.type_name.startswith("mix-")
        self.switch = config.rope_switch if plan.max_context > config.rope_switch else 0
        self.properties = {CONTEXT_KEY: str(plan.max_context)}
        self.properties |= {SWITCH_KEY: str(self.switch)} if self.switch else {}
        self.properties |= {TYPE_KEY: plan.type_name} if mixed else {}
        self.accuracy_level = int(plan.settings["accuracy_level"])
        self.pieces = pieces
        self.casts: dict[str, ir.Value] = {}

    def build(self) -> ir.Model:
        c = self.config
        sequence: Dims = ["batch_size", "sequence_length"]
        ids = self.input("input_ids", ir.DataType.INT64, sequence)
        mask = self.input(
            "attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"]
        )
        self.positions = self.input("position_ids", ir.DataType.INT64, sequence)
        self.lengths(mask)
        if self.switch:
            self.positions = self.switched()
        residual = self.embedding(ids)
        if c.learned_positions:
            residual = self.op("Add", [residual, self.learned()], "embed_tokens/placed")
        delta: ir.Value | None = None
        for block in range(c.num_hidden_layers):
            delta, residual = self.block(block, delta, residual)
        hidden, _ = self.add_norm(delta, residual, "norm", "model.norm")
        logits = self.linear(hidden, "lm_head", "lm_head", output="" if c.logit_cap else "logits")
        if c.logit_cap:
            logits = self.capped(logits)
        self.output(logits, [*sequence, c.vocab_size], first=True)
        return self.model(c.model_type, self.properties)

    # --- the decoder ---------------------------------------------------------------------------

    def lengths(self, mask: ir.Value) -> None:
        """GroupQueryAttention's inputs from the mask: last position of each row, total length."""
        one = self.constant("one", np.array(1, np.int64))
        axis = self.constant("axis_1", np.array([1], np.int64))
        count = self.op("ReduceSum", [mask, axis], "mask/count", keepdims=0)
        last = self.op("Sub", [count, one], "mask/last")
        self.last = self.op("Cast", [last], "mask/seqlens_k", to=ir.DataType.INT32)
        shape = self.op("Shape", [mask], "mask/shape")
        index = self.constant("index_1", np.array(1, np.int64))
        total = self.op("Gather", [shape, index], "mask/total", axis=0)
        self.total = self.op("Cast", [total], "mask/total_length", to=ir.DataType.INT32)

    def switched(self) -> ir.Value:
        """Rows of the tables of cos and sin: positions, and for a long text those after the rows of
        shorter ones (``longrope``)."""
        switch = self.constant("rope_switch", np.array(self.switch, np.int32))
        long = self.op("Greater", [self.total, switch], "position_ids/long")
        wide = self.op("Cast", [long], "position_ids/long/number", to=ir.DataType.INT64)
        rows = self.constant("rope_switch_rows", np.array(self.switch, np.int64))
        first = self.op("Mul", [wide, rows], "position_ids/first")
        return self.op("Add", [self.positions, first], "position_ids/rows")

    def embedding(self, ids: ir.Value) -> ir.Value:
        """Rows of the embedding, by standard operators only: ``(code - zero) * scale``.

        GatherBlockQuantized would be one node, but onnxruntime-web's default build has no kernel
        for it. A tied head's MatMulNBits reads the same initializers.
        """
        entry = self.entries["embed_tokens.weight"]
        name = entry.target_name
        if entry.grid == "F16":
            rows = self.op("Gather", [self.weight(name), ids], "embed_tokens/gather", axis=0)
            return self.op("Cast", [rows], "embed_tokens", to=ir.DataType.FLOAT)
        grid = affine(entry.grid)
        groups = grid.groups((entry.shape[0], entry.shape[1]))
        grouped = self.constant("embedding_groups", np.array([0, 0, groups, -1], np.int64))
        codes = self.codes_of(f"{name}.codes", ids, "embed_tokens/codes", grid.bits)
        if grid.bits == 4:
            codes = self.op("Reshape", [codes, grouped], "embed_tokens/groups")
        if grid.symmetric:
            zero = self.constant("embedding_zero", np.array(grid.middle, np.float32))
        else:
            zero = self.codes_of(f"{name}.zero_points", ids, "embed_tokens/zeros", grid.bits)
            if groups * grid.bits % 8:  # the high half of the last byte is padding
                cut = {"begin": 0, "end": groups, "axis": 2}
                where = [
                    self.constant(f"zeros_{k}", np.array([n], np.int64)) for k, n in cut.items()
                ]
                zero = self.op("Slice", [zero, *where], "embed_tokens/zeros/cut")
            zero = self.op("Reshape", [zero, grouped], "embed_tokens/zero")
        centered = self.op("Sub", [codes, zero], "embed_tokens/centered")
        # Of the scales that a runtime has already cast: WebGPU has no float16 without shader-f16.
        scale = self.op("Gather", [self.scales(name), ids], "embed_tokens/scales", axis=0)
        scale = self.op("Reshape", [scale, grouped], "embed_tokens/scale")
        scaled = self.op("Mul", [centered, scale], "embed_tokens/scaled")
        return self.op("Reshape", [scaled, self.joined()], "embed_tokens")

    def codes_of(self, weight: str, ids: ir.Value, name: str, bits: int) -> ir.Value:
        """Rows of packed codes as float32: of 4 bits ``[batch, sequence, codes]``, of 8 bits in the
        shape in which they are stored."""
        codes = self.op("Gather", [self.weight(weight), ids], f"{name}/packed", axis=0)
        if bits == 4:  # two a byte, the first in the low half
            pairs = self.constant("embedding_pairs", np.array([0, 0, -1, 1], np.int64))
            codes = self.op("Reshape", [codes, pairs], f"{name}/pairs")
            mask, four = (self.constant(f"uint8_{n}", np.array(n, np.uint8)) for n in (15, 4))
            low = self.op("BitwiseAnd", [codes, mask], f"{name}/low")
            high = self.op("BitShift", [codes, four], f"{name}/high", direction="RIGHT")
            codes = self.op("Concat", [low, high], f"{name}/both", axis=-1)
            codes = self.op("Reshape", [codes, self.joined()], f"{name}/flat")
        return self.op("Cast", [codes], name, to=ir.DataType.FLOAT)

    def joined(self) -> ir.Value:
        """The shape ``[batch, sequence, rest]``."""
        return self.constant("embedding_joined", np.array([0, 0, -1], np.int64))

    def learned(self) -> ir.Value:
        """Learned positions (gpt2), float32 ``[batch, sequence, hidden]``."""
        halves = self.weight(self.entries["embed_positions.weight"].target_name)
        # Folded by a runtime: WebGPU has no float16 without shader-f16.
        table = self.op("Cast", [halves], "embed_positions/float", to=ir.DataType.FLOAT)
        return self.op("Gather", [table, self.positions], "embed_positions", axis=0)

    def capped(self, logits: ir.Value) -> ir.Value:
        """``cap * tanh(logits / cap)`` (gemma2)."""
        cap = np.array(self.config.logit_cap, np.float32)
        small = self.op("Div", [logits, self.constant("logit_cap", cap)], "lm_head/divided")
        flat = self.op("Tanh", [small], "lm_head/tanh")
        return self.op(
            "Mul", [flat, self.constant("logit_cap", cap)], "lm_head/capped", output="logits"
        )

    def block(
        self, block: int, delta: ir.Value | None, residual: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Add a block: sequential, or attention and MLP in parallel after one norm (phi) or two
        (gpt_neox). Returns the last branch, not yet added, and the stream."""
        c = self.config
        stem = f"blocks.{block - block % c.block_repeat}"
        name = f"layers.{block}"
        hidden, residual = self.add_norm(delta, residual, f"{stem}.input_layernorm", name)
        attention = self.attention(hidden, stem, name, block)
        if "attention_post_norm" in c.norms:
            attention = self.post_norm(attention, f"{stem}.attention_post_norm", name)
        if c.parallel_residual:
            if "post_attention_layernorm" in c.norms:
                weight = f"{stem}.post_attention_layernorm"
                hidden, _ = self.add_norm(None, residual, weight, f"{name}/post_attention")
            mlp = self.mlp(hidden, stem, name)
            return self.op("Add", [attention, mlp], f"{name}/sum"), residual
        hidden, residual = self.add_norm(
            attention, residual, f"{stem}.post_attention_layernorm", f"{name}/post_attention"
        )
        mlp = self.mlp(hidden, stem, name)
        if "mlp_post_norm" in c.norms:
            mlp = self.post_norm(mlp, f"{stem}.mlp_post_norm", name)
        return mlp, residual

    def attention(self, hidden: ir.Value, stem: str, name: str, block: int) -> ir.Value:
        c, kind = self.config, self.config.kinds[self.config.layers[block]]
        if kind.taps:
            from exporters.onnx.convolution import convolved

            return convolved(self, hidden, stem, name, block)
        rotates = kind.rope is not None
        normed = c.qk_norm and kind.normed
        query, key, value = self.projections(hidden, stem, name, packed=not normed)
        if normed and key is not None:
            if rotates and c.qk_norm_after_rope:  # else inside GroupQueryAttention
                query = self.rotated(query, kind, f"{name}/q_rotated", c.num_attention_heads)
                key = self.rotated(key, kind, f"{name}/k_rotated", c.num_key_value_heads)
                rotates = False
            query = self.head_norm(query, f"{stem}.q_norm", f"{name}/q_norm", "query_heads")
            key = self.head_norm(key, f"{stem}.k_norm", f"{name}/k_norm", "key_heads")
        heads, size = c.num_key_value_heads, c.head_dim
        # Transformers.js makes the empty cache from these: heads and size must be numbers.
        cache: Dims = ["batch_size", heads, "past_sequence_length", size]
        grown: Dims = ["batch_size", heads, "total_sequence_length", size]
        past = [
            self.input(f"past_key_values.{block}.{part}", ir.DataType.FLOAT, cache)
            for part in ("key", "value")
        ]
        window = kind.window
        capped = {"softcap": c.score_cap} if c.score_cap else {}
        attended, *present = self.node(
            "GroupQueryAttention",
            [
                *(query, key, value, *past, self.last, self.total),
                *((*self.tables(kind), self.positions) if rotates else ()),
                *((None, self.stored(f"{stem}.sinks.weight")) if c.sinks else ()),
            ],
            f"{name}/attention",
            [f"{name}/attention", f"present.{block}.key", f"present.{block}.value"],
            domain=MICROSOFT,
            num_heads=c.num_attention_heads,
            kv_num_heads=c.num_key_value_heads,
            do_rotary=int(rotates),
            rotary_interleaved=0,
            local_window_size=window if window and window < c.max_context else -1,
            **capped,
        )
        for cached in present:
            self.output(cached, grown)
        return self.linear(attended, f"{stem}.o_proj", f"{name}/o_proj")

    def projections(
        self, hidden: ir.Value, stem: str, name: str, *, packed: bool
    ) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
        """Query, key and value; where they are one matrix and may stay ``packed``, all in the
        first."""
        c = self.config
        if f"{stem}.qkv_proj.weight" not in self.entries:
            query, key, value = (
                self.linear(hidden, f"{stem}.{part}_proj", f"{name}/{part}_proj") for part in "qkv"
            )
            return query, key, value
        query = self.linear(hidden, f"{stem}.qkv_proj", f"{name}/qkv_proj")
        if packed:
            return query, None, None
        sizes = np.array([c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads])
        split = self.constant("qkv_sizes", (sizes * c.head_dim).astype(np.int64))
        query, key, value = self.node(
            "Split", [query, split], name, [f"{name}/{part}" for part in "qkv"], axis=-1
        )
        return query, key, value

    def head_norm(self, x: ir.Value, weight: str, name: str, kind: str) -> ir.Value:
        """RMSNorm of each head of ``[batch, sequence, heads * head_dim]`` (qwen3), or of all heads
        together (olmo2)."""
        c = self.config
        if c.qk_norm == "projection":
            return self.rms_norm(x, weight, name, c.branch_eps)
        heads = c.num_attention_heads if kind == "query_heads" else c.num_key_value_heads
        apart = self.constant(f"{kind}_apart", np.array([0, 0, heads, c.head_dim], np.int64))
        joined = self.constant(f"{kind}_joined", np.array([0, 0, heads * c.head_dim], np.int64))
        x = self.op("Reshape", [x, apart], f"{name}/apart")
        x = self.rms_norm(x, weight, name, c.branch_eps)
        return self.op("Reshape", [x, joined], f"{name}/joined")

    def tables(self, kind: AttentionKind) -> list[ir.Value]:
        """Tables of cos and sin of a kind of layers."""
        return [self.stored(name) for name in rope_names(kind.rope or 0)]

    def rotated(self, x: ir.Value, kind: AttentionKind, name: str, heads: int) -> ir.Value:
        """Rotary embedding of ``[batch, sequence, heads * head_dim]``."""
        return self.op(
            "RotaryEmbedding",
            [x, self.positions, *self.tables(kind)],
            name,
            domain=MICROSOFT,
            num_heads=heads,
            rotary_embedding_dim=self.config.ropes[0].rotary_dim,
        )

    def mlp(self, hidden: ir.Value, stem: str, name: str) -> ir.Value:
        if self.config.experts is not None:
            from exporters.onnx.experts import experts

            return experts(self, hidden, stem, name)
        return self.gated(hidden, stem, name)

    def gated(self, hidden: ir.Value, stem: str, name: str) -> ir.Value:
        up = self.linear(hidden, f"{stem}.up_proj", f"{name}/up_proj")
        if self.config.gated_mlp:  # SwiGLU: gate * sigmoid(gate) * up
            gate = self.linear(hidden, f"{stem}.gate_proj", f"{name}/gate_proj")
            up = self.op("Mul", [self.activated(gate, name), up], f"{name}/gated")
        else:
            up = self.activated(up, name)
        return self.linear(up, f"{stem}.down_proj", f"{name}/down_proj")

    def activated(self, x: ir.Value, name: str) -> ir.Value:
        """The activation of an MLP."""
        match self.config.activation:
            case "silu":
                sigmoid = self.op("Sigmoid", [x], f"{name}/sigmoid")
                return self.op("Mul", [x, sigmoid], f"{name}/silu")
            case "relu2":
                positive = self.op("Relu", [x], f"{name}/relu")
                return self.op("Mul", [positive, positive], f"{name}/relu2")
            case activation:
                kind = "tanh" if activation == "gelu_new" else "none"
                return self.op("Gelu", [x], f"{name}/gelu", approximate=kind)

    def linear(self, x: ir.Value, stem: str, name: str, output: str = "") -> ir.Value:
        """``x @ weight.T + bias``; ``output``: name of the value, if not the node's."""
        entry = self.entries.get(f"{stem}.weight") or self.entries["embed_tokens.weight"]  # tied
        bias = self.entries.get(f"{stem}.bias")
        shift = self.weight(bias.target_name) if bias else None
        target = entry.target_name
        if entry.grid == "F16":
            return self.float_linear(x, self.weight(target), shift, name, output)
        grid = affine(entry.grid)
        rows, columns = entry.shape
        codes = self.weight(f"{target}.codes")
        zeros = None if grid.symmetric else self.weight(f"{target}.zero_points")
        return self.op(
            "MatMulNBits",
            [x, codes, self.scales(target), zeros, None, shift],
            name,
            output=output,
            domain=MICROSOFT,
            K=columns,
            N=rows,
            bits=grid.bits,
            block_size=grid.group_size,
            accuracy_level=self.accuracy_level,
        )

    def float_linear(
        self, x: ir.Value, weight: ir.Value, bias: ir.Value | None, name: str, output: str
    ) -> ir.Value:
        """A linear with a float16 weight, cast and transposed once, when a runtime loads it."""
        wide = self.op("Cast", [weight], f"{name}/float", to=ir.DataType.FLOAT)
        columns = self.op("Transpose", [wide], f"{name}/transposed")
        if bias is None:
            return self.op("MatMul", [x, columns], name, output=output)
        product = self.op("MatMul", [x, columns], f"{name}/product")
        return self.op("Add", [product, bias], name, output=output)

    # --- norms ---------------------------------------------------------------------------------

    def add_norm(
        self, delta: ir.Value | None, residual: ir.Value, weight: str, name: str
    ) -> tuple[ir.Value, ir.Value]:
        """``residual + delta`` and its norm: (normed, sum). The first block has no delta; without
        a norm of this role the sum is returned twice (olmo2)."""
        c = self.config
        rms = c.norm == "rmsnorm"
        role = weight.rpartition(".")[2]
        name = f"{name}/{role}"
        if role != "norm" and role not in c.norms:
            if delta is not None:
                residual = self.op("Add", [delta, residual], f"{name}/residual")
            return residual, residual
        if delta is None:
            norm = self.rms_norm if rms else self.layer_norm
            return norm(residual, weight, name, c.norm_eps), residual
        parameters = [self.stored(f"{weight}.weight")]
        if c.norm_bias:
            parameters.append(self.stored(f"{weight}.bias"))
        normed, _, _, total = self.node(
            "SkipSimplifiedLayerNormalization" if rms else "SkipLayerNormalization",
            [delta, residual, *parameters],
            name,
            [name, "", "", f"{name}/residual"],
            domain=MICROSOFT,
            epsilon=c.norm_eps,
        )
        return normed, total

    def post_norm(self, branch: ir.Value, weight: str, name: str) -> ir.Value:
        """The norm of a branch's output."""
        norm = self.rms_norm if self.config.norm == "rmsnorm" else self.layer_norm
        role = weight.rpartition(".")[2]
        return norm(branch, weight, f"{name}/{role}", self.config.branch_eps)

    def rms_norm(self, x: ir.Value, weight: str, name: str, eps: float) -> ir.Value:
        """RMSNorm in the nodes that onnxruntime's SimplifiedLayerNormFusion recognizes.

        ``onnx.checker`` does not know its operator SimplifiedLayerNormalization.
        """
        epsilon = np.array(eps, np.float32)
        of_branch = "branch_" if eps != self.config.norm_eps else ""
        axis = self.constant("axis_last", np.array([-1], np.int64))
        two = self.constant("two", np.array(2, np.float32))
        square = self.op("Pow", [x, two], f"{name}/square")
        mean = self.op("ReduceMean", [square, axis], f"{name}/mean", keepdims=1)
        moved = self.op(
            "Add",
            [mean, self.constant("branch_epsilon" if of_branch else "epsilon", epsilon)],
            f"{name}/moved",
        )
        root = self.op("Sqrt", [moved], f"{name}/root")
        unit = self.op("Div", [x, root], f"{name}/unit")
        return self.op("Mul", [unit, self.stored(f"{weight}.weight")], name)

    def layer_norm(self, x: ir.Value, weight: str, name: str, eps: float) -> ir.Value:
        parameters = [self.stored(f"{weight}.weight")]
        if self.config.norm_bias:
            parameters.append(self.stored(f"{weight}.bias"))
        return self.op("LayerNormalization", [x, *parameters], name, axis=-1, epsilon=eps)

    # --- weights -------------------------------------------------------------------------------

    def stored(self, name: str) -> ir.Value:
        """The float initializer of a planned weight."""
        return self.weight(self.entries[name].target_name)

    def weight(self, name: str) -> ir.Value:
        """An initializer of the data file."""
        return self.external(self.pieces[name])

    def scales(self, target: str) -> ir.Value:
        """Scales, stored as float16; runtimes fold the cast when they load the model."""
        if target not in self.casts:
            halves = self.weight(f"{target}.scales")
            wide = self.op("Cast", [halves], f"{target}.scales/cast", to=ir.DataType.FLOAT)
            self.casts[target] = wide
        return self.casts[target]
