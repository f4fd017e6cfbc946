"""The nodes of a mixture of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from exporters.onnx.builder import MICROSOFT
from exporters.onnx.packing import affine

if TYPE_CHECKING:
    from exporters.onnx.graph import DecoderGraph


def sparsemixer(graph: DecoderGraph, scores: ir.Value, jitter: float, name: str) -> ir.Value:
    """Weights of the experts' outputs, ``[tokens, experts]``, of which QMoE takes those of the two
    best scores (``compress.decoder.experts.sparsemixer``)."""
    axis = graph.constant("axis_last", np.array([-1], np.int64))
    least = graph.constant("router_least", np.array(-np.inf, np.float32))
    limit = graph.constant("router_limit", np.array(2 * jitter, np.float32))
    size = graph.op("Abs", [scores], f"{name}/size")

    def round_of(left: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        best = graph.op("ReduceMax", [left, axis], f"{name}/best", keepdims=1)
        below = graph.op("Sub", [best, left], f"{name}/below")
        scale = graph.op("Max", [size, best], f"{name}/scale")
        far = graph.op(
            "Greater", [graph.op("Div", [below, scale], f"{name}/far"), limit], f"{name}/is_far"
        )
        near = graph.op("Where", [far, least, left], f"{name}/near")
        return best, graph.op("Softmax", [near], f"{name}/weights", axis=-1)

    best, first = round_of(scores, f"{name}/first")
    is_first = graph.op("Equal", [scores, best], f"{name}/is_first")
    _, second = round_of(
        graph.op("Where", [is_first, least, scores], f"{name}/left"), f"{name}/second"
    )
    return graph.op("Where", [is_first, first, second], f"{name}/weights")


def experts(graph: DecoderGraph, hidden: ir.Value, stem: str, name: str) -> ir.Value:
    """A mixture of experts: one node for all of them, and the shared expert beside it."""
    e = graph.config.experts
    assert e is not None
    flat = graph.constant("tokens", np.array([-1, graph.config.hidden_size], np.int64))
    tokens = graph.op("Reshape", [hidden, flat], f"{name}/tokens")
    router = graph.op(
        "Transpose", [graph.stored(f"{stem}.router.weight")], f"{name}/router/by_column"
    )
    scores = graph.op("MatMul", [tokens, router], f"{name}/router")
    if e.biased:
        biases = graph.stored(f"{stem}.router.bias")
        scores = graph.op("Add", [scores, biases], f"{name}/router/biased")
    entries = [
        graph.entries[f"{stem}.experts.{role}.weight"] for role in ("gate_up_proj", "down_proj")
    ]
    grid = affine(entries[0].grid)
    inputs: list[ir.Value | None] = [hidden, scores]
    for entry in entries:
        target = entry.target_name
        bias = graph.stored(entry.name.replace(".weight", ".bias")) if e.biased else None
        inputs += [graph.weight(f"{target}.codes"), graph.scales(target), bias]
    inputs += [None] * 3  # a third matrix, where gate and up are apart
    zeros: list[ir.Value | None] = [None, None]
    if not grid.symmetric:
        zeros = [graph.weight(f"{entry.target_name}.zero_points") for entry in entries]
    inputs += [*zeros, None]
    if e.jitter:
        inputs.append(sparsemixer(graph, scores, e.jitter, f"{name}/router"))
    elif not e.renormalize:  # else QMoE takes the softmax of the chosen scores alone
        inputs.append(graph.op("Softmax", [scores], f"{name}/router/weights", axis=-1))
    limits: dict[str, Any] = {"swiglu_limit": e.clamp} if e.clamp else {}
    # Not an attribute that onnxruntime 1.30, Transformers.js's in Node, knows.
    level: dict[str, Any] = {"accuracy_level": graph.accuracy_level} if graph.accuracy_level else {}
    mixed = graph.op(
        "QMoE",
        inputs,
        f"{name}/experts",
        domain=MICROSOFT,
        k=e.chosen,
        activation_type="swiglu",
        activation_alpha=1.702 if e.clamp else 1.0,
        activation_beta=1.0 if e.clamp else 0.0,
        **limits,
        swiglu_fusion=1,  # rows of gate and up alternate
        normalize_routing_weights=int(e.renormalize),
        **level,
        expert_weight_bits=grid.bits,
        block_size=grid.group_size,
    )
    if not e.shared_width:
        return mixed
    shared = graph.gated(hidden, f"{stem}.shared", f"{name}/shared")
    if e.shared_gate:
        gate = graph.op(
            "Transpose", [graph.stored(f"{stem}.shared_gate.weight")], f"{name}/gate/by_column"
        )
        share = graph.op(
            "Sigmoid", [graph.op("MatMul", [hidden, gate], f"{name}/gate")], f"{name}/share"
        )
        shared = graph.op("Mul", [shared, share], f"{name}/shared/shared")
    return graph.op("Add", [mixed, shared], f"{name}/mixed")
