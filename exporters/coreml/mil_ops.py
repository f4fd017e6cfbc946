"""The MIL operations as torch functions: one per operator, in one table.

Parameters have MIL's names, so a program's operation is called with its inputs as keywords; a
parameter that a function lacks is not supported by the evaluator. Values are
torch tensors (floats float32 or float16, every integer type as int32, bools) and strings.
Semantics: coremltools' operator definitions (``converters/mil/mil/ops/defs``), iOS 15 to 18.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from exporters.coreml.blobs import BITS
from exporters.coreml.mil_moves import MOVES, ints, reversed_pairs

__all__ = ["OPS"]


# --- element by element ---------------------------------------------------------------------


def real_div(x: Tensor, y: Tensor) -> Tensor:
    """Division; the quotient of integers is rounded towards zero."""
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, alpha), beta)


def inverse(x: Tensor, epsilon: Tensor | float = 1e-4) -> Tensor:
    return 1.0 / (x + epsilon)


def log(x: Tensor, epsilon: Tensor | float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


def rsqrt(x: Tensor, epsilon: Tensor | float = 1e-12) -> Tensor:
    return 1.0 / torch.sqrt(x + epsilon)


def gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode])


def cast(x: Tensor, dtype: str) -> Tensor:
    """Cast to another type; to an integer: rounded towards zero, then wrapped to its width."""
    if dtype == "bool":
        return x != 0
    if dtype in ("fp16", "fp32"):  # the evaluator rounds to the declared type
        return x.to(torch.float32)
    whole = x.to(torch.int64)
    bits = BITS[dtype]
    if dtype.startswith("int"):
        half = 2 ** (bits - 1)
        whole = torch.remainder(whole + half, 2**bits) - half
    else:
        whole = torch.remainder(whole, 2**bits)
    return whole.to(torch.int32)


# --- reductions, normalizations -------------------------------------------------------------


def reduction(reduce: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    """A MIL reduction (no axes: all) from a torch reduction."""

    def reduced(x: Tensor, axes: Tensor | None = None, keep_dims: Tensor | bool = False) -> Tensor:
        return reduce(x, list(range(x.dim())) if axes is None else ints(axes), bool(keep_dims))

    return reduced


def arg_reduction(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``reduce_argmax`` or ``reduce_argmin`` from a torch function."""

    def reduced(
        x: Tensor,
        axis: Tensor | int = -1,
        keep_dims: Tensor | bool = False,
        output_dtype: str = "int32",
    ) -> Tensor:
        return cast(reduce(x, dim=int(axis), keepdim=bool(keep_dims)), output_dtype)

    return reduced


