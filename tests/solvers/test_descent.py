"""Coordinate descent over the codes, against exhaustive search over each column in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_gptq import correlated, stats_of, weight_of

from compress.grids import get_grid
from compress.solvers import scale_search
from compress.solvers.gptq import best_factors, costs, descend, metric_of, round_rows
from compress.solvers.hessian import factors_of
from compress.solvers.rounding import FACTORS, Spans, Whole

DAMPING = 0.03
CASES = [
    ("int4-g16", 64), ("int4-g16-asym", 48), ("int8-g16", 32), ("int4-channel", 48),
    ("lut2-g4", 40), ("lut4-g8", 64), ("lut3-tensor", 40), ("Q4_0", 64), ("Q5_1", 64),
    ("IQ4_NL", 64), ("Q4_K", 256), ("Q3_K", 512), ("IQ4_XS", 256), ("MXFP4", 64),
]  # fmt: skip


def case(name: str, columns: int, blocks: int = 1):
    """Grid, weight, statistics, and the codes of GPTQ with what they leave and their fits."""
    grid, weight = get_grid(name), weight_of(8, columns)
    stats = stats_of(correlated(columns, 4 * columns), blocks)
    everything = slice(0, len(weight))
    if grid.span:
        fits = Spans(grid, columns)
    else:
        fits = Whole(grid.lattice(scale_search(weight, grid, stats).params), 8, everything)
    factors = factors_of(stats, grid.span, 0.01, getattr(grid, "together", 1))
    codes, left = round_rows(weight, factors, fits, 128)
    return grid, weight, stats, codes, left, fits


def damped(stats) -> np.ndarray:
    """The Hessian with the damping, its other blocks empty, float64."""
    h = np.zeros((len(stats.importance),) * 2)
    start = 0
    for block in stats.hessian:
        part = slice(start, start + len(block))
        h[part, part] = block + DAMPING * np.diagonal(block).mean() * np.eye(len(block))
        start += len(block)
    return h


def output_error(errors: np.ndarray, h: np.ndarray) -> np.ndarray:
    return np.einsum("ij,jk,ik->i", errors, h, errors)


def exhaustive(grid, weight, codes, fits, h) -> tuple[np.ndarray, np.ndarray]:
    """Each column in turn takes, of all codes, the one of least error; then its span is scaled.

    Codes, and the weights that they stand for, float64.
    """
    codes, columns, step = codes.copy(), weight.shape[1], fits.span or 1
    values = np.empty(weight.shape)
    tables = []
    for start in range(0, columns, step):
        lattice, run = fits.at(slice(start, start + step))
        levels = np.broadcast_to(lattice.levels, (len(weight), lattice.levels.shape[1]))
        for k, r in enumerate(run):
            scale, offset = lattice.scale[:, r], lattice.offset[:, r]
            table = np.float64(levels * scale[:, None] - offset[:, None])
            tables.append(np.broadcast_to(table, (len(weight), table.shape[1])).copy())
            values[:, start + k] = np.take_along_axis(table, codes[:, [start + k]], 1)[:, 0]
    rows = np.arange(len(weight))
    for start in range(0, columns, step):
        for k in range(start, start + step):
            errors = []
            for code in range(tables[k].shape[1]):
                values[:, k] = tables[k][:, code]
                errors.append(output_error(weight - values, h))
            codes[:, k] = np.argmin(errors, axis=0)
            values[:, k] = tables[k][rows, codes[:, k]]
        if grid.span:
            part = slice(start, start + step)
            shape = np.zeros(weight.shape)
            shape[:, part] = values[:, part]
            rest = np.float64(weight) - values + shape
            factors = np.einsum("ij,jk,ik->i", shape, h, rest) / output_error(shape, h)
            if found := fits.scaled(part, codes[:, part], np.float32(factors)):
                params, trial = found
                other = values.copy()
                other[:, part] = trial
                lower = output_error(weight - other, h) < output_error(weight - values, h)
                fits.take(part, params, lower)
                values[lower] = other[lower]
    return codes, values


@pytest.mark.parametrize(("name", "columns"), CASES)
def test_each_column_takes_the_best_code(name, columns):
    grid, weight, stats, codes, left, fits = case(name, columns)
    expected, values = exhaustive(grid, weight, codes, case(name, columns)[-1], damped(stats))
    before = codes.copy()
    descend(weight, codes, left, fits, stats, damping=DAMPING, block=32)
    assert (codes == expected).mean() > 0.998  # all but ties
    same = (codes == expected).all(axis=1)
    assert same.sum() >= 6
    np.testing.assert_allclose((weight - left)[same], values[same], rtol=0, atol=2e-5)
    assert (codes != before).any()
    params = fits.params() or scale_search(weight, grid, stats).params
    np.testing.assert_allclose(grid.decode(codes, params), weight - left, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "columns"), [*CASES, ("IQ3_S", 512), ("IQ3_XXS", 256)])
def test_the_error_only_falls(name, columns):
    _, weight, stats, codes, left, fits = case(name, columns)
    h = damped(stats)
    errors = [output_error(left, h)]
    for _ in range(3):
        descend(weight, codes, left, fits, stats, damping=DAMPING, block=64)
        errors.append(output_error(left, h))
        assert (errors[-1] <= errors[-2] * (1 + 1e-5)).all()
    assert errors[1].sum() < 0.995 * errors[0].sum()


@pytest.mark.parametrize("name", ["IQ3_S", "IQ3_XXS"])
def test_a_word_takes_what_is_best_beside_all_others(name):
    """What the kernel minimizes is, but for a constant, the output error."""
    grid, _, stats, _, left, _ = case(name, 256)
    square, part = np.float32(damped(stats)), slice(0, 32)
    pull = left[:, 32:] @ square[32:, part]
    square = square[part, part]
    feedback, variances, settle, later = metric_of(square, grid.together)
    c = (pull + left[:, part] @ later) @ settle
    draw = np.random.default_rng(1)
    for first in range(0, 32, grid.together):
        word, rest = slice(first, first + grid.together), left[:, part].copy()
        c_word = c[:, word] + rest[:, :first] @ feedback[:first, word]
        totals = []
        for _ in range(2):
            rest[:, word] = draw.standard_normal((8, grid.together)) * 0.01
            z = c_word + rest[:, word] @ np.triu(feedback[word, word])
            totals.append((costs(rest, square, pull), (z**2 * variances[word]).sum(axis=1)))
        whole, mine = np.subtract(*totals)
        np.testing.assert_allclose(mine, whole, rtol=2e-3, atol=1e-6 * np.abs(whole).max())


def test_diagonal_blocks_are_looked_at_apart():
    grid, weight, stats, codes, left, fits = case("int4-g16", 64, blocks=2)
    descend(weight, codes, left, fits, stats, damping=DAMPING, block=128)
    second = replace(stats, hessian=stats.hessian[1:])
    _, _, _, alone, rest, _ = case("int4-g16", 64, blocks=2)
    half = slice(32, 64)
    narrow = Spans(grid, 32)
    narrow.fitted = case("int4-g16", 64, blocks=2)[-1].fitted[2:]
    weight, alone, rest = (np.ascontiguousarray(a[:, half]) for a in (weight, alone, rest))
    descend(weight, alone, rest, narrow, second, damping=DAMPING, block=128)
    assert (alone == codes[:, half]).all() and (rest == left[:, half]).all()


def test_factors_are_those_of_least_squares():
    draw = np.random.default_rng(5)
    weight, rounded, others = draw.standard_normal((3, 4, 16)).astype(np.float32)
    h = np.cov(draw.standard_normal((32, 100))).astype(np.float32)
    pull = others @ h[16:, :16]
    rounded[2] = 0  # nothing to scale
    found = best_factors(weight, rounded, h[:16, :16], pull)
    root = np.linalg.cholesky(np.float64(h))
    for row in (0, 1, 3):
        target = np.concatenate([weight[row], others[row]]) @ root
        (factor,), *_ = np.linalg.lstsq(
            (np.concatenate([rounded[row], 0 * others[row]]) @ root)[:, None], target
        )
        np.testing.assert_allclose(found[row], factor, rtol=1e-4)
    assert found[2] == 1


def test_a_span_is_scaled_by_its_float16_parameters():
    grid, weight = get_grid("Q4_K"), weight_of(4, 256)
    fits, part = Spans(grid, 256), slice(0, 256)
    fits.fitted[0] = grid.fit(weight)
    codes = grid.encode(weight, fits.fitted[0])
    before = grid.decode(codes, fits.fitted[0])
    params, values = fits.scaled(part, codes, np.float32([1.1, 1.1, 9.0, 0.01]))
    for row, factor in enumerate([1.1, 1.1, *FACTORS[::-1]]):
        np.testing.assert_allclose(values[row], factor * before[row], rtol=0, atol=5e-4)
    fits.take(part, params, np.array([True, False, True, True]))
    after = grid.decode(codes, fits.params())
    assert (after[1] == before[1]).all() and (after[[0, 2, 3]] == values[[0, 2, 3]]).all()
    exponents = Spans(get_grid("MXFP4"), 32)
    exponents.fitted[0] = exponents.grid.fit(weight[:, :32])
    assert exponents.scaled(slice(0, 32), codes[:, :32], np.ones(4, np.float32)) is None
