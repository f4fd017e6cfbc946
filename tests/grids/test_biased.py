"""Grids with a scale and a bias per group: MLX's packing and decoding, the fit, extreme groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compress.calibration.statistics import LayerStats
from compress.errors import GridError
from compress.grids import Float32, get_grid
from compress.grids.biased import Biased
from compress.solvers import rtn, scale_search
from compress.solvers.gptq import gptq

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
NAMES = [
    f"affine{bits}-g{group}{kind}" for bits in BITS for group in GROUPS for kind in ("", "-bf16")
]
MADE_BY_MLX = np.load(Path(__file__).resolve().parents[1] / "data" / "mlx_affine.npz")


def grid_of(name: str) -> Biased:
    grid = get_grid(name)
    assert isinstance(grid, Biased) and grid.name == name
    return grid


def weights(rows: int = 48, columns: int = 256, seed: int = 0) -> Float32:
    random = np.random.default_rng(seed)
    spread = random.lognormal(0.0, 0.5, columns)
    return (random.standard_normal((rows, columns)) * spread * 0.02).astype(np.float32)


def plain(weight: Float32, grid: Biased) -> Float32:
    """The extremes of each group on the extreme codes, exact parameters."""
    groups = weight.reshape(len(weight), -1, grid.group_size).astype(np.float64)
    low, high = groups.min(axis=2, keepdims=True), groups.max(axis=2, keepdims=True)
    step = (high - low) / (2**grid.bits - 1)
    return (np.rint((groups - low) / step) * step + low).reshape(weight.shape).astype(np.float32)


def square(values: Float32) -> float:
    return float(np.square(values, dtype=np.float64).sum())


@pytest.mark.parametrize("name", NAMES)
def test_files_of_mlx_are_read_and_written_to_the_bit(name: str) -> None:
    grid = grid_of(name)
    packed = {part: MADE_BY_MLX[f"{name}/{part}"] for part in ("weight", "scales", "biases")}
    codes, params = grid.unpack(packed["weight"], packed["scales"], packed["biases"])
    assert codes.max() == 2**grid.bits - 1
    decoded = grid.decode(codes, params)
    assert decoded.tobytes() == MADE_BY_MLX[f"{name}/decoded"].tobytes()
    again = grid.pack(codes, params)
    for part, values in packed.items():
        assert again[part].dtype == values.dtype
        assert again[part].tobytes() == values.tobytes(), part


@pytest.mark.parametrize("name", NAMES)
def test_bytes_and_the_way_back(name: str) -> None:
    grid, weight = grid_of(name), weights(37)
    found = rtn(weight, grid)
    packed = found.pack()
    assert sum(part.nbytes for part in packed.values()) == grid.nbytes(weight.shape)
    codes, params = grid.unpack(packed["weight"], packed["scales"], packed["biases"])
    assert np.array_equal(codes, found.codes)
    assert np.array_equal(grid.decode(codes, params), found.decode())
    # A solver that rounds by column sees the same values.
    lattice = grid.lattice(found.params)
    scale, offset = (np.repeat(x, grid.group_size, 1) for x in (lattice.scale, lattice.offset))
    assert np.array_equal(lattice.levels[0][found.codes] * scale - offset, found.decode())


@pytest.mark.parametrize("name", NAMES)
def test_the_fit_is_better_than_the_extremes(name: str) -> None:
    grid, weight = grid_of(name), weights()
    ours = square(rtn(weight, grid).decode() - weight)
    # bfloat16 has 8 bits itself: at 8 bits a code its rounding is as large as a step.
    least = {2: 0.75, 3: 0.85, 4: 0.93, 5: 0.97, 6: 1.0, 8: 1.02}[grid.bits]
    if grid.bfloat16:
        least *= {6: 1.06, 8: 1.7}.get(grid.bits, 1.02)
    assert ours <= least * square(plain(weight, grid) - weight)


@pytest.mark.parametrize("name", ["affine3-g64", "affine4-g64", "affine4-g32-bf16"])
def test_solvers_lower_the_error_that_they_minimize(name: str) -> None:
    grid, weight = grid_of(name), weights(64, 128, seed=5)
    random = np.random.default_rng(6)
    mixing = random.standard_normal((128, 128)) / 8 + np.diag(random.lognormal(0, 1, 128))
    inputs = (random.standard_normal((4096, 128)) @ mixing).astype(np.float32)
    hessian = inputs.T @ inputs / len(inputs)
    stats = LayerStats(len(inputs), np.diagonal(hessian).copy(), hessian=(hessian,))

    def error(decoded: Float32) -> float:
        return square((decoded - weight) @ inputs.T)

    nearest, searched, solved = (
        error(solve(weight, grid, stats).decode()) for solve in (rtn, scale_search, gptq)
    )
    assert searched < 0.95 * nearest
    assert solved < 0.7 * searched


@pytest.mark.parametrize("name", ["affine2-g32", "affine4-g64", "affine8-g128", "affine4-g64-bf16"])
def test_extreme_groups(name: str) -> None:
    grid = grid_of(name)
    weight = np.zeros((5, 128), np.float32)
    weight[1] = 0.5  # all alike
    weight[2, ::2] = 60000.0
    weight[3] = np.linspace(-1e-7, 1e-7, 128)
    weight[4] = np.linspace(3.0, 3.5, 128)  # far from zero: the bias is no multiple of the scale
    found = rtn(weight, grid)
    decoded = found.decode()
    assert np.isfinite(decoded).all()
    assert not decoded[0].any()
    assert np.array_equal(decoded[1], weight[1])
    assert np.abs(decoded[2] - weight[2]).max() <= 60000 / (2**grid.bits - 1)
    assert np.abs(decoded[3]).max() <= 2e-7
    assert np.abs(decoded[4] - weight[4]).max() <= 0.5 / (2**grid.bits - 1) + 0.02


def test_what_does_not_fit_is_refused() -> None:
    grid = grid_of("affine4-g64")
    with pytest.raises(GridError, match="96 columns are not a multiple of 64") as caught:
        rtn(np.zeros((2, 96), np.float32), grid)
    assert caught.value.hint == "group_size 32 fits"
    with pytest.raises(GridError, match="not finite"):
        rtn(np.full((2, 64), np.nan, np.float32), grid)
    for name in ("affine7-g64", "affine4-g16", "affine4-g64-f16"):
        with pytest.raises(GridError, match="there is no grid"):
            get_grid(name)
