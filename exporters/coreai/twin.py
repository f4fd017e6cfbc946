"""The float32 twin of a program: the same operations on the same packed bytes, with every float16
widened to float32.

Apple's CPU runtime executes float16 as well, but twenty times slower, and it sums in float16. So a
program is changed after it is read: types of arguments and results, constants, and casts between
the two types, which vanish. Scales and look-up tables are widened, which is exact; codes are not
touched.

Each call of a program decodes every weight. Where the decoded weights fit in memory, the operations
that decode are moved to a function of their own, whose results the first one takes (``split``): the
same operations of Apple's, once instead of in each call.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import ArtifactError
from exporters.coreai.bytecode import Blob
from exporters.coreai.library import CoreAI
from exporters.coreai.planning import ALIGNMENT

__all__ = ["WEIGHTS", "decoded_bytes", "main_of", "split", "widen"]

DECODING = (
    "coreai.blockwise_shift_scale", "coreai.lut_to_dense", "coreai.sparse_with_bitmask_to_dense",
)  # fmt: skip
WEIGHTS = "weights"  # name of the function of ``split``

RESOURCE = re.compile(r'dense_resource<"?([^">]+)"?>')


def widen(library: CoreAI, module: Any, blobs: Sequence[Blob]) -> None:
    """Change a program to its float32 twin; inside its context.

    Args:
        library: coreai-core.
        module: the program, as read.
        blobs: its large constants.

    Raises:
        ArtifactError: a constant that the file does not hold.
    """
    by_name = {blob.name: blob.raw for blob in blobs}
    for operation in list(operations(module.operation)):
        if operation.name == "coreai.graph":
            widen_signature(library, operation)
        elif operation.name == "coreai.constant":
            value = operation.attributes["value"]
            if is_half(library, value.type):
                operation.attributes["value"] = widened(library, value, by_name)
        for result in operation.results:
            result.set_type(wide_type(library, result.type))
        if operation.name == "coreai.cast":
            (given,) = operation.operands
            (result,) = operation.results
            if given.type == result.type:
                result.replace_all_uses_with(given)
                operation.erase()
    module.operation.verify()


def operations(root: Any) -> Iterator[Any]:
    """Every operation inside another, in order of execution; outer ones first."""
    for region in root.regions:
        for block in region.blocks:
            for child in list(block.operations):
                yield child.operation
                yield from operations(child.operation)


def wide_type(library: CoreAI, given: Any) -> Any:
    """A type with float32 for float16."""
    ir, handle = library.ir, library.ops.HandleType
    if handle.isinstance(given):
        return handle.get(wide_type(library, handle(given).inner_type))
    if is_half(library, given):
        tensor = ir.RankedTensorType(given)
        return ir.RankedTensorType.get(tensor.shape, ir.F32Type.get(), tensor.encoding)
    return given


def is_half(library: CoreAI, given: Any) -> bool:
    """Whether a type is a float16 tensor."""
    ir = library.ir
    if not ir.RankedTensorType.isinstance(given):
        return False
    return bool(ir.F16Type.isinstance(ir.RankedTensorType(given).element_type))


def widen_signature(library: CoreAI, graph: Any) -> None:
    """Widen a function's arguments and its type."""
    ir = library.ir
    for block in graph.regions[0].blocks:
        for argument in block.arguments:
            argument.set_type(wide_type(library, argument.type))
    function = ir.FunctionType(ir.TypeAttr(graph.attributes["function_type"]).value)
    inputs = [wide_type(library, one) for one in function.inputs]
    results = [wide_type(library, one) for one in function.results]
    graph.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(inputs, results))


def widened(library: CoreAI, value: Any, blobs: Mapping[str, NDArray[np.uint8]]) -> Any:
    """A float16 constant's value as float32.

    Raises:
        ArtifactError: the file does not hold it.
    """
    ir = library.ir
    tensor = wide_type(library, value.type)
    if found := RESOURCE.match(str(value)):
        if found[1] not in blobs:
            raise ArtifactError(f"the program lacks its constant {found[1]}")
        wide = blobs[found[1]].view(np.float16).astype(np.float32)
        return ir.DenseResourceElementsAttr.get_from_buffer(
            wide, f"{found[1]}_wide", tensor, alignment=ALIGNMENT
        )
    dense = ir.DenseElementsAttr(value)
    if dense.is_splat:
        number = ir.FloatAttr(dense.get_splat_value()).value
        return ir.DenseElementsAttr.get_splat(tensor, ir.FloatAttr.get(ir.F32Type.get(), number))
    array = np.ascontiguousarray(np.array(dense), np.float32)
    return ir.DenseElementsAttr.get(array, type=ir.F32Type.get(), shape=array.shape)


def main_of(module: Any) -> Any:
    """The function of a program as read."""
    (main,) = [op for op in module.body.operations if op.operation.name == "coreai.graph"]
    return main


def decoding(module: Any) -> list[Any]:
    """The operations that decode weights."""
    found = [op for op in operations(module.operation) if op.name in DECODING]
    inner = {
        operand.owner for op in found for operand in op.operands if operand.owner.name in DECODING
    }
    return [op for op in found if op not in inner]


def decoded_bytes(library: CoreAI, module: Any) -> int:
    """Bytes of all decoded weights, as float32."""
    ranked = library.ir.RankedTensorType
    return sum(4 * math.prod(ranked(op.results[0].type).shape) for op in decoding(module))


def clone(library: CoreAI, operation: Any, before: Any = None) -> Any:
    """A copy of an operation, and of all that it is computed from, here or before another."""
    at = library.ir.InsertionPoint(before) if before is not None else None
    copy = operation.clone(ip=at)
    for place, operand in enumerate(operation.operands):
        copy.operands[place] = clone(library, operand.owner, copy).results[0]
    return copy


def split(library: CoreAI, module: Any) -> list[str]:
    """Move what decodes weights to a function ``weights``; inside the program's context.

    Returns:
        The names of its results, and of the inputs that ``main`` has now in addition.
    """
    ir, found = library.ir, decoding(module)
    main = main_of(module)
    with ir.InsertionPoint(module.body):
        graph = library.graph_type(WEIGHTS, [], [])
    results, attributes = [], list(main.arg_attrs)
    for number, operation in enumerate(found):
        name = f"weight_{number}"
        with graph.block:
            copy = clone(library, operation)
        results.append((name, copy.results[0]))
        argument = main.entry_block.add_argument(operation.results[0].type, ir.Location.unknown())
        operation.results[0].replace_all_uses_with(argument)
        operation.erase()
        attributes.append(ir.DictAttr.get({"coreai.name": ir.StringAttr.get(name)}))
    graph.outputs_spec = results
    inputs = [argument.type for argument in main.entry_block.arguments]
    main.function_type = ir.TypeAttr.get(ir.FunctionType.get(inputs, list(main.type.results)))
    main.arg_attrs = attributes
    module.operation.verify()
    return [name for name, _ in results]
