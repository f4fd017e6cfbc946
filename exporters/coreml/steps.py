"""The operations of a Core ML program, prepared for the evaluator, and the checks around each."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import ArtifactError
from exporters.coreml.constexpr import CONSTEXPR
from exporters.coreml.mil import Operation, TensorType
from exporters.coreml.mil_ops import OPS
from exporters.coreml.weights import Weight

__all__ = [
    "Held",
    "Step",
    "check_overflow",
    "check_type",
    "decoded",
    "has_weight",
    "is_constant",
    "only_owner",
    "refuse_unknown",
    "updated_state",
    "write_state",
]

OTHER_OPS = ("const", "read_state", "write_state")

Held = Tensor | str | Weight


@dataclass(frozen=True)
class Step:
    """A prepared operation: its function, its inputs, and the values that are freed after it."""

    operation: Operation
    constants: Mapping[str, Held]
    names: Mapping[str, tuple[str, ...]]
    frees: tuple[str, ...]
    updates: str | None = None


def has_weight(step: Step) -> bool:
    """Whether an operation has a large constant."""
    return any(isinstance(held, Weight) for held in step.constants.values())


def decoded(constants: Mapping[str, Held]) -> dict[str, Held]:
    """Constants with the large ones decoded."""
    return {p: held.whole() if isinstance(held, Weight) else held for p, held in constants.items()}


def check_overflow(operation: Operation, result: Tensor) -> None:
    """Refuse a finite result that float16 cannot hold; Core ML would go on with infinity.

    Raises:
        ArtifactError: with the operation's name.
    """
    largest = result[torch.isfinite(result)].abs().max() if result.isfinite().any() else 0
    if largest >= 65520:  # rounds to infinity
        raise ArtifactError(
            f"op {operation.kind!r} {operation.name!r}: {float(largest):,.0f} is more than float16 "
            "holds (65,504)"
        )


def is_constant(operation: Operation) -> bool:
    return operation.kind == "const" or operation.kind in CONSTEXPR


def refuse_unknown(operation: Operation) -> None:
    kind = operation.kind
    if kind in OTHER_OPS or kind in CONSTEXPR:
        return
    if kind not in OPS:
        raise ArtifactError(
            f"unknown op {kind!r} ({operation.name!r})",
            hint="the evaluator runs decoders; on macOS, Core ML itself runs any program",
        )
    known = inspect.signature(OPS[kind]).parameters
    for parameter in [*operation.inputs, *operation.literals]:
        if parameter not in known or parameter == "in_place":
            raise ArtifactError(f"op {kind!r} ({operation.name!r}): unknown input {parameter!r}")


def updated_state(operations: list[Operation], i: int) -> str | None:
    """The state that a slice_update's result goes to, if nothing touches the state before.

    Such an update can be done in the state's memory, as Core ML does; otherwise every layer would
    copy the whole cache.
    """
    if operations[i].kind != "slice_update":
        return None
    touched = set()
    for later in operations[i + 1 :]:
        if later.kind not in ("read_state", "write_state"):
            continue
        state = later.inputs["input"][0]
        if later.kind == "write_state" and later.inputs["data"][0] == operations[i].name:
            return None if state in touched else state
        touched.add(state)
    return None


def only_owner(step: Step, values: Mapping[str, Tensor], x: Tensor, state: Tensor) -> bool:
    """Whether ``x`` is the state's memory and no other value that is still needed shares it."""
    memory = x.untyped_storage().data_ptr()
    if memory != state.untyped_storage().data_ptr() or x.shape != state.shape:
        return False
    name = step.names["x"][0]
    if name not in step.frees:
        return False
    others = (value for other, value in values.items() if other != name)
    return all(other.untyped_storage().data_ptr() != memory for other in others)


def write_state(states: dict[str, Tensor], name: str, data: Tensor) -> None:
    state = states[name]
    if data.untyped_storage().data_ptr() != state.untyped_storage().data_ptr():
        # A new tensor: the old one may still be used under another name.
        states[name] = data.to(state.dtype, copy=True).reshape(state.shape)
    elif data.shape != state.shape or data.stride() != state.stride():
        states[name] = data.clone().reshape(state.shape)


FAMILIES = {torch.bool: "bo", torch.float16: "fp", torch.float32: "fp"}
DECLARED = {"fp16": "fp", "fp32": "fp", "bool": "bo"}


def check_type(operation: Operation, declared: TensorType, result: Tensor) -> None:
    """Refuse a result of another shape or kind of number than declared.

    Raises:
        ArtifactError: with the operation's name.
    """
    sizes, wanted = tuple(result.shape), declared.shape
    if sizes != wanted:
        fits = len(sizes) == len(wanted) and all(
            want is None or want == size for want, size in zip(wanted, sizes, strict=True)
        )
        if not fits:
            shape = ["?" if n is None else n for n in wanted]
            where = f"op {operation.kind!r} {operation.name!r}"
            raise ArtifactError(f"{where} gives shape {list(sizes)}, declared is {shape}")
    if DECLARED.get(declared.dtype, "int") != FAMILIES.get(result.dtype, "int"):
        where = f"op {operation.kind!r} {operation.name!r}"
        raise ArtifactError(f"{where} gives {result.dtype}, declared is {declared.dtype}")
