"""MIL operations: against coremltools' own evaluation of constants, or against a formula."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch

from exporters.coreml.mil_ops import OPS

logging.disable(logging.WARNING)  # coremltools and its missing macOS libraries
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
logging.disable(logging.NOTSET)

RNG = np.random.default_rng(0)
A = RNG.normal(size=(2, 3, 4)).astype(np.float32)
B = RNG.normal(size=(2, 3, 4)).astype(np.float32)
INTEGERS = RNG.integers(-9, 10, (3, 4)).astype(np.int32)
DIVISORS = np.array([[3, -2, 5, 1]], np.int32)
TRUTHS = RNG.random((3, 4)) < 0.5


def i(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def n(value: int) -> np.int32:
    return np.int32(value)


def f(value: float) -> np.float32:
    return np.float32(value)


# Operations that coremltools evaluates itself when their inputs are constant: its value is ours.
FOLDED: list[tuple[str, dict]] = [
    ("abs", {"x": A}),
    ("add", {"x": A, "y": B}),
    ("band_part", {"x": A, "lower": n(1), "upper": n(0)}),
    ("band_part", {"x": A, "lower": n(-1), "upper": n(1)}),
    ("cast", {"x": A * 3, "dtype": "int32"}),
    ("cast", {"x": INTEGERS, "dtype": "bool"}),
    ("cast", {"x": INTEGERS * 9000, "dtype": "int16"}),
    ("cast", {"x": INTEGERS * 9000, "dtype": "uint16"}),
    ("cast", {"x": INTEGERS, "dtype": "fp32"}),
    ("ceil", {"x": A}),
    ("clip", {"x": A, "alpha": f(-0.5), "beta": f(0.25)}),
    ("concat", {"values": (A, B), "axis": n(-2)}),
    ("concat", {"values": (n(4), n(2)), "axis": n(0)}),
    ("cos", {"x": A}),
    ("cumsum", {"x": A, "axis": n(1)}),
    ("cumsum", {"x": A, "axis": n(2), "reverse": True}),
    ("equal", {"x": INTEGERS, "y": DIVISORS}),
    ("erf", {"x": A}),
    ("exp", {"x": A}),
    ("exp2", {"x": A}),
    ("expand_dims", {"x": A, "axes": i(0, -1)}),
    ("fill", {"shape": i(2, 3), "value": f(1.5)}),
    ("floor", {"x": A}),
    ("floor_div", {"x": INTEGERS, "y": DIVISORS}),
    ("floor_div", {"x": A, "y": B}),
    ("gather", {"x": A, "indices": i(1, -1, 0), "axis": n(2)}),
    ("gather", {"x": A, "indices": n(1), "axis": n(0)}),
    ("gather", {"x": A, "indices": np.array([[0, 2], [-3, 1]], np.int32), "axis": n(1)}),
    ("gather_along_axis", {"x": A, "indices": np.full((2, 1, 4), 2, np.int32), "axis": n(1)}),
    ("greater", {"x": INTEGERS, "y": DIVISORS}),
    ("greater_equal", {"x": INTEGERS, "y": DIVISORS}),
    ("inverse", {"x": A, "epsilon": f(0.01)}),
    ("less", {"x": INTEGERS, "y": DIVISORS}),
    ("less_equal", {"x": INTEGERS, "y": DIVISORS}),
    ("linear", {"x": A, "weight": A[0], "bias": A[0, :, 0]}),
    ("log", {"x": np.abs(A), "epsilon": f(0.1)}),
    ("logical_and", {"x": TRUTHS, "y": TRUTHS[::-1].copy()}),
    ("logical_not", {"x": TRUTHS}),
    ("logical_or", {"x": TRUTHS, "y": TRUTHS[::-1].copy()}),
    ("logical_xor", {"x": TRUTHS, "y": TRUTHS[::-1].copy()}),
    ("matmul", {"x": A, "y": B, "transpose_y": True}),
    ("matmul", {"x": A, "y": B, "transpose_x": True}),
    ("maximum", {"x": A, "y": B}),
    ("minimum", {"x": A, "y": B}),
    ("mod", {"x": INTEGERS, "y": DIVISORS}),
    ("mul", {"x": A, "y": B}),
    ("not_equal", {"x": INTEGERS, "y": DIVISORS}),
    ("pad", {"x": A, "pad": i(1, 2, 0, 3), "constant_val": f(7)}),
    ("pow", {"x": np.abs(A), "y": f(1.7)}),
    ("range_1d", {"end": n(11), "start": n(2), "step": n(3)}),
    ("real_div", {"x": A, "y": B}),
    ("reduce_argmax", {"x": A, "axis": n(1)}),
    ("reduce_argmin", {"x": A, "axis": n(-1), "keep_dims": True}),
    ("reduce_l2_norm", {"x": A, "axes": i(1)}),
    ("reduce_log_sum_exp", {"x": A, "axes": i(-1)}),
    ("reduce_max", {"x": A, "axes": i(0, 2), "keep_dims": True}),
    ("reduce_mean", {"x": A, "axes": i(-1), "keep_dims": True}),
    ("reduce_min", {"x": INTEGERS, "axes": i(1)}),
    ("reduce_prod", {"x": A, "axes": i(0, 2)}),
    ("reduce_sum", {"x": INTEGERS, "axes": i(0)}),
    ("reduce_sum", {"x": A}),
    ("reduce_sum_square", {"x": A, "axes": i(2)}),
    ("relu", {"x": A}),
    ("reshape", {"x": A, "shape": i(0, -1)}),
    ("reshape", {"x": A, "shape": i(1, 0, -1, 0)}),
    ("reshape", {"x": A[0], "shape": i(0, 0, -1, 0)}),
    ("reverse", {"x": A, "axes": i(0, 2)}),
    ("round", {"x": A * 4}),
    ("rsqrt", {"x": np.abs(A), "epsilon": f(1e-3)}),
    ("select", {"cond": TRUTHS, "a": A[0], "b": B[1]}),
    ("shape", {"x": A}),
    ("sigmoid", {"x": A}),
    ("sign", {"x": A}),
    ("sin", {"x": A}),
    ("slice_by_index", {"x": A, "begin": i(0, 1, 1), "end": i(2, -1, 4), "stride": i(1, 1, 2)}),
    (
        "slice_by_index",
        {
            "x": A,
            "begin": i(-1, 5, 1),
            "end": i(0, 2, 9),
            "begin_mask": [False, True, False],
            "end_mask": [False, False, True],
            "squeeze_mask": [True, False, False],
        },
    ),
    ("slice_by_size", {"x": A, "begin": i(0, 1, 2), "size": i(1, -1, 2)}),
    (
        "slice_update",
        {"x": A, "update": B[:, :2, 1:3], "begin": i(0, 1, 1), "end": i(2, 3, 3)},
    ),
    ("softmax", {"x": A, "axis": n(1)}),
    ("softplus", {"x": A}),
    ("split", {"x": A, "num_splits": n(2), "axis": n(2)}),
    ("split", {"x": A, "split_sizes": i(1, 3), "axis": n(-1)}),
    ("sqrt", {"x": np.abs(A)}),
    ("square", {"x": A}),
    ("squeeze", {"x": A[:, :1], "axes": i(1)}),
    ("stack", {"values": (A, B), "axis": n(1)}),
    ("sub", {"x": A, "y": B}),
    ("tanh", {"x": A}),
    ("tile", {"x": A, "reps": i(1, 2, 3)}),
    ("transpose", {"x": A, "perm": i(2, 0, 1)}),
]


def as_torch(value: object) -> object:
    if isinstance(value, str):
        return value
    if isinstance(value, tuple):
        return [as_torch(v) for v in value]
    return torch.from_numpy(np.array(value))


def as_numpy(value: object) -> np.ndarray:
    return value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


@pytest.mark.parametrize(
    ("kind", "inputs"), FOLDED, ids=[f"{k}-{c}" for c, (k, _) in enumerate(FOLDED)]
)
def test_operation_equals_coremltools_folding(kind: str, inputs: dict) -> None:
    folded: list[np.ndarray] = []

    @mb.program(input_specs=[mb.TensorSpec(shape=(1,))], opset_version=ct.target.iOS18)
    def _(x: object) -> object:
        result = getattr(mb, kind)(**inputs)
        results = result if isinstance(result, (list, tuple)) else [result]
        assert all(r.val is not None for r in results), "coremltools does not fold this"
        folded.extend(np.asarray(r.val) for r in results)
        return x

    ours = OPS[kind](**{name: as_torch(value) for name, value in inputs.items()})
    ours = ours if isinstance(ours, tuple) else (ours,)
    assert len(ours) == len(folded)
    for mine, theirs in zip(ours, folded, strict=True):
        assert mine.numpy().dtype.kind == theirs.dtype.kind.replace("u", "i")
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=2e-6, atol=1e-6)
        assert mine.shape == theirs.shape


def by_hand_norm(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    return (x - x.mean(-1, keepdims=True)) / deviation * gamma + beta


def gelu_by_hand(x: np.ndarray) -> np.ndarray:
    return np.vectorize(lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))))(x)


def conv_by_hand(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Stride 2, one zero before and two after, two groups."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 2)))
    groups, out = 2, weight.shape[0]
    steps = range(0, padded.shape[-1] - weight.shape[-1] + 1, 2)
    result = np.zeros((x.shape[0], out, len(steps)))
    for o in range(out):
        first = o // (out // groups) * weight.shape[1]
        for at, start in enumerate(steps):
            window = padded[:, first : first + weight.shape[1], start : start + weight.shape[-1]]
            result[:, o, at] = (window * weight[o]).sum((1, 2))
    return result


def attention_by_hand(q: np.ndarray, k: np.ndarray, v: np.ndarray, keep: np.ndarray) -> np.ndarray:
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * keep
    return weights / weights.sum(-1, keepdims=True) @ v


# What coremltools cannot fold, against a formula.
X3 = RNG.normal(size=(2, 4, 9)).astype(np.float32)
W3 = RNG.normal(size=(6, 2, 3)).astype(np.float32)
KEEP = np.tril(np.ones((3, 3), bool))
BY_HAND: list[tuple[str, dict, Callable[[], np.ndarray]]] = [
    (
        "layer_norm",
        {"x": A, "axes": i(-1), "gamma": A[0, 0], "beta": B[0, 0], "epsilon": f(1e-3)},
        lambda: by_hand_norm(A, A[0, 0], B[0, 0]),
    ),
    (
        "batch_norm",
        {"x": A, "mean": A[0, :, 0], "variance": np.abs(B[0, :, 0]), "epsilon": f(1e-3)},
        lambda: (A - A[0, :, :1]) / np.sqrt(np.abs(B[0, :, :1]) + 1e-3),
    ),
    ("gelu", {"x": A}, lambda: gelu_by_hand(A)),
    (
        "gelu",
        {"x": A, "mode": "TANH_APPROXIMATION"},
        lambda: 0.5 * A * (1 + np.tanh(np.sqrt(2 / np.pi) * (A + 0.044715 * A**3))),
    ),
    (
        "gelu",
        {"x": A, "mode": "SIGMOID_APPROXIMATION"},
        lambda: A / (1 + np.exp(-1.702 * A)),
    ),
    (
        "cumsum",
        {"x": A, "axis": n(2), "exclusive": np.True_, "reverse": np.True_},
        lambda: A[..., ::-1].cumsum(-1)[..., ::-1] - A,
    ),
    (
        "concat",
        {"values": (A, B), "axis": n(1), "interleave": np.True_},
        lambda: np.stack([A, B], 2).reshape(2, 6, 4),
    ),
    ("silu", {"x": A}, lambda: A / (1 + np.exp(-A))),
    ("identity", {"x": A}, lambda: A),
    ("fill_like", {"ref_tensor": A, "value": f(2)}, lambda: np.full(A.shape, 2)),
    ("real_div", {"x": INTEGERS, "y": DIVISORS}, lambda: np.trunc(INTEGERS / DIVISORS)),
    ("einsum", {"values": (A, B), "equation": "bij,bkj->bik"}, lambda: A @ B.swapaxes(1, 2)),
    (
        "gather_nd",
        {"x": A, "indices": np.array([[0, 1], [1, -1]], np.int32)},
        lambda: np.stack([A[0, 1], A[1, 2]]),
    ),
    (
        "conv",
        {"x": X3, "weight": W3, "strides": i(2), "pad_type": "custom", "pad": i(1, 2)}
        | {"groups": n(2)},
        lambda: conv_by_hand(X3, W3),
    ),
    (
        "scaled_dot_product_attention",
        {"query": A, "key": B, "value": A, "attn_mask": KEEP},
        lambda: attention_by_hand(A, B, A, KEEP),
    ),
    (
        "scaled_dot_product_attention",
        {"query": A, "key": B, "value": A, "attn_mask": np.log(KEEP + 1e-30, dtype=np.float32)},
        lambda: attention_by_hand(A, B, A, KEEP),
    ),
]


@pytest.mark.parametrize(
    ("kind", "inputs", "expected"), BY_HAND, ids=[f"{k}-{c}" for c, (k, *_) in enumerate(BY_HAND)]
)
def test_operation_equals_its_formula(
    kind: str, inputs: dict, expected: Callable[[], np.ndarray]
) -> None:
    ours = OPS[kind](**{name: as_torch(value) for name, value in inputs.items()})
    np.testing.assert_allclose(as_numpy(ours), expected(), rtol=1e-5, atol=1e-5)


def test_every_operation_is_tested() -> None:
    assert set(OPS) == {kind for kind, _ in FOLDED} | {kind for kind, *_ in BY_HAND}


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("gather", {"x": A, "indices": i(2), "axis": n(0)}),
        ("slice_update", {"x": A, "update": B[:, :1], "begin": i(0, 0, 0), "end": i(2, 2, 4)}),
        ("slice_by_index", {"x": A, "begin": i(0, 0, 0), "end": i(2, 2, 4), "stride": i(1, 1, -1)}),
        ("split", {"x": A, "num_splits": n(3), "axis": n(2)}),
    ],
)
def test_wrong_operands_are_refused(kind: str, inputs: dict) -> None:
    with pytest.raises((ValueError, IndexError)):
        OPS[kind](**{name: as_torch(value) for name, value in inputs.items()})
