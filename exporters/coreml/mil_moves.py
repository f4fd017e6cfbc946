"""The MIL operations that move numbers without computing: shapes, slices, gathers.

They work on float16 as stored, while the operations of ``mil_ops`` get float32. Parameters have
MIL's names; see ``mil_ops``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MOVES", "ints", "reversed_pairs"]


def ints(tensor: Tensor) -> list[int]:
    """A small integer vector (or scalar) as a list."""
    return [int(n) for n in tensor.reshape(-1).tolist()]


def flags(mask: Tensor | None, count: int) -> list[bool]:
    """A mask as a list; absent is all False."""
    return [False] * count if mask is None else [bool(b) for b in mask.reshape(-1).tolist()]


def reversed_pairs(pairs: Sequence[int]) -> list[int]:
    """Reorder (before, after) pairs from MIL's order, first dimension first, to torch's."""
    return [n for i in range(len(pairs) - 2, -1, -2) for n in (pairs[i], pairs[i + 1])]


def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond != 0, a, b)


def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


def reshape(x: Tensor, shape: Tensor) -> Tensor:
    """-1 is inferred; 0 keeps a dimension of x, counted from the last (iOS 17), or is 1."""
    sizes = ints(shape)
    from_last = [1] * (len(sizes) - x.dim()) + list(x.shape)
    from_last = from_last[len(from_last) - len(sizes) :]
    return x.reshape([size if n == 0 else n for n, size in zip(sizes, from_last, strict=True)])


def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    rank = x.dim() + axes.numel()
    for axis in sorted(a % rank for a in ints(axes)):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(ints(axes)))


def concat(values: Sequence[Tensor], axis: Tensor, interleave: Tensor | bool = False) -> Tensor:
    """Concatenate along an axis; interleaved: first slices of all, second slices of all, ...

    Scalars are vectors of one element, as in coremltools' type inference.
    """
    values = [v.reshape(1) if v.dim() == 0 else v for v in values]
    where = int(axis) % values[0].dim()
    if bool(interleave):
        return torch.stack(values, dim=where + 1).flatten(where, where + 1)
    return torch.cat(values, dim=where)


def stack(values: Sequence[Tensor], axis: Tensor) -> Tensor:
    rank = values[0].dim() + 1
    return torch.cat([v.unsqueeze(int(axis) % rank) for v in values], dim=int(axis) % rank)


def split(
    x: Tensor, axis: Tensor, num_splits: Tensor | None = None, split_sizes: Tensor | None = None
) -> tuple[Tensor, ...]:
    where = int(axis)
    if split_sizes is not None:
        return torch.split(x, ints(split_sizes), dim=where)
    if num_splits is None or x.shape[where] % int(num_splits):
        raise ValueError(f"{x.shape[where]} does not split into {num_splits} equal parts")
    return torch.split(x, x.shape[where] // int(num_splits), dim=where)


def box(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None,
    begin_mask: Tensor | None,
    end_mask: Tensor | None,
    squeeze_mask: Tensor | None,
) -> tuple[int | slice, ...]:
    """The index of a slice: Python's rules for negative ends; masks select all or one index."""
    rank = x.dim()
    steps = ints(stride) if stride is not None else [1] * rank
    if min(steps, default=1) < 1:
        raise ValueError(f"a stride of {min(steps)} is not supported")
    from_start, to_end = flags(begin_mask, rank), flags(end_mask, rank)
    single = flags(squeeze_mask, rank)
    bounds = zip(ints(begin), ints(end), strict=True)
    return tuple(
        first
        if single[i]
        else slice(None if from_start[i] else first, None if to_end[i] else last, steps[i])
        for i, (first, last) in enumerate(bounds)
    )


def slice_by_index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    return x[box(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)]


def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
    *,
    in_place: bool = False,
) -> Tensor:
    """``x`` with a slice replaced; the update must have the slice's shape.

    ``in_place`` says that the old ``x`` is not used again.
    """
    index = box(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    x = x if in_place else x.to(torch.promote_types(x.dtype, update.dtype), copy=True)
    if x[index].shape != update.shape:
        raise ValueError(f"update {tuple(update.shape)} for a slice {tuple(x[index].shape)}")
    x[index] = update.to(x.dtype)
    return x


def slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    """Slice by sizes; -1: up to the end."""
    pairs = zip(ints(begin), ints(size), strict=True)
    return x[tuple(slice(b, None if n < 0 else b + n) for b, n in pairs)]


def positions(indices: Tensor, size: int) -> Tensor:
    """Normalize indices: negative ones count from the end.

    Raises:
        IndexError: one is outside ``size``.
    """
    index = indices.to(torch.int64)
    index = torch.where(index < 0, index + size, index)
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise IndexError(f"an index is outside of 0..{size - 1}")
    return index


def gather(
    x: Tensor,
    indices: Tensor,
    axis: Tensor | int = 0,
    batch_dims: Tensor | int = 0,
    validate_indices: Tensor | bool = False,
) -> Tensor:
    where = int(axis) % x.dim()
    if int(batch_dims):
        raise ValueError("batch_dims other than 0 is not supported")
    index = positions(indices, x.shape[where])
    taken = torch.index_select(x, where, index.reshape(-1))
    return taken.reshape([*x.shape[:where], *index.shape, *x.shape[where + 1 :]])


def gather_along_axis(
    x: Tensor,
    indices: Tensor,
    axis: Tensor | int = 0,
    validate_indices: Tensor | bool = False,
) -> Tensor:
    where = int(axis) % x.dim()
    return torch.take_along_dim(x, positions(indices, x.shape[where]), dim=where)


def gather_nd(
    x: Tensor,
    indices: Tensor,
    batch_dims: Tensor | int = 0,
    validate_indices: Tensor | bool = False,
) -> Tensor:
    if int(batch_dims):
        raise ValueError("batch_dims other than 0 is not supported")
    return x[tuple(positions(indices[..., i], x.shape[i]) for i in range(indices.shape[-1]))]


def pad(
    x: Tensor, pad: Tensor, mode: str = "constant", constant_val: Tensor | float = 0.0
) -> Tensor:
    """Pad the last dimensions: (before, after) of each."""
    if mode != "constant":
        return F.pad(x, reversed_pairs(ints(pad)), mode={"reflect": "reflect"}[mode])
    return F.pad(x, reversed_pairs(ints(pad)), value=float(constant_val))


def band_part(x: Tensor, lower: Tensor | int = -1, upper: Tensor | int = -1) -> Tensor:
    """Zero outside a band around the diagonal; -1: no limit on that side."""
    x = x if int(upper) < 0 else torch.tril(x, int(upper))
    return x if int(lower) < 0 else torch.triu(x, -int(lower))


def fill(shape: Tensor, value: Tensor | float = 0.0) -> Tensor:
    return torch.as_tensor(value).expand(ints(shape)).clone()


def range_1d(end: Tensor, start: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=end.dtype)


MOVES: dict[str, Callable[..., Any]] = {
    "band_part": band_part,
    "concat": concat,
    "expand_dims": expand_dims,
    "fill": fill,
    "fill_like": lambda ref_tensor, value=0.0: fill(shape(ref_tensor), value),
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "identity": lambda x: x,
    "pad": pad,
    "range_1d": range_1d,
    "reshape": reshape,
    "reverse": lambda x, axes=None: x.flip(list(range(x.dim())) if axes is None else ints(axes)),
    "select": select,
    "shape": shape,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "split": split,
    "squeeze": squeeze,
    "stack": stack,
    "tile": lambda x, reps: x.tile(ints(reps)),
    "transpose": lambda x, perm: x.permute(ints(perm)),
}
