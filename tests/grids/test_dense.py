"""Dense grids against torch's casts and gguf-py."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from compress.errors import GridError
from compress.grids import get_grid

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def values() -> np.ndarray:
    draw = np.random.default_rng(0)
    size = 10.0 ** draw.uniform(-9, 4, (16, 64))
    numbers = (draw.standard_normal((16, 64)) * size).astype(np.float32)
    ties = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 0.0, -0.0], dtype=np.float32)
    numbers[0, : len(ties)] = ties
    return numbers


@pytest.mark.parametrize("name", DTYPES)
def test_rounds_and_decodes_as_torch_does(name: str) -> None:
    weight = values()
    quantized = get_grid(name).quantize(weight)
    expected = torch.from_numpy(weight).to(DTYPES[name])
    assert np.array_equal(quantized.decode(), expected.float().numpy())
    stored = expected.view(torch.int32 if name == "F32" else torch.int16).numpy()
    blocks = quantized.pack()["blocks"]
    assert np.array_equal(blocks, stored.view(np.uint8))
    assert blocks.nbytes == get_grid(name).nbytes(weight.shape)


@pytest.mark.parametrize("name", DTYPES)
def test_bytes_decode_as_gguf_py_decodes_them(name: str) -> None:
    quantized = get_grid(name).quantize(values())
    stored = quantized.pack()["blocks"]
    kind = gguf.GGMLQuantizationType[name]
    native = {"F32": np.float32, "F16": np.float16, "BF16": np.uint8}[name]
    assert np.array_equal(gguf.quants.dequantize(stored.view(native), kind), quantized.decode())


@pytest.mark.parametrize("name", DTYPES)
def test_vectors_are_tensors_too(name: str) -> None:
    quantized = get_grid(name).quantize(values()[0])
    assert quantized.shape == (64,)
    assert quantized.decode().shape == (64,)
    assert quantized.pack()["blocks"].shape == (get_grid(name).nbytes((64,)),)


@pytest.mark.parametrize("value", [7e4, np.inf, np.nan])
def test_float16_refuses_what_it_would_lose(value: float) -> None:
    weight = np.full((1, 4), value, dtype=np.float32)
    with pytest.raises(GridError, match="float16's range"):
        get_grid("F16").quantize(weight)
    assert np.array_equal(get_grid("F32").quantize(weight).decode(), weight, equal_nan=True)
    assert np.isnan(get_grid("BF16").quantize(np.float32([np.nan])).decode()).all()
