"""The largest magnitudes between the operations of a twin, for float16's range.

A device computes in float16, which ends at 65,504; the twin in float32, where larger values show.
So ``main`` gets one more output: the largest magnitude of every value that a device has in float16,
but for moves, softmax, and scores after the mask, whose hidden ones are -30000 on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.coreai.library import CoreAI

__all__ = ["LARGEST", "largest_by_label", "measure", "remark"]

LARGEST = "largest"  # name of the output
LIMIT = 65504.0  # of float16
ARITHMETIC = ("add", "sub", "mul", "silu", "gelu", "relu")  # parts of names of operations


def measure(library: CoreAI, main: Any) -> list[str]:
    """Add the output to a function as read, before it is widened; inside the program's context.

    Returns:
        What each of its numbers is of: ``block_3_up_proj_weight``, ``add after …``.
    """
    ops, ir = library.ops, library.ir
    labels: list[str] = []
    largest, last = [], ""
    operations = list(main.entry_block.operations)
    for operation, following in pairwise(operations):
        kind = operation.operation.name.rpartition(".")[2].removeprefix("broadcasting_")
        weight = weight_of(operation) if "matmul" in kind else ""
        last = weight or last
        if not last or not any(word in kind for word in ARITHMETIC):
            continue
        (result,) = operation.results
        tensor = result.type
        half = ir.RankedTensorType.isinstance(tensor) and ir.F16Type.isinstance(
            ir.RankedTensorType(tensor).element_type
        )
        if not half or any(use.owner.name == "coreai.softmax" for use in result.uses):
            continue
        labels.append(weight or f"{kind} after {last}")
        axes = np.arange(len(ir.RankedTensorType(tensor).shape), dtype=np.int32)
        with ir.InsertionPoint(following):
            top = ops.reduce_max(ops.abs_(result), axes)
            largest.append(ops.reshape(top, np.array([1], np.uint32)))
    with ir.InsertionPoint(main._terminator_op):
        output = ops.concat(np.array(0, np.int32), largest)
    main.outputs_spec = [*main.outputs_spec, (LARGEST, output)]
    return labels


def weight_of(product: Any) -> str:
    """The name of the weight in a product; empty where both sides are computed."""
    value = product.operands[1]
    for _ in range(6):  # of the transpose, of what decodes (some of sparse ones), of the constant
        owner = value.owner
        if not hasattr(owner, "operands"):  # an argument of the function
            return ""
        if owner.name == "coreai.constant":
            found = str(owner.attributes["value"]).partition("<")[2].partition(">")[0]
            return found.removesuffix("_codes").removesuffix("_values")
        if not len(owner.operands):
            return ""
        value = owner.operands[0]
    return ""


def largest_by_label(labels: Sequence[str], largest: NDArray[np.float32]) -> dict[str, float]:
    """The largest number of each label."""
    found: dict[str, float] = {}
    for label, value in zip(labels, largest.tolist(), strict=True):
        found[label] = max(value, found.get(label, 0.0))
    return found


def remark(magnitudes: Mapping[str, float]) -> str:
    """What the report says of the largest magnitudes."""
    label = max(magnitudes, key=lambda label: magnitudes[label])
    most = magnitudes[label]
    text = f"Its largest value between operations was {most:,.0f} ({label})"
    if most > LIMIT:
        return f"{text}, beyond float16's 65,504: a device overflows there."
    few = ": little headroom on a device" if most > LIMIT / 2 else ""
    return f"{text}; float16 holds 65,504{few}."
