"""Runs a saved Core ML program on any machine, with torch's CPU kernels.

Core ML itself runs on Apple's systems only. The evaluator executes the written package, graph and
weights, so that an export can be compared with its model on any machine.

Modelled: the semantics of every operation, compressed constants bit for bit, states that persist
between calls, flexible shapes, and (``fp16=True``) the rounding to float16 of every value that the
program declares as fp16, between operations and in the states. Not modelled: which unit executes an
operation, the order of sums and the rounding *inside* an operation (a matrix product or softmax
runs in float32 here, and is rounded once at its end), the ranges of 8- and 16-bit integer
arithmetic (``cast`` wraps, other operations compute in int32), speed, and memory. With
``fp16=False`` nothing is rounded, so that graph and weights are tested without float16's noise:
states are then float32, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import ArtifactError, first_line
from exporters.coreml.constexpr import CONSTEXPR, Constant, constants_of, decode
from exporters.coreml.mil import Operation, Program, TensorSpec, read_package
from exporters.coreml.mil_moves import MOVES
from exporters.coreml.mil_ops import OPS
from exporters.coreml.steps import (
    Held,
    Step,
    check_overflow,
    check_type,
    decoded,
    has_weight,
    is_constant,
    only_owner,
    refuse_unknown,
    updated_state,
    write_state,
)
from exporters.coreml.weights import (
    Weight,
    gather_rows,
    linear_by_slabs,
    place_of,
    share_cache,
    widen,
)

__all__ = ["Evaluator"]

SMALL = 1 << 16  # elements of a constant that is decoded once, at most
GIB = 1 << 30
VARIADIC = ("values",)

FAULTS = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)  # of an operation

Run = tuple[dict[str, Tensor], dict[str, Tensor]]  # values and states of a call


class Evaluator:
    """A function of a Core ML package, ready to run.

    Args:
        package: the ``.mlpackage`` folder.
        function: which function, for a package with several.
        fp16: round every fp16 value after each operation (see the module).
        threads: torch threads during ``predict``; 0 leaves torch's setting.
        cache_bytes: memory for decoded weights. Weights that do not fit are decoded for each
            use, a slab of rows at a time: slower, but a model of any size runs.
        small: constants of up to this many elements are decoded once, when loading.
        like: an evaluator of another function of the package, whose decoded weights are shared.

    Attributes:
        inputs, states, outputs: name → dtype and shape (None where flexible, with ranges).
        threads: of ``predict``; may be changed.

    Raises:
        ArtifactError: not a package, damaged, or with an unsupported operation.
        RuntimeMissingError: coremltools (for its protobuf modules) is not installed.
    """

    def __init__(
        self,
        package: Path,
        *,
        function: str = "main",
        fp16: bool = False,
        threads: int = 0,
        cache_bytes: int = GIB,
        small: int = SMALL,
        like: Evaluator | None = None,
    ) -> None:
        self._program: Program = like._program if like else read_package(Path(package))
        self._weights: dict[tuple[int, tuple[int, ...]], Weight] = like._weights if like else {}
        program = self._program
        self._function = program.function(function)
        self.metadata = program.metadata
        self.inputs: Mapping[str, TensorSpec] = self._function.inputs
        self.states: Mapping[str, TensorSpec] = self._function.states
        self.outputs: Mapping[str, TensorSpec] = self._function.outputs
        self._fp16 = fp16
        self.threads = threads
        self._small = small
        for operation in self._function.operations:
            refuse_unknown(operation)
        self._constants = self._load_constants()
        self._steps = self._prepare()
        self._parts = [(key, list(steps)) for key, steps in groupby(self._steps, has_weight)]
        share_cache(self._scanned(), cache_bytes)

    def make_state(self) -> dict[str, Tensor]:
        """Fresh states: zeros, float16 with ``fp16=True``, else float32."""
        dtype = torch.float16 if self._fp16 else torch.float32
        return {
            name: torch.zeros([int(n or 0) for n in spec.shape], dtype=dtype)
            for name, spec in self.states.items()
        }

    def predict(
        self, inputs: Mapping[str, NDArray[Any]], state: dict[str, Tensor] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Run the function once.

        Args:
            inputs: an array for every input, of its shape.
            state: from ``make_state``; updated by the call. Needed when the function has states.

        Returns:
            The outputs: float32 for floats (rounded to float16 where declared so, with
            ``fp16=True``), int32 for integers, bool.

        Raises:
            ArtifactError: inputs that do not match; an operation that fails or returns another
                shape than declared.
        """
        (outputs,) = self.predict_each([(inputs, state)])
        return outputs

    def predict_each(
        self, calls: Sequence[tuple[Mapping[str, NDArray[Any]], dict[str, Tensor] | None]]
    ) -> list[dict[str, NDArray[Any]]]:
        """``predict`` of several inputs, each with a state of its own; every large constant is
        decoded once.

        Operations with a large constant run for all calls before any goes on; those between two of
        them run call by call, so that only one call has their values at a time.
        """
        runs: list[Run] = [
            ({name: self._input(name, inputs) for name in self.inputs}, self._check_state(state))
            for inputs, state in calls
        ]
        for name in (name for inputs, _ in calls for name in inputs):
            if name not in self.inputs:
                raise ArtifactError(f"the model has no input {name!r}")
        with torch.no_grad(), _threads(self.threads):
            for together, steps in self._parts:
                for step in steps if together else ():
                    self._run_together(step, runs)
                for values, states in () if together else runs:
                    for step in steps:
                        self._run(step, values, states)
            return [
                {name: _to_array(self._value(name, values)) for name in self.outputs}
                for values, _ in runs
            ]

    # --- loading ----------------------------------------------------------------------------

    def _load_constants(self) -> dict[str, Held]:
        """The constants used by operations and outputs, without those inside other constants."""
        needed = {
            name
            for operation in self._function.operations
            if operation.kind not in CONSTEXPR
            for names in operation.inputs.values()
            for name in names
        }
        needed.update(self.outputs)
        trees = constants_of(self._function.operations)
        return {name: self._held(tree) for name, tree in trees.items() if name in needed}

    def _held(self, tree: Constant | str) -> Held:
        if isinstance(tree, str):
            return tree
        if tree.size > self._small and tree.dtype.startswith("fp"):
            place = place_of(tree)
            if place not in self._weights:
                self._weights[place] = Weight(tree)
            return self._weights[place]
        tensor = decode(tree)
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            return tensor
        return tensor.to(torch.int32)

    def _prepare(self) -> list[Step]:
        computed = [o for o in self._function.operations if not is_constant(o)]
        last_use: dict[str, int] = {}
        for i, operation in enumerate(computed):
            for names in operation.inputs.values():
                last_use.update(dict.fromkeys(names, i))
            last_use.update({name: i for name, _ in operation.outputs if name not in last_use})
        steps = []
        for i, operation in enumerate(computed):
            constants: dict[str, Held] = {
                parameter: self._held(value) for parameter, value in operation.literals.items()
            }
            computed_inputs: dict[str, tuple[str, ...]] = {}
            for parameter, bound in operation.inputs.items():
                if parameter not in VARIADIC and bound[0] in self._constants:
                    constants[parameter] = self._constants[bound[0]]
                else:
                    computed_inputs[parameter] = bound
            involved = {n for bound in computed_inputs.values() for n in bound}
            involved.update(name for name, _ in operation.outputs)
            frees = tuple(n for n in involved if last_use[n] == i and n not in self.outputs)
            updates = updated_state(computed, i)
            steps.append(Step(operation, constants, computed_inputs, frees, updates))
        return steps

    def _scanned(self) -> Iterator[Weight]:
        """Weights that every run uses completely: all except those that a gather reads rows of."""
        for step in self._steps:
            for parameter, held in step.constants.items():
                if isinstance(held, Weight) and (step.operation.kind, parameter) != ("gather", "x"):
                    yield held

    # --- running ----------------------------------------------------------------------------

    def _input(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Tensor:
        spec = self.inputs[name]
        if name not in inputs:
            raise ArtifactError(f"the input {name!r} is missing")
        array = np.asarray(inputs[name])
        fits = len(array.shape) == len(spec.shape) and all(
            low <= size and (high is None or size <= high)
            for size, (low, high) in zip(array.shape, spec.ranges, strict=True)
        )
        if not fits or (spec.shapes and array.shape not in spec.shapes):
            raise ArtifactError(
                f"the input {name!r} has shape {list(array.shape)}, the model takes "
                f"{_shape_text(spec)}"
            )
        if spec.dtype.startswith("fp"):
            kind: Any = np.float32
        else:
            kind = np.bool_ if spec.dtype == "bool" else np.int32
            if array.dtype.kind == "f":
                raise ArtifactError(f"the input {name!r} takes {spec.dtype}, not {array.dtype}")
        return self._round(torch.from_numpy(np.array(array, dtype=kind)), spec.dtype)

    def _check_state(self, state: dict[str, Tensor] | None) -> dict[str, Tensor]:
        state = {} if state is None else state
        for name, spec in self.states.items():
            if name not in state:
                raise ArtifactError(f"the model keeps a state {name!r}: pass make_state()")
            if tuple(state[name].shape) != spec.shape:
                shape = list(state[name].shape)
                raise ArtifactError(f"the state {name!r} has shape {shape}, not {spec.shape}")
        return state

    def _run(self, step: Step, values: dict[str, Tensor], states: dict[str, Tensor]) -> None:
        operation = step.operation
        try:
            if operation.kind == "read_state":
                results: Any = states[operation.inputs["input"][0]]
            elif operation.kind == "write_state":
                data = self._argument(step, "data", values)
                write_state(states, operation.inputs["input"][0], data)
                results = ()
            else:
                results = self._compute(step, values, states)
        except FAULTS as error:
            raise _located(operation, error) from error
        self._store(step, results, values)

    def _run_together(self, step: Step, runs: Sequence[Run]) -> None:
        """Run an operation with large constants for all calls."""
        try:
            kind, found = step.operation.kind, list[Any]()
            if kind == "linear" and list(step.names) == ["x"] and len(runs) > 1:
                inputs = [widen(self._argument(step, "x", values)) for values, _ in runs]
                rows = torch.cat([x.flatten(0, -2) for x in inputs])
                constants: dict[str, Any] = dict(step.constants)
                whole = linear_by_slabs(OPS[kind], rows, **constants)
                parts = torch.split(whole, [x.shape[:-1].numel() for x in inputs])
                found += (p.view(*x.shape[:-1], -1) for p, x in zip(parts, inputs, strict=True))
            elif kind not in ("linear", "gather") and len(runs) > 1:
                step = replace(step, constants=decoded(step.constants))
        except FAULTS as error:
            raise _located(step.operation, error) from error
        for index, (values, states) in enumerate(runs):
            if found:
                self._store(step, found[index], values)
            else:
                self._run(step, values, states)

    def _store(self, step: Step, results: Any, values: dict[str, Tensor]) -> None:
        """Round the results of an operation and keep them; drop what is not needed after it."""
        operation = step.operation
        results = (results,) if isinstance(results, Tensor) else tuple(results)
        for (name, declared), result in zip(operation.outputs, results, strict=True):
            check_type(operation, declared, result)
            values[name] = rounded = self._round(result, declared.dtype)
            if rounded is not result and torch.isinf(rounded).any():
                check_overflow(operation, result)
        for name in step.frees:
            values.pop(name, None)

    def _compute(
        self, step: Step, values: dict[str, Tensor], states: dict[str, Tensor]
    ) -> Tensor | tuple[Tensor, ...]:
        kind = step.operation.kind
        function = OPS[kind]
        arguments = {p: self._argument(step, p, values) for p in step.operation.inputs}
        arguments |= {p: v for p, v in step.constants.items() if p not in arguments}
        if kind == "linear" and isinstance(arguments["weight"], Weight):
            return linear_by_slabs(function, **arguments)
        if kind == "conv" and isinstance(arguments["weight"], Weight):
            return linear_by_slabs(function, **arguments, axis=1)
        if kind == "gather" and isinstance(arguments["x"], Weight):
            axis = arguments.get("axis", 0)
            if int(axis) % len(arguments["x"].shape) == 0:
                return gather_rows(function, **arguments)
        if kind == "slice_update" and step.updates is not None:
            state = states[step.updates]
            arguments["in_place"] = only_owner(step, values, arguments["x"], state)
        for parameter, value in arguments.items():
            if isinstance(value, Weight):
                arguments[parameter] = value.whole()
        if kind not in MOVES:
            arguments = {p: widen(v) for p, v in arguments.items()}
        result: Tensor | tuple[Tensor, ...] = function(**arguments)
        return result

    def _argument(self, step: Step, parameter: str, values: Mapping[str, Tensor]) -> Any:
        if parameter in step.constants:
            return step.constants[parameter]
        names = step.names[parameter]
        if parameter in VARIADIC:
            return [self._value(name, values) for name in names]
        return self._value(names[0], values)

    def _value(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        held = self._constants.get(name)
        if held is None:
            return values[name]
        if isinstance(held, str):
            raise TypeError(f"{name!r} is a string")
        return held.whole() if isinstance(held, Weight) else held

    def _round(self, value: Tensor, dtype: str) -> Tensor:
        if self._fp16 and dtype == "fp16" and value.is_floating_point():
            return value.to(torch.float16)
        return value


def _located(operation: Operation, error: Exception) -> ArtifactError:
    """What an operation raised, with its name."""
    return ArtifactError(f"op {operation.kind!r} {operation.name!r}: {first_line(error)}")


def _to_array(value: Tensor) -> NDArray[Any]:
    return np.array(widen(value).contiguous().numpy())


def _shape_text(spec: TensorSpec) -> str:
    if spec.shapes:
        return " or ".join(str(list(shape)) for shape in spec.shapes)
    sizes = [str(low) if low == high else f"{low}..{high or ''}" for low, high in spec.ranges]
    return f"[{', '.join(sizes)}]"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count:
            torch.set_num_threads(before)
