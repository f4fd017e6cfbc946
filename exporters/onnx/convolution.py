"""The nodes of a gated causal convolution, of standard operators; its state is an input and an
output of the graph, with the names and the shape of Liquid's own files and of Transformers.js.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from exporters.onnx.builder import Dims
    from exporters.onnx.graph import DecoderGraph


def convolved(graph: DecoderGraph, hidden: ir.Value, stem: str, name: str, block: int) -> ir.Value:
    """A layer's output, of the shape of ``hidden``; adds the input ``past_conv.{block}`` and the
    output ``present_conv.{block}``, float32 ``[batch_size, hidden, taps]``: the last columns."""
    c = graph.config
    taps = c.kinds[c.layers[block]].taps
    shape: Dims = ["batch_size", c.hidden_size, taps]
    past = graph.input(f"past_conv.{block}", ir.DataType.FLOAT, shape)
    projected = graph.linear(hidden, f"{stem}.in_proj", f"{name}/in_proj")
    thirds = graph.constant("conv_thirds", np.array([c.hidden_size] * 3, np.int64))
    before, after, value = graph.node(
        "Split", [projected, thirds], f"{name}/conv", [f"{name}/conv/{p}" for p in "bcx"], axis=-1
    )
    gated = graph.op("Mul", [before, value], f"{name}/conv/gated")
    columns = graph.op("Transpose", [gated], f"{name}/conv/columns", perm=[0, 2, 1])
    history = graph.op("Concat", [past, columns], f"{name}/conv/history", axis=-1)
    ends = graph.constant("conv_end", np.array([2**31 - 1], np.int64))
    axis = graph.constant("axis_2", np.array([2], np.int64))
    last = graph.constant("conv_last", np.array([-taps], np.int64))
    present = graph.op(
        "Slice", [history, last, ends, axis], f"{name}/conv/present",
        output=f"present_conv.{block}",
    )  # fmt: skip
    graph.output(present, shape)
    # The oldest column of the state is beyond the first position's reach.
    one = graph.constant("axis_1", np.array([1], np.int64))
    reached = graph.op("Slice", [history, one, ends, axis], f"{name}/conv/reached")
    weight = graph.op("Unsqueeze", [graph.stored(f"{stem}.conv.weight"), one], f"{name}/conv/taps")
    mixed = graph.op("Conv", [reached, weight], f"{name}/conv/mixed", group=c.hidden_size)
    rows = graph.op("Transpose", [mixed], f"{name}/conv/rows", perm=[0, 2, 1])
    product = graph.op("Mul", [after, rows], f"{name}/conv/product")
    return graph.linear(product, f"{stem}.out_proj", f"{name}/out_proj")
