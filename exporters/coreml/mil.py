"""Parses a saved Core ML program to plain Python: functions, operations, typed values, weights.

An ``.mlpackage`` is a folder: a manifest, a protobuf ``model.mlmodel`` (Core ML's ``Model.proto``,
with the program in MIL, ``MIL.proto``) and ``weights/weight.bin``. This module reads the graph and
locates the weights (``blobs``); it computes nothing. Only coremltools' generated protobuf modules
are imported, by their path: its ``__init__`` takes seconds.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import numpy as np

from compress.errors import ArtifactError, RuntimeMissingError
from compress.files import LARGEST_GRAPH, read_bounded
from compress.grids import Array
from exporters.coreml.blobs import BITS, DATA_TYPES, Blobs, Packed

__all__ = [
    "Function",
    "Operation",
    "Program",
    "TensorSpec",
    "TensorType",
    "read_package",
]

# Field of an immediate value in the graph, by type; other types are packed bytes.
IMMEDIATES: dict[str, Any] = {
    "floats": np.dtype("<f4"),
    "doubles": np.dtype("<f8"),
    "ints": np.dtype("<i4"),
    "longInts": np.dtype("<i8"),
    "bools": np.dtype("?"),
}


@dataclass(frozen=True)
class TensorType:
    """The declared type of a value; None for a dimension that is known only at run time."""

    dtype: str
    shape: tuple[int | None, ...]
    state: bool = False


@dataclass(frozen=True)
class TensorSpec:
    """An input, an output or a state of a function.

    Attributes:
        dtype: MIL's name: ``fp16``, ``fp32``, ``int32``.
        shape: None where flexible.
        ranges: lowest and highest size of every dimension (highest None: no limit).
        shapes: the only shapes allowed, when the model enumerates them.
    """

    dtype: str
    shape: tuple[int | None, ...]
    ranges: tuple[tuple[int, int | None], ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()


Value = Packed | str


@dataclass(frozen=True)
class Operation:
    """One operation of a block.

    Attributes:
        kind: the operator, e.g. ``linear``.
        inputs: parameter → names of the values bound to it (most have one).
        literals: parameter → inline constant.
        outputs: names and declared types.
        value: of a ``const``.
    """

    kind: str
    inputs: Mapping[str, tuple[str, ...]]
    literals: Mapping[str, Value]
    outputs: tuple[tuple[str, TensorType], ...]
    value: Value | None = None

    @property
    def name(self) -> str:
        """The name of the first output, unique in its function."""
        return self.outputs[0][0] if self.outputs else self.kind


@dataclass(frozen=True)
class Function:
    """A function of the program, with its only block."""

    name: str
    opset: str
    inputs: Mapping[str, TensorSpec]
    states: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Program:
    """A parsed package.

    Attributes:
        specification_version: 9 for iOS 18.
        functions: by name; ``default_function`` is run by default.
        metadata: the package's keys (``shortDescription``, ``author``, user-defined ones).
    """

    specification_version: int
    functions: Mapping[str, Function]
    default_function: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    def function(self, name: str) -> Function:
        """A function of the program.

        Raises:
            ArtifactError: no such function.
        """
        if name not in self.functions:
            known = ", ".join(sorted(self.functions))
            raise ArtifactError(f"the package has no function {name!r}", hint=f"it has: {known}")
        return self.functions[name]


def read_package(path: Path) -> Program:
    """Parse an ``.mlpackage``; weights are memory-mapped, not read.

    Args:
        path: the package folder.

    Raises:
        ArtifactError: not a package, damaged, or not an ML program.
        RuntimeMissingError: coremltools is not installed.
    """
    model_path = _model_file(path)
    model = _proto("Model_pb2").Model()
    try:
        model.ParseFromString(read_bounded(model_path, LARGEST_GRAPH))
    except Exception as error:  # DecodeError; its class depends on the protobuf build
        raise ArtifactError(f"{model_path} is not a Core ML model: {error}") from error
    if not model.HasField("mlProgram"):
        raise ArtifactError(f"{path} is a Core ML model but not an ML program")
    description = model.description
    described = {entry.name: entry for entry in description.functions}
    default = description.defaultFunctionName or "main"
    blobs = Blobs(model_path.parent)
    functions = {
        name: _function(name, function, described.get(name, description), blobs)
        for name, function in model.mlProgram.functions.items()
    }
    details = description.metadata
    metadata = {
        key: getattr(details, key)
        for key in ("shortDescription", "versionString", "author", "license")
        if getattr(details, key)
    } | dict(details.userDefined)
    return Program(model.specificationVersion, functions, default, metadata)


def _model_file(package: Path) -> Path:
    manifest_path = package / "Manifest.json"
    if not manifest_path.is_file():
        raise ArtifactError(f"{package} is not an .mlpackage (it has no Manifest.json)")
    try:
        manifest = json.loads(read_bounded(manifest_path).decode("utf-8"))
        root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
        relative = PurePosixPath(root["path"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{manifest_path} is damaged: {error!r}") from error
    model_path = package / "Data" / relative
    if ".." in relative.parts or relative.is_absolute() or not model_path.is_file():
        raise ArtifactError(f"{package} names a model that is not there: {relative}")
    return model_path


def _proto(module: str) -> Any:
    """A generated protobuf module of coremltools, without importing coremltools itself.

    Both copies register the same messages in protobuf's pool, so a later ``import coremltools``
    in the same process uses the same classes.
    """
    package = "coremltools.proto"
    if package not in sys.modules:
        package = "exporters.coreml._proto"
        if package not in sys.modules:
            _load_proto_package(package)
    return importlib.import_module(f"{package}.{module}")


def _load_proto_package(name: str) -> None:
    found = importlib.util.find_spec("coremltools")  # a top-level name: finds, does not import
    if found is None or not found.submodule_search_locations:
        raise RuntimeMissingError(
            "reading a Core ML package needs coremltools", hint="pip install coremltools"
        )
    package = ModuleType(name)
    package.__path__ = [str(Path(found.submodule_search_locations[0]) / "proto")]
    sys.modules[name] = package


def _function(name: str, function: Any, description: Any, blobs: Blobs) -> Function:
    blocks = function.block_specializations
    if function.opset not in blocks:
        raise ArtifactError(f"function {name!r} has no block for its opset {function.opset!r}")
    block = blocks[function.opset]
    types = {entry.name: _tensor_type(entry.type, entry.name) for entry in function.inputs}
    operations = tuple(_operation(proto, blobs) for proto in block.operations)
    produced = types | {n: t for operation in operations for n, t in operation.outputs}
    missing = [n for n in block.outputs if n not in produced]
    if missing:
        raise ArtifactError(f"function {name!r} returns {missing[0]!r}, which nothing computes")
    flexible = {feature.name: feature for feature in description.input}
    return Function(
        name=name,
        opset=function.opset,
        inputs={n: _spec(t, flexible.get(n)) for n, t in types.items() if not t.state},
        states={n: _spec(t, None) for n, t in types.items() if t.state},
        outputs={n: _spec(produced[n], None) for n in block.outputs},
        operations=operations,
    )


def _spec(declared: TensorType, feature: Any) -> TensorSpec:
    """The declared type, narrowed by the feature's entry in the model's description."""
    ranges: tuple[tuple[int, int | None], ...] = tuple(
        (0, None) if size is None else (size, size) for size in declared.shape
    )
    shapes: tuple[tuple[int, ...], ...] = ()
    if feature is not None:
        array = feature.type.multiArrayType
        if array.shapeRange.sizeRanges:
            ranges = tuple(
                (r.lowerBound, None if r.upperBound < 0 else r.upperBound)
                for r in array.shapeRange.sizeRanges
            )
        shapes = tuple(tuple(s.shape) for s in array.enumeratedShapes.shapes)
    return TensorSpec(declared.dtype, declared.shape, ranges, shapes)


def _operation(proto: Any, blobs: Blobs) -> Operation:
    inputs: dict[str, tuple[str, ...]] = {}
    literals: dict[str, Value] = {}
    for parameter, argument in proto.inputs.items():
        names = [binding.name for binding in argument.arguments if binding.HasField("name")]
        if len(names) == len(argument.arguments):
            inputs[parameter] = tuple(names)
        elif len(argument.arguments) == 1:
            literals[parameter] = _value(argument.arguments[0].value, blobs)
        else:
            raise ArtifactError(f"op {proto.type!r}: names and constants mixed in {parameter!r}")
    outputs = tuple((out.name, _tensor_type(out.type, out.name)) for out in proto.outputs)
    value = None
    # iOS 16's compressed constants keep their parameters as attributes, not as inputs.
    for attribute, held in proto.attributes.items():
        if proto.type == "const" and attribute == "val":
            value = _value(held, blobs)
        elif proto.type.startswith("constexpr_") and attribute != "name":
            literals[attribute] = _value(held, blobs)
    return Operation(proto.type, inputs, literals, outputs, value)


def _tensor_type(proto: Any, name: str) -> TensorType:
    kind = proto.WhichOneof("type")
    if kind == "stateType":
        inner = _tensor_type(proto.stateType.wrappedType, name)
        return TensorType(inner.dtype, inner.shape, state=True)
    if kind != "tensorType":
        raise ArtifactError(f"{name!r} is a {kind}; only tensors are supported")
    tensor = proto.tensorType
    if tensor.dataType not in DATA_TYPES:
        raise ArtifactError(f"{name!r} has MIL data type {tensor.dataType}, which is not supported")
    shape = tuple(
        int(d.constant.size) if d.WhichOneof("dimension") == "constant" else None
        for d in tensor.dimensions
    )
    return TensorType(DATA_TYPES[tensor.dataType], shape)


def _value(proto: Any, blobs: Blobs) -> Value:
    declared = _tensor_type(proto.type, "a constant")
    shape = tuple(int(size) for size in declared.shape if size is not None)
    if len(shape) != len(declared.shape):
        raise ArtifactError(f"a constant of {declared.dtype} has an open shape {declared.shape}")
    if proto.WhichOneof("value") == "blobFileValue":
        blob = proto.blobFileValue
        return blobs.read(blob.fileName, blob.offset, declared.dtype, shape)
    tensor = proto.immediateValue.tensor
    field_name = tensor.WhichOneof("value")
    if field_name == "strings":
        return _text(tensor.strings.values)
    if field_name == "bytes":
        raw = np.frombuffer(bytearray(tensor.bytes.values), dtype=np.uint8)
    elif field_name in IMMEDIATES:
        values: Array = np.array(getattr(tensor, field_name).values, IMMEDIATES[field_name])
        bits = BITS[declared.dtype]
        if bits < values.itemsize * 8:  # int16 and uint16 are stored as int32
            values = values.astype(f"<i{bits // 8}")
        raw = values.view(np.uint8)
    else:
        raise ArtifactError(f"a constant of {declared.dtype} {shape} holds no value")
    if raw.size != (math.prod(shape) * BITS[declared.dtype] + 7) // 8:
        raise ArtifactError(f"a constant of {declared.dtype} {shape} has {raw.size} bytes")
    return Packed(declared.dtype, shape, raw)


def _text(values: Iterable[Any]) -> str:
    """The string of a string constant."""
    texts = [v.decode() if isinstance(v, bytes) else str(v) for v in values]
    if len(texts) != 1:
        raise ArtifactError(f"a string constant holds {len(texts)} strings; one is supported")
    return texts[0]
