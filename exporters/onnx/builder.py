"""Builds a graph with onnx_ir: inputs, outputs, initializers and nodes, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from compress.grids import Array
from exporters.onnx.packing import Piece

OPSET = 21
IR_VERSION = 10
MICROSOFT = "com.microsoft"
DTYPES = {"<f4": ir.DataType.FLOAT, "<f2": ir.DataType.FLOAT16, "|u1": ir.DataType.UINT8}

Inputs = Sequence[ir.Value | None]
Dims = Sequence[int | str]
Attribute = int | float | str | ir.DataType | Sequence[int]


class GraphBuilder:
    """Collects a graph; a node's name is also the name of its (first) output.

    Attributes:
        data_name: of the external data file, beside the .onnx file.
    """

    def __init__(self, data_name: str) -> None:
        self.data_name = data_name
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}

    def model(self, name: str, metadata: dict[str, str]) -> ir.Model:
        """The finished model, without time, host name or path."""
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports={"": OPSET, MICROSOFT: 1},
            name=name,
        )
        return ir.Model(
            graph,
            ir_version=IR_VERSION,
            producer_name="packlight",
            metadata_props=metadata,
        )

    def input(self, name: str, dtype: ir.DataType, shape: Dims) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, shape: Dims, first: bool = False) -> None:
        """Declare a float32 output of the graph, as the last or the first."""
        value.shape = ir.Shape(shape)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        self.outputs.insert(0 if first else len(self.outputs), value)

    def op(
        self,
        op_type: str,
        inputs: Inputs,
        name: str,
        *,
        output: str = "",
        domain: str = "",
        **attributes: Attribute,
    ) -> ir.Value:
        """Add a node with one output, by default with the node's name."""
        outputs = [output or name]
        return self.node(op_type, inputs, name, outputs, domain=domain, **attributes)[0]

    def node(
        self,
        op_type: str,
        inputs: Inputs,
        name: str,
        outputs: Sequence[str],
        *,
        domain: str = "",
        **attributes: Attribute,
    ) -> Sequence[ir.Value]:
        given = list(inputs)
        while given[-1] is None:  # optional ones at the end
            given.pop()
        node = ir.node(
            op_type,
            given,
            {key: int(v) if isinstance(v, ir.DataType) else v for key, v in attributes.items()},
            domain=domain,
            outputs=[ir.Value(name=output) for output in outputs],
            name=name,
        )
        self.nodes.append(node)
        return node.outputs

    def constant(self, name: str, values: Array) -> ir.Value:
        """Add a small initializer inside the .onnx file."""
        if name not in self.initializers:
            self.initializers[name] = initializer(ir.Tensor(values, name=name))
        return self.initializers[name]

    def external(self, piece: Piece) -> ir.Value:
        """Add an initializer that refers to bytes of the external data file."""
        if piece.name not in self.initializers:
            tensor = ir.ExternalTensor(
                self.data_name,
                piece.offset,
                piece.nbytes,
                DTYPES[piece.dtype],
                shape=ir.Shape(piece.shape),
                name=piece.name,
            )
            self.initializers[piece.name] = initializer(tensor)
        return self.initializers[piece.name]


def initializer(tensor: ir.Tensor[Any] | ir.ExternalTensor) -> ir.Value:
    return ir.Value(
        name=tensor.name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
