"""The palettes against exact k-means: the full dynamic program, without its shortcuts."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from compress.errors import GridError
from compress.grids import Grid, get_grid
from compress.plan.shapes import bits_per_weight

Array = Any


def optimum(values: Array, shares: Array, levels: int) -> float:
    """Least weighted squared error of ``levels`` centers, by trying every split of every prefix.

    O(levels · n²), float64, centers not rounded: a lower bound for any palette.
    """
    order = np.argsort(values, kind="stable")
    x, w = values[order].astype(np.float64), shares[order].astype(np.float64)
    sums = [np.concatenate([[0.0], np.cumsum(part)]) for part in (w, w * x, w * x * x)]
    mass, first, second = (part[None, 1:] - part[:-1, None] for part in sums)  # [start, end]
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.where(np.tri(len(x), k=-1, dtype=bool), np.inf, second - first**2 / mass)
    cost = error[0]
    for _ in range(levels - 1):
        cost = np.minimum(cost, (cost[:-1, None] + error[1:]).min(0))
    return float(cost[-1])


def squared_error(weight: Array, decoded: Array, importance: Array | None = None) -> float:
    error = (decoded.astype(np.float64) - weight) ** 2
    return float((error if importance is None else error * importance).sum())


def sample(kind: str, shape: tuple[int, int]) -> Array:
    rng = np.random.default_rng(7)
    values = {
        "normal": lambda: rng.normal(size=shape),
        "heavy": lambda: rng.standard_t(3, size=shape),
        "uniform": lambda: rng.uniform(-1, 1, size=shape),
        "outlier": lambda: (
            np.where(np.arange(np.prod(shape)) == 77, 500.0, 1.0).reshape(shape)
            * rng.normal(size=shape)
        ),
        "shifted": lambda: 30 + 0.1 * rng.normal(size=shape),
    }[kind]()
    return values.astype(np.float32)


# 4 x 128 values take the exact path, 8 x 256 the histogram.
@pytest.mark.parametrize("shape", [(4, 128), (8, 256)])
@pytest.mark.parametrize("kind", ["normal", "heavy", "uniform", "outlier", "shifted"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_error_is_the_optimum(bits: int, kind: str, shape: tuple[int, int]) -> None:
    weight = sample(kind, shape)
    best = optimum(weight.ravel(), np.ones(weight.size), 1 << bits)
    found = squared_error(weight, get_grid(f"lut{bits}-g{shape[0]}").quantize(weight).decode())
    # What float16 tables cost at most: each value of a cell moved by half a unit at the largest.
    rounding = np.abs(weight).max() * 2.0**-11 if kind == "shifted" else 0.0
    assert found <= best * 1.001 + weight.size * rounding**2


@pytest.mark.parametrize(("bits", "columns"), [(6, 256), (8, 192)])
def test_error_is_near_the_optimum_for_large_tables(bits: int, columns: int) -> None:
    weight = sample("heavy", (8, columns))
    best = optimum(weight.ravel(), np.ones(weight.size), 1 << bits)
    found = squared_error(weight, get_grid(f"lut{bits}-g8").quantize(weight).decode())
    assert found < 1.01 * best


@pytest.mark.parametrize("shape", [(4, 128), (8, 256)])
def test_importance_weighs_the_error(shape: tuple[int, int]) -> None:
    weight = sample("heavy", shape)
    importance = np.random.default_rng(3).gamma(0.3, size=shape[1]).astype(np.float32)
    grid = get_grid(f"lut3-g{shape[0]}")
    best = optimum(weight.ravel(), np.tile(importance, shape[0]), 8)
    weighted = squared_error(weight, grid.quantize(weight, importance).decode(), importance)
    assert weighted <= 1.002 * best
    assert weighted < 0.9 * squared_error(weight, grid.quantize(weight).decode(), importance)
    zeros = grid.quantize(weight, np.zeros(shape[1], np.float32))  # nothing was measured
    assert np.array_equal(zeros.decode(), grid.quantize(weight).decode())


@pytest.mark.parametrize("kind", ["normal", "heavy", "uniform", "outlier"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_weighted_error_is_the_optimum(bits: int, kind: str) -> None:
    weight = sample(kind, (8, 256))
    importance = np.random.default_rng(bits).lognormal(0, 2, 256).astype(np.float32)
    best = optimum(weight.ravel(), np.tile(importance, 8), 1 << bits)
    grid = get_grid(f"lut{bits}-g8")
    found = squared_error(weight, grid.quantize(weight, importance).decode(), importance)
    plain = squared_error(weight, grid.quantize(weight).decode(), importance)
    assert found <= 1.005 * best
    assert found <= plain


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("bits", "columns"), [(1, 9), (2, 7)])
def test_no_assignment_of_a_few_values_is_better(bits: int, columns: int, seed: int) -> None:
    """Every way to give each value a table entry, each entry the weighted mean of its values."""
    draw = np.random.default_rng(seed)
    weight = draw.standard_normal((1, columns)).astype(np.float32)
    importance = draw.gamma(0.5, size=columns).astype(np.float32) + np.float32(1e-3)
    x, w = weight[0].astype(np.float64), importance.astype(np.float64)
    ways = np.array(list(product(range(1 << bits), repeat=columns)))
    total = np.zeros(len(ways))
    for entry in range(1 << bits):
        mass, first, second = (np.where(ways == entry, m, 0).sum(1) for m in (w, w * x, w * x * x))
        total += second - first**2 / np.maximum(mass, 1e-12)
    found = get_grid(f"lut{bits}-g1").quantize(weight, importance)
    error = squared_error(weight, found.decode(), importance)
    rounding = (w * (2.0**-11 * np.abs(x)) ** 2).sum()  # of the table to float16
    assert total.min() - 1e-9 <= error <= total.min() + 2 * rounding + 1e-9


def test_groups_have_their_own_tables() -> None:
    weight = np.concatenate([sample("normal", (8, 160)), 100 * sample("normal", (8, 160))])
    grouped = get_grid("lut4-g8").quantize(weight)
    alone = get_grid("lut4-tensor").quantize(weight[8:])
    assert grouped.params["lut"].shape == (2, 16)
    assert np.array_equal(grouped.params["lut"][1], alone.params["lut"][0])
    assert np.array_equal(grouped.codes[8:], alone.codes)


def test_codes_are_nearest_and_decode_is_the_table() -> None:
    weight = sample("heavy", (16, 96))
    grid = get_grid("lut3-g8")
    params = grid.fit(weight)
    codes = grid.encode(weight, params)
    table = params["lut"].astype(np.float32)[np.arange(16) // 8]  # [rows, levels]
    distance = np.abs(weight[:, :, None] - table[:, None, :])
    chosen = np.take_along_axis(distance, codes[:, :, None].astype(np.int64), 2)[..., 0]
    assert np.array_equal(chosen, distance.min(2))
    assert np.array_equal(
        grid.decode(codes, params), np.take_along_axis(table, codes.astype(np.int64), 1)
    )
    assert np.array_equal(grid.encode(weight[:, 5:6], params), codes[:, 5:6])  # solvers' columns


@pytest.mark.parametrize("columns", [16, 400])
def test_few_distinct_values_are_kept_exactly(columns: int) -> None:
    values = np.array([-3.0, -2.9990234, 0.0, 0.5, 1000.0], np.float32)
    weight = values[np.random.default_rng(1).integers(0, 5, size=(8, columns))]
    quantized = get_grid("lut4-g8").quantize(weight)
    assert np.array_equal(quantized.decode(), weight.astype(np.float16).astype(np.float32))
    assert (np.diff(quantized.params["lut"].astype(np.float32), axis=1) >= 0).all()


@pytest.mark.parametrize("value", [0.0, -0.25, 65504.0, 6e-8])
def test_constant_rows(value: float) -> None:
    for columns in (16, 400):
        weight = np.full((8, columns), value, np.float32)
        decoded = get_grid("lut4-g8").quantize(weight).decode()
        assert np.array_equal(decoded, weight.astype(np.float16).astype(np.float32))


def test_refusals() -> None:
    with pytest.raises(GridError, match="beyond float16"):
        get_grid("lut4-tensor").fit(np.full((2, 8), 1e6, np.float32))
    with pytest.raises(GridError, match="12 rows are not a multiple of 8") as caught:
        get_grid("lut4-g8").check((12, 64))
    assert "lut4-g4" in caught.value.hint
    for name in ("lut5-g8", "lut4-g0", "lut4-channel"):
        with pytest.raises(GridError):
            get_grid(name)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("lut4-g8", 4 + 256 / (8 * 64)), ("lut1-tensor", 1 + 32 / 1024), ("lut3-g16", 3.125)],
)
def test_bytes(name: str, bits: float) -> None:
    grid: Grid = get_grid(name)
    shape = (16, 64)
    assert grid.name == name
    assert bits_per_weight(grid.nbytes(shape), 16 * 64) == bits
    packed = grid.quantize(sample("normal", shape)).pack()
    code = int(name[3])
    assert packed["codes"].shape == shape
    assert packed["codes"].max() < 1 << code
    assert grid.nbytes(shape) == packed["codes"].size * code // 8 + packed["lut"].nbytes


def test_same_input_same_bytes() -> None:
    weight = sample("heavy", (16, 512))
    first, second = (get_grid("lut4-g8").quantize(weight.copy()) for _ in range(2))
    assert first.params["lut"].tobytes() == second.params["lut"].tobytes()
    assert first.codes.tobytes() == second.codes.tobytes()
