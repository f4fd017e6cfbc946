"""llama.cpp's own quantizer as an oracle: ``ggml_quantize_chunk`` of the xllamacpp wheel.

Its bytes are those of llama-quantize. The weights of the squared error that llama.cpp minimises
are written down here from its sources (ggml-quants.c), so that a test can measure by them.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import importlib.util
import os

import gguf
import numpy as np
import pytest


@functools.cache
def library() -> ctypes.CDLL:
    """The wheel's shared library; skips the test where the wheel is not installed."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        pytest.skip("xllamacpp is not installed")
    (path,) = glob.glob(os.path.join(os.path.dirname(spec.origin), "xllamacpp*.so"))
    loaded = ctypes.CDLL(path)
    floats = ctypes.POINTER(ctypes.c_float)
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    loaded.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, floats, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, floats,
    ]  # fmt: skip
    return loaded


def quantize(name: str, weight: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """uint8 ``[rows, bytes_per_row]``, as llama-quantize writes them (on one thread)."""
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = weight.shape
    blocks = np.zeros((rows, columns // block * size), dtype=np.uint8)
    floats = ctypes.POINTER(ctypes.c_float)
    source = np.ascontiguousarray(weight, dtype=np.float32)
    matrix = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    written = library().ggml_quantize_chunk(
        int(kind),
        source.ctypes.data_as(floats),
        blocks.ctypes.data_as(ctypes.c_void_p),
        0,
        rows,
        columns,
        None if matrix is None else matrix.ctypes.data_as(floats),
    )
    assert written == blocks.size
    return blocks


def decode(name: str, blocks: np.ndarray) -> np.ndarray:
    """float32 ``[rows, columns]`` by gguf-py."""
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])


def decode_in_c(name: str, blocks: np.ndarray) -> np.ndarray:
    """float32 ``[rows, columns]`` by ggml itself: its reference decoder, in the same library."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    decoder = getattr(library(), f"dequantize_row_{name.lower()}")
    decoder.restype = None
    decoder.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    source = np.ascontiguousarray(blocks)
    values = np.empty((len(source), source.shape[1] // size * block), dtype=np.float32)
    decoder(source.ctypes.data, values.ctypes.data, values.size)
    return values


def error_weights(
    name: str, weight: np.ndarray, importance: np.ndarray | None = None
) -> np.ndarray:
    """What llama.cpp multiplies the squared error of each weight with, float64 ``[rows, columns]``.

    Q8_0 and MXFP4 have no search and no weights: with an importance their error is weighted by
    that.
    """
    x = weight.astype(np.float64)
    spread = functools.partial(mean_squares, x)
    if importance is None:
        if name in ("Q4_K", "Q5_K"):
            return np.sqrt(spread(32)) + np.abs(x)
        if name in ("Q6_K", "Q3_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS"):
            return x * x
        return np.abs(x) if name == "Q2_K" else np.ones_like(x)
    factor = importance.astype(np.float64)
    if name in ("Q6_K", "Q8_0", "MXFP4"):
        return np.broadcast_to(factor, x.shape)
    if name == "IQ4_NL":
        return factor * np.sqrt(2 * spread(32) + x * x)
    if name.endswith("_K") or name in ("IQ4_XS", "IQ3_S", "IQ3_XXS"):
        return factor * np.sqrt((1 if name == "Q2_K" else 2) * spread(256) + x * x)
    return factor * np.sqrt(spread(x.shape[1]) + x * x)


def mean_squares(x: np.ndarray, size: int) -> np.ndarray:
    """Mean of the squares of each run of ``size`` columns, broadcast back over the run."""
    means = (x.reshape(x.shape[0], -1, size) ** 2).mean(-1)
    return np.repeat(means, size, axis=1)
