"""coreai-core, with the parts of it that are not public; pinned, because they are used.

``coreai._compiler`` (the MLIR bindings, which Apple means to export again), the serialization, and
the loading of a lowered program. Locations are left out: coreai-core's own builder records the name
and line of the calling file in every program.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import RuntimeMissingError
from exporters.coreai.planning import INSTALL

__all__ = ["COREAI", "CoreAI", "Dim", "Loaded", "Value"]

COREAI = "1.0.0b3"
OS_VERSION = "v27"
BYTECODE = 6  # version of MLIR's bytecode, as coreai-core writes it

Value = Any  # the bindings' types are not public
Dim = int | None  # None: known only when the program runs


class CoreAI:
    """The imported coreai-core.

    Attributes:
        ops: the dialect's operations.
        ir: the MLIR bindings.

    Raises:
        RuntimeMissingError: it is not installed, or in another version.
    """

    def __init__(self) -> None:
        try:
            import coreai.authoring  # first: importing the dialect alone is circular
            from coreai._compiler import ir
            from coreai._compiler.dialects import coreai as ops
        except ImportError as error:
            raise RuntimeMissingError("a Core AI bundle needs coreai-core", hint=INSTALL) from error
        from coreai import _version

        if _version.__version__ != COREAI:
            raise RuntimeMissingError(
                f"coreai-core {_version.__version__} is installed, packlight uses {COREAI} (and "
                "entry points of it that are not public)",
                hint=INSTALL,
            )
        self.ops: Any = ops
        self.ir: Any = ir
        self.graph_type: Any = coreai.authoring.graph_builder.GraphOp

    @contextmanager
    def program(self) -> Iterator[Any]:
        """Build a program in the ``with`` block: operations are appended to it. Apple's rewrite
        runs at the end, which makes states of the caches.

        Yields:
            The MLIR module.
        """
        from coreai._compiler._mlir_libs._coreaiIR._bindings import compiler

        with self.context():
            module = self.ir.Module.create()
            with self.ir.InsertionPoint(module.body):
                yield module
            compiler.run_pre_compilation_rewrite(module=module)
            module.operation.verify()

    @contextmanager
    def context(self) -> Iterator[Any]:
        """A fresh context with Core AI's dialects, and no locations."""
        from coreai._compiler.context import Context

        with Context()._mlir_context as context, self.ir.Location.unknown():
            yield context

    # --- types and constants --------------------------------------------------------------------

    def element(self, dtype: str) -> Any:
        """The type of an element: ``fp16``, ``fp32``, ``int4``, ``uint3`` …"""
        if dtype.startswith("fp"):
            return {"fp16": self.ir.F16Type, "fp32": self.ir.F32Type}[dtype].get()
        bits = int(dtype.lstrip("uint"))
        integer = self.ir.IntegerType
        return integer.get_unsigned(bits) if dtype[0] == "u" else integer.get_signed(bits)

    def tensor(self, dtype: str, shape: Sequence[Dim]) -> Any:
        """The type of a tensor."""
        ranked = self.ir.RankedTensorType
        sizes = [ranked.get_dynamic_size() if size is None else size for size in shape]
        return ranked.get(sizes, self.element(dtype))

    def stored(
        self, name: str, dtype: str, shape: Sequence[int], data: NDArray[np.uint8], align: int
    ) -> Value:
        """A constant whose bytes are referenced, not copied, and named in the file.

        Args:
            data: uint8, one-dimensional; must stay until the program is saved.
            align: of the bytes, here and in the file.
        """
        tensor = self.tensor(dtype, shape)
        resource = self.ir.DenseResourceElementsAttr
        value = resource.get_from_buffer(data, name, tensor, alignment=align)
        return self.ops.ConstantOp(value=value).result

    def zeros(self, dtype: str, shape: Sequence[int]) -> Value:
        """A constant of zeros, which takes no bytes."""
        element = self.element(dtype)
        float_type = dtype.startswith("fp")
        zero = (
            self.ir.FloatAttr.get(element, 0.0)
            if float_type
            else self.ir.IntegerAttr.get(element, 0)
        )
        tensor = self.tensor(dtype, shape)
        value = self.ir.DenseElementsAttr.get_splat(tensor, zero)
        return self.ops.ConstantOp(value=value).result

    # --- files ------------------------------------------------------------------------------------

    def save(self, module: Any, path: Path) -> None:
        """Write a program as versioned bytecode; large constants are copied from where they are."""
        from coreai._compiler._mlir_libs._coreaiIR._bindings.compiler import (
            serialize_module_to_bytecode,
        )
        from coreai._compiler._mlir_libs._coreaiIR._bindings.mlir import clone_module
        from coreai.runtime import _AIModelAsset

        serialize_module_to_bytecode(
            module=clone_module(module=module),
            package_path=path,
            dialect_version=_AIModelAsset._dialect_version_for_os(OS_VERSION),
            bytecode_version=BYTECODE,
        )

    def read(self, path: Path) -> Any:
        """A program from its bytecode; inside ``context``."""
        from coreai._compiler._mlir_libs._coreaiIR._bindings.compiler import (
            load_module_from_bytecode,
        )

        return load_module_from_bytecode(context=self.ir.Context.current, path=path)

    def lower(self, module: Any, folder: Path) -> None:
        """Compile a program for Apple's CPU runtime, into ``folder``; the module is used up."""
        from coreai._compiler._mlir_libs._coreaiIR._bindings.compiler import (
            compile_to_binary,
            serialize_module,
        )

        compile_to_binary(module=module, output_directory=folder, enable_debug_info=False)
        serialize_module(module=module, path=folder / "main-universal.odix")


class Loaded:
    """A lowered program in Apple's CPU runtime.

    Args:
        folder: of ``CoreAI.lower``, which must stay.
    """

    def __init__(self, folder: Path) -> None:
        from coreai.runtime import AIModel, NDArray

        self._array, self._loop = NDArray, asyncio.new_event_loop()
        self._model: Any = self._loop.run_until_complete(AIModel.load(path=folder))
        self._functions: dict[str, Any] = {}

    def array(self, values: NDArray[Any]) -> Any:
        """An array of the runtime, which holds a copy."""
        return self._array(values)

    def run(
        self, function: str, inputs: Mapping[str, Any], state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Run a function; the arrays of ``state`` change in place."""
        if function not in self._functions:
            self._functions[function] = self._model.load_function(function)
        call = self._functions[function](dict(inputs), state=dict(state))
        return dict(self._loop.run_until_complete(call))

    def close(self) -> None:
        """Free the program."""
        self._functions.clear()
        self._model = None
        self._loop.close()
