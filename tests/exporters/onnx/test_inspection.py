"""Describing ONNX folders without reading weights."""

from __future__ import annotations

from typing import Any

import onnx

from exporters.onnx.inspection import tensor_rows


def test_folders_of_earlier_versions_are_described() -> None:
    """Their embedding is read by GatherBlockQuantized, from rows of bytes."""

    def outside(name: str, kind: int, shape: list[int], offset: int, nbytes: int) -> Any:
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "x"), ("offset", offset), ("length", nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    names = ["embed_tokens.weight.codes", "ids", "embed_tokens.weight.scales"]
    node = onnx.helper.make_node(
        "GatherBlockQuantized", names, ["x"], domain="com.microsoft", bits=4, block_size=32
    )
    stored = [
        outside(names[0], onnx.TensorProto.UINT8, [512, 32], 0, 512 * 32),
        outside(names[2], onnx.TensorProto.FLOAT, [512, 2], 1 << 20, 512 * 8),
    ]
    graph = onnx.helper.make_graph([node], "g", [], [], stored)
    assert tensor_rows(graph) == [
        {"name": "embed_tokens.weight", "shape": [512, 64], "grid": "int4-g32", "bytes": 20480}
    ]
