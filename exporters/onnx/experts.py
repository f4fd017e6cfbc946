"""The nodes of a mixture of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from exporters.onnx.builder import MICROSOFT
from exporters.onnx.packing import affine

if TYPE_CHECKING:
    from exporters.onnx.graph import DecoderGraph


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
    entries = [
        graph.entries[f"{stem}.experts.{role}.weight"] for role in ("gate_up_proj", "down_proj")
    ]
    grid = affine(entries[0].grid)
    inputs: list[ir.Value | None] = [hidden, scores]
    for entry in entries:
        target = entry.target_name
        inputs += [graph.weight(f"{target}.codes"), graph.scales(target), None]
    inputs += [None] * 3  # a third matrix, where gate and up are apart
    zeros: list[ir.Value | None] = [None, None]
    if not grid.symmetric:
        zeros = [graph.weight(f"{entry.target_name}.zero_points") for entry in entries]
    inputs += [*zeros, None]
    if not e.renormalize:  # else QMoE takes the softmax of the chosen scores alone
        inputs.append(graph.op("Softmax", [scores], f"{name}/router/weights", axis=-1))
    mixed = graph.op(
        "QMoE",
        inputs,
        f"{name}/experts",
        domain=MICROSOFT,
        k=e.chosen,
        activation_type="swiglu",
        activation_alpha=1.0,
        activation_beta=0.0,
        swiglu_fusion=1,  # rows of gate and up alternate
        normalize_routing_weights=int(e.renormalize),
        # Not an attribute that onnxruntime 1.30, Transformers.js's in Node, knows.
        **({"accuracy_level": graph.accuracy_level} if graph.accuracy_level else {}),
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
