"""Decodes Core ML's compressed constants to the values that a runtime computes with.

iOS 18 (and iOS 16) programs keep weights as ``constexpr_*`` operations over packed arrays. Each
is one small function here; ``Compressed`` holds the tree of them, so that a weight is decoded
when it is used, whole or some of its rows. The arithmetic, and where it rounds, is that of
coremltools' own ``decompress`` of each operation; tests hold it to that bit for bit.

Byte tables do the work: for codes of 1, 2, 4 or 8 bits a table has, for each value of a whole
byte, the decoded numbers of all codes in it, so a look-up per byte decodes 8, 4, 2 or 1 weights
(about 1 ns per int4 weight on one core, half of what unpacking and converting costs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import ArtifactError
from exporters.coreml.blobs import BITS, Packed
from exporters.coreml.mil import Operation

__all__ = [
    "CONSTEXPR",
    "Compressed",
    "Constant",
    "can_take_rows",
    "constants_of",
    "decode",
    "take_rows",
    "unpack",
]

Rows = slice | NDArray[np.int64]
"""Rows of a constant: a range with step 1, or their indices."""

TORCH_TYPES = {
    "bool": torch.bool,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "uint32": torch.uint32,
    "uint64": torch.uint64,
}


@dataclass(frozen=True)
class Compressed:
    """A constant that an operation computes from other constants.

    Attributes:
        kind: the operation, ``constexpr_lut_to_dense``.
        inputs: its parameters.
        dtype: of this output.
        shape: of this output.
        output: which output of the operation (the sparse ones have two: mask and values).
    """

    kind: str
    inputs: Mapping[str, Constant | str]
    dtype: str
    shape: tuple[int, ...]
    output: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


Constant = Packed | Compressed


def constants_of(operations: Iterable[Operation]) -> dict[str, Constant | str]:
    """Every constant of a function by name; compressed ones as trees, still packed.

    Raises:
        ArtifactError: a compressed constant with an input that is not constant.
    """
    constants: dict[str, Constant | str] = {}
    for operation in operations:
        if operation.kind == "const":
            if operation.value is None:
                raise ArtifactError(f"op 'const' {operation.name!r} has no value")
            constants[operation.name] = operation.value
        elif operation.kind in CONSTEXPR:
            parts: dict[str, Constant | str] = dict(operation.literals)
            for parameter, (name, *_) in operation.inputs.items():
                if name not in constants:
                    where = f"op {operation.kind!r} {operation.name!r}"
                    raise ArtifactError(f"{where}: {parameter!r} is not a constant")
                parts[parameter] = constants[name]
            for i, (name, declared) in enumerate(operation.outputs):
                shape = tuple(int(n or 0) for n in declared.shape)
                constants[name] = Compressed(operation.kind, parts, declared.dtype, shape, i)
    return constants


def decode(constant: Constant) -> Tensor:
    """The numbers of a constant, in the torch type of its dtype (int4 as int8, uint3 as uint8).

    Raises:
        ArtifactError: its parts do not match, or the operation is unknown.
    """
    if isinstance(constant, Packed):
        return unpack(constant)
    operation = CONSTEXPR.get(constant.kind)
    if operation is None:
        raise ArtifactError(f"unknown op {constant.kind!r} makes a constant")
    try:
        result = operation(**constant.inputs)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise ArtifactError(f"op {constant.kind!r} {constant.shape}: {error}") from error
    tensor = result if isinstance(result, Tensor) else result[constant.output]
    if tuple(tensor.shape) != constant.shape:
        shape = tuple(tensor.shape)
        raise ArtifactError(f"op {constant.kind!r} gives {shape}, declared is {constant.shape}")
    return tensor


def can_take_rows(constant: Constant) -> bool:
    """Whether rows of the constant can be decoded without the others."""
    if isinstance(constant, Packed):
        row_bits = math.prod(constant.shape[1:]) * BITS[constant.dtype]
        return len(constant.shape) > 0 and row_bits > 0 and row_bits % 8 == 0
    rows = ROWWISE.get(constant.kind)
    if rows is None or "vector_axis" in constant.inputs:
        return False
    parts = [part for part in constant.inputs.values() if not isinstance(part, str)]
    return all(len(part.shape) > 0 and can_take_rows(part) for part in parts)


def take_rows(constant: Constant, rows: Rows) -> Constant:
    """The constant with only these rows, still compressed (see ``can_take_rows``)."""
    if isinstance(constant, Packed):
        by_row = constant.raw.reshape(constant.shape[0], -1)[rows]
        shape = (len(by_row), *constant.shape[1:])
        return Packed(constant.dtype, shape, by_row.reshape(-1))
    inputs: dict[str, Constant | str] = {}
    for parameter, part in constant.inputs.items():
        assert not isinstance(part, str)  # can_take_rows
        inputs[parameter] = take_rows(part, _group_rows(rows, constant.shape[0], part.shape[0]))
    first = inputs[ROWWISE[constant.kind]]
    assert not isinstance(first, str)
    shape = (first.shape[0], *constant.shape[1:])
    return Compressed(constant.kind, inputs, constant.dtype, shape, constant.output)


def _group_rows(rows: Rows, total: int, groups: int) -> Rows:
    """Which rows of a scale (or palette) with ``groups`` rows serve ``rows`` of the weight."""
    each = total // groups
    if isinstance(rows, slice):
        if rows.start % each == 0 and rows.stop % each == 0:
            return slice(rows.start // each, rows.stop // each)
        rows = np.arange(rows.start, rows.stop)
    return rows // each


def unpack(packed: Packed) -> Tensor:
    """The stored integers or floats themselves; a view of the file where they are whole bytes."""
    bits = BITS[packed.dtype]
    raw = torch.from_numpy(np.ascontiguousarray(packed.raw))
    if bits >= 8:
        if raw.data_ptr() % (bits // 8):  # an immediate value at an unaligned address
            raw = raw.clone()
        return raw.view(TORCH_TYPES[packed.dtype]).view(packed.shape)
    unit = 3 if bits % 3 == 0 else 1  # bytes that hold whole codes
    raw = torch.nn.functional.pad(raw, (0, -len(raw) % unit))
    places = torch.tensor([1, 256, 65536], dtype=torch.int32)[:unit]
    word: Tensor = (raw.view(-1, unit).to(torch.int32) * places).sum(dim=1, dtype=torch.int32)
    shifts = torch.arange(0, 8 * unit, bits, dtype=torch.int32)
    codes: Tensor = ((word[:, None] >> shifts) & (2**bits - 1)).reshape(-1)[: packed.size]
    kind = torch.uint8
    if packed.dtype.startswith("int"):
        half = 2 ** (bits - 1)
        codes, kind = (codes ^ half) - half, torch.int8
    return codes.to(kind).view(packed.shape)


def blockwise_shift_scale(
    data: Constant, scale: Constant, offset: Constant | None = None
) -> Tensor:
    """``scale * (data - offset)``; scale and offset repeat over blocks of every axis.

    Rounds to the scale's type after the subtraction and after the product.
    """
    scales = decode(scale)
    kind = scales.dtype
    grouped, aligned = _blocks(data.shape, scale.shape)
    if isinstance(data, Packed) and BITS[data.dtype] <= 8:
        values = _byte_lookup(data, _code_values(data.dtype)).view(grouped)
    else:
        values = decode(data).to(kind).to(torch.float32).view(grouped)
    if offset is not None:
        shift = decode(offset)
        values = values - shift.to(torch.float32).view(aligned)
        if shift.dtype == kind:  # whole numbers of 8 bits and less subtract exactly
            values = values.to(kind).to(torch.float32)
    return (values * scales.to(torch.float32).view(aligned)).to(kind).view(data.shape)


def lut_to_dense(
    indices: Constant,
    lut: Constant,
    vector_axis: Constant | None = None,
    shape: Constant | None = None,
) -> Tensor:
    """Palette entries by index; palettes repeat over blocks of every axis.

    Args:
        indices: codes, of the result's shape (divided by the vector along ``vector_axis``).
        lut: ``[*blocks, entries, vector]`` (iOS 16: ``[entries]``).
        vector_axis: the axis that vectors are laid along, when they are longer than 1.
        shape: iOS 16 only: the result's shape, ``indices`` being packed bytes.
    """
    table = decode(lut)
    if shape is not None:
        assert isinstance(indices, Packed)
        bits = int(math.log2(table.numel()))
        sizes = _integers(shape)
        indices = Packed(f"uint{bits}", sizes, indices.raw)
        table = table.view(*(1 for _ in sizes), -1, 1)
    blocks, (entries, vector) = table.shape[:-2], table.shape[-2:]
    per_row_group = math.prod(blocks[1:]) == 1 and vector == 1
    if per_row_group and isinstance(indices, Packed) and entries == 2 ** BITS[indices.dtype]:
        return _byte_lookup(indices, table.reshape(blocks[0], entries))
    codes = decode(indices)
    if vector == 1:
        return _lookup(codes, table.reshape(*blocks, entries))
    if vector_axis is None:
        raise ValueError("a palette of vectors needs vector_axis")
    axis = _integers(vector_axis)[0] % codes.dim()
    parts = [_lookup(codes, table[..., i]) for i in range(vector)]
    return torch.stack(parts, dim=axis + 1).flatten(axis, axis + 1)


def sparse_to_dense(
    nonzero_data: Constant, mask: Constant, shape: Constant | None = None
) -> Tensor:
    """The values where the mask is set, in order, and zeros elsewhere.

    ``shape``: iOS 16 only, the mask being packed bytes.
    """
    if shape is not None:
        assert isinstance(mask, Packed)
        sizes = _integers(shape)
        mask = Packed("uint1", sizes, mask.raw)
    return _scatter(decode(nonzero_data), decode(mask))


def lut_to_sparse(
    indices_mask: Constant,
    indices_nonzero_data: Constant,
    lut: Constant,
    vector_axis: Constant | None = None,
) -> tuple[Tensor, Tensor]:
    """Palette entries of the indices under the mask: the mask (widened) and the values."""
    mask = decode(indices_mask)
    codes = _as_packed(_scatter(decode(indices_nonzero_data), mask))
    dense = lut_to_dense(codes, lut, vector_axis)
    if vector_axis is not None:
        axis = _integers(vector_axis)[0] % mask.dim()
        mask = mask.repeat_interleave(lut.shape[-1], dim=axis)
    return mask, dense[mask != 0]


def sparse_blockwise_shift_scale(
    data_mask: Constant, nonzero_data: Constant, scale: Constant, offset: Constant | None = None
) -> tuple[Tensor, Tensor]:
    """``blockwise_shift_scale`` of the values under the mask: the mask and the values."""
    mask = decode(data_mask)
    dense = blockwise_shift_scale(_as_packed(_scatter(decode(nonzero_data), mask)), scale, offset)
    return mask, dense[mask != 0]


def affine_dequantize(
    quantized_data: Constant, zero_point: Constant, scale: Constant, axis: Constant
) -> Tensor:
    """iOS 16: ``scale * (data - zero_point)`` along one axis, rounded once at the end."""
    data, scales = decode(quantized_data), decode(scale)
    along = [1] * data.dim()
    along[_integers(axis)[0]] = -1
    shift = decode(zero_point).to(torch.float32)
    shift = shift.view(along) if shift.dim() else shift
    factor = scales.view(along) if scales.dim() else scales
    return ((data.to(torch.float32) - shift) * factor.to(torch.float32)).to(scales.dtype)


CONSTEXPR: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_lut_to_dense": lut_to_dense,
    "constexpr_lut_to_sparse": lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": sparse_to_dense,
}
# Operations whose rows are independent, and the parameter that has the rows of the result.
ROWWISE = {"constexpr_blockwise_shift_scale": "data", "constexpr_lut_to_dense": "indices"}


def _blocks(
    shape: tuple[int, ...], parts: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """``[a, b]`` in ``[x, y]`` blocks: views ``[x, a/x, y, b/y]`` and ``[x, 1, y, 1]``."""
    if len(shape) != len(parts) or any(size % n for size, n in zip(shape, parts, strict=True)):
        raise ValueError(f"blocks {parts} do not divide {shape}")
    sizes = zip(shape, parts, strict=True)
    grouped = tuple(n for size, part in sizes for n in (part, size // part))
    return grouped, tuple(n for part in parts for n in (part, 1))


def _lookup(codes: Tensor, tables: Tensor) -> Tensor:
    """``tables[block of the position][code]``; tables: ``[*blocks, entries]``."""
    blocks, entries = tuple(tables.shape[:-1]), tables.shape[-1]
    grouped, aligned = _blocks(tuple(codes.shape), blocks)
    first = torch.arange(0, math.prod(blocks) * entries, entries, dtype=torch.int32)
    index = codes.to(torch.int32).view(grouped) + first.view(aligned)
    return torch.index_select(tables.reshape(-1), 0, index.view(-1)).view(codes.shape)


def _byte_lookup(codes: Packed, tables: Tensor) -> Tensor:
    """``_lookup`` of packed codes with one table per group of rows; tables: ``[groups, entries]``.

    The codes of a byte are looked up together, as one number as wide as all of them.
    """
    groups, entries = tables.shape
    bits = BITS[codes.dtype]
    per_byte = 8 // bits
    row_codes = codes.size // groups
    if codes.shape[0] % groups:
        raise ValueError(f"{groups} palettes for {codes.shape[0]} rows")
    if 8 % bits or row_codes % per_byte:
        return _lookup(unpack(codes), tables.view(-1, *(1 for _ in codes.shape[1:]), entries))
    fields = torch.arange(256)[:, None] >> torch.arange(0, 8, bits) & (entries - 1)
    by_byte = tables[:, fields].view(groups * 256, per_byte).contiguous()
    raw = torch.from_numpy(np.ascontiguousarray(codes.raw))
    first = torch.arange(0, groups * 256, 256, dtype=torch.int32)
    index = (raw.view(groups, -1).to(torch.int32) + first[:, None]).view(-1)
    wide = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(per_byte * tables.element_size())
    if wide is None:
        return torch.index_select(by_byte, 0, index).view(codes.shape)
    found = torch.index_select(by_byte.view(wide).view(-1), 0, index)
    return found.view(tables.dtype).view(codes.shape)


def _integers(constant: Constant) -> tuple[int, ...]:
    return tuple(int(n) for n in decode(constant).to(torch.int64).reshape(-1).tolist())


@lru_cache
def _code_values(dtype: str) -> Tensor:
    """The number that each code of an integer type stands for, float32 ``[1, codes]``."""
    count = 2 ** BITS[dtype]
    values = torch.arange(count, dtype=torch.float32)
    if dtype.startswith("int"):
        values = torch.where(values >= count // 2, values - count, values)
    return values.view(1, -1)


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    where = mask != 0
    if int(where.sum()) != values.numel():
        raise ValueError(f"{values.numel()} values for {int(where.sum())} places of the mask")
    return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter_(where, values)


def _as_packed(tensor: Tensor) -> Packed:
    """A tensor of whole-byte numbers as a constant again, for the dense operations."""
    dtype = next(name for name, kind in TORCH_TYPES.items() if kind == tensor.dtype)
    return Packed(dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().ravel())