def total(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    """A sum in the type of ``x``."""
    return x.sum(axes, keepdim=keep, dtype=x.dtype)


def product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((a % x.dim() for a in axes), reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def softmax(x: Tensor, axis: Tensor | int = -1) -> Tensor:
    return torch.softmax(x, dim=int(axis))


def layer_norm(
    x: Tensor,
    axes: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    """Layer norm over ``axes`` (default: all); gamma and beta have the shape of these axes."""
    over = sorted(a % x.dim() for a in (range(x.dim()) if axes is None else ints(axes)))
    centred = x - x.mean(over, keepdim=True)
    y = centred / torch.sqrt(centred.square().mean(over, keepdim=True) + epsilon)
    wide = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
    y = y if gamma is None else y * gamma.reshape(wide)
    return y if beta is None else y + beta.reshape(wide)


def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, training=False, eps=float(epsilon))


# --- products -------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``; weight ``[out, in]``."""
    return F.linear(x, weight, bias)


def matmul(
    x: Tensor, y: Tensor, transpose_x: Tensor | bool = False, transpose_y: Tensor | bool = False
) -> Tensor:
    x = x.transpose(-1, -2) if bool(transpose_x) else x
    return torch.matmul(x, y.transpose(-1, -2) if bool(transpose_y) else y)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Tensor | int = 1,
) -> Tensor:
    """1-, 2- or 3-dimensional convolution; x ``[n, in, *space]``, weight ``[out, in/groups, *k]``.

    ``pad``: before and after, per dimension of space, for ``pad_type`` ``custom``.
    """
    rank = x.dim() - 2
    stride = ints(strides) if strides is not None else [1] * rank
    dilation = ints(dilations) if dilations is not None else [1] * rank
    if pad_type == "custom":
        x = F.pad(x, reversed_pairs(ints(pad) if pad is not None else [0] * 2 * rank))
    elif pad_type != "valid":
        raise ValueError(f"pad_type {pad_type!r} is not known")
    convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return convolve(x, weight, bias, stride=stride, dilation=dilation, groups=int(groups))


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """``softmax(q k^T / sqrt(width) + mask) v``; a bool mask keeps where True."""
    scores = torch.matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.matmul(torch.softmax(scores, dim=-1), value)


def cumsum(
    x: Tensor,
    axis: Tensor | int = 0,
    exclusive: Tensor | bool = False,
    reverse: Tensor | bool = False,
) -> Tensor:
    along = int(axis)
    y = x.flip(along) if bool(reverse) else x
    y = y.cumsum(along, dtype=x.dtype) - (y if bool(exclusive) else 0)
    return y.flip(along) if bool(reverse) else y


OPS: dict[str, Callable[..., Any]] = {
    **MOVES,
    "abs": lambda x: torch.abs(x),
    "add": lambda x, y: x + y,
    "batch_norm": batch_norm,
    "cast": cast,
    "ceil": lambda x: torch.ceil(x),
    "clip": clip,
    "conv": conv,
    "cos": lambda x: torch.cos(x),
    "cumsum": cumsum,
    "einsum": lambda values, equation: torch.einsum(equation, *values),
    "equal": lambda x, y: x == y,
    "erf": lambda x: torch.erf(x),
    "exp": lambda x: torch.exp(x),
    "exp2": lambda x: torch.exp2(x),
    "floor": lambda x: torch.floor(x),
    "floor_div": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "gelu": gelu,
    "greater": lambda x, y: x > y,
    "greater_equal": lambda x, y: x >= y,
    "inverse": inverse,
    "layer_norm": layer_norm,
    "less": lambda x, y: x < y,
    "less_equal": lambda x, y: x <= y,
    "linear": linear,
    "log": log,
    "logical_and": lambda x, y: x & y,
    "logical_not": lambda x: ~x,
    "logical_or": lambda x, y: x | y,
    "logical_xor": lambda x, y: x ^ y,
    "matmul": matmul,
    "maximum": lambda x, y: torch.maximum(x, y),
    "minimum": lambda x, y: torch.minimum(x, y),
    "mod": lambda x, y: torch.remainder(x, y),
    "mul": lambda x, y: x * y,
    "not_equal": lambda x, y: x != y,
    "pow": lambda x, y: torch.pow(x, y),
    "real_div": real_div,
    "reduce_argmax": arg_reduction(torch.argmax),
    "reduce_argmin": arg_reduction(torch.argmin),
    "reduce_l2_norm": reduction(lambda x, a, k: x.square().sum(a, keepdim=k).sqrt()),
    "reduce_log_sum_exp": reduction(lambda x, a, k: torch.logsumexp(x, a, keepdim=k)),
    "reduce_max": reduction(lambda x, a, k: torch.amax(x, a, keepdim=k)),
    "reduce_mean": reduction(lambda x, a, k: torch.mean(x, a, keepdim=k)),
    "reduce_min": reduction(lambda x, a, k: torch.amin(x, a, keepdim=k)),
    "reduce_prod": reduction(product),
    "reduce_sum": reduction(total),
    "reduce_sum_square": reduction(lambda x, a, k: total(x.square(), a, k)),
    "relu": lambda x: torch.relu(x),
    "round": lambda x: torch.round(x),
    "rsqrt": rsqrt,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "sigmoid": lambda x: torch.sigmoid(x),
    "sign": lambda x: torch.sign(x),
    "silu": lambda x: F.silu(x),
    "sin": lambda x: torch.sin(x),
    "softmax": softmax,
    "softplus": lambda x: F.softplus(x),
    "sqrt": lambda x: torch.sqrt(x),
    "square": lambda x: x.square(),
    "sub": lambda x, y: x - y,
    "tanh": lambda x: torch.tanh(x),
}
