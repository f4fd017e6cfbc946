"""Uniform integer grids: the fit against a brute-force search, and extreme groups."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from compress.errors import GridError
from compress.grids import Float32, Params, get_grid
from compress.grids.affine import Affine

NAMES = [
    f"int{bits}-{group}{kind}"
    for bits, group, kind in itertools.product((2, 4, 8), ("g16", "g32", "g128"), ("", "-asym"))
] + ["int2-channel", "int4-channel", "int8-channel"]


def grid_of(name: str) -> Affine:
    grid = get_grid(name)
    assert isinstance(grid, Affine)
    return grid


def weights(rows: int = 48, columns: int = 256, seed: int = 0) -> Float32:
    random = np.random.default_rng(seed)
    spread = random.lognormal(0.0, 0.5, columns)
    return (random.standard_normal((rows, columns)) * spread * 0.02).astype(np.float32)


def plain(weight: Float32, grid: Affine) -> Float32:
    """Round to nearest with the extremes of the group on the extreme codes, in numpy."""
    blocks = weight.reshape(len(weight), grid.groups(weight.shape), -1)
    if grid.symmetric:
        peak = np.take_along_axis(blocks, np.abs(blocks).argmax(2, keepdims=True), 2)
        scale = (peak / -grid.middle).astype(np.float16).astype(np.float32)
        zero = np.full(scale.shape, grid.middle, np.float32)
    else:
        low = np.minimum(blocks.min(2, keepdims=True), 0)
        high = np.maximum(blocks.max(2, keepdims=True), 0)
        scale = ((high - low) / (2**grid.bits - 1)).astype(np.float16).astype(np.float32)
        zero = np.clip(np.rint(-low / np.where(scale == 0, 1, scale)), 0, 2**grid.bits - 1)
    safe = np.where(scale == 0, 1, scale)
    codes = np.clip(np.rint(blocks / safe) + zero, 0, 2**grid.bits - 1)
    return np.asarray((codes - zero) * scale, np.float32).reshape(weight.shape)


def group_errors(weight: Float32, decoded: Float32, grid: Affine) -> Float32:
    blocks = (weight - decoded).reshape(len(weight), grid.groups(weight.shape), -1)
    return np.square(blocks, dtype=np.float64).sum(2).astype(np.float32)


def brute_force(group: Float32, grid: Affine) -> float:
    """Least squared error over a dense sweep of scales, each least-squares refitted."""
    top = 2**grid.bits - 1
    zeros = [grid.middle] if grid.symmetric else range(top + 1)
    reach = np.abs(group).max() * 2
    best = np.inf
    for zero in zeros:
        sweep = np.linspace(reach / top / 4, reach / top * 2, 400)
        scales = np.concatenate([-sweep, sweep]) if grid.symmetric else sweep
        codes = np.clip(np.rint(group / scales[:, None]), -zero, top - zero)
        squares = (codes * codes).sum(1)
        refit = (codes * group).sum(1) / np.maximum(squares, 1e-30)
        best = min(best, float(np.square(group - codes * refit[:, None]).sum(1).min()))
    return best


@pytest.mark.parametrize("name", ["int4-g16", "int4-g32", "int4-g16-asym", "int4-g32-asym"])
def test_fit_is_close_to_brute_force(name: str) -> None:
    grid = grid_of(name)
    weight = weights(24, 64, seed=3)
    ours = group_errors(weight, grid.quantize(weight).decode(), grid)
    groups = weight.reshape(-1, grid.group_size).astype(np.float64)
    best = np.array([brute_force(group, grid) for group in groups]).reshape(ours.shape)
    # float16 scales cost the fit up to a few 1e-4 of the error; the sweep's are exact.
    assert (ours >= best * 0.999).all()
    assert ours.sum() <= 1.05 * best.sum()


@pytest.mark.parametrize("name", NAMES)
def test_never_worse_than_plain_rounding(name: str) -> None:
    grid = grid_of(name)
    for weight in (weights(), weights(seed=1) + 0.05, np.abs(weights(seed=2))):
        ours = group_errors(weight, grid.quantize(weight).decode(), grid)
        theirs = group_errors(weight, plain(weight, grid), grid)
        assert (ours <= theirs * (1 + 1e-5)).all()
        assert ours.sum() < theirs.sum()


@pytest.mark.parametrize("group", [16, 32, 128])
def test_zero_point_lowers_the_error(group: int) -> None:
    weight = weights(seed=5)
    errors = [
        group_errors(weight, grid.quantize(weight).decode(), grid)
        for grid in (grid_of(f"int4-g{group}"), grid_of(f"int4-g{group}-asym"))
    ]
    assert errors[1].sum() < errors[0].sum()
    assert (errors[1] < errors[0]).mean() > 0.55


def test_importance_moves_the_error_to_columns_that_matter_less() -> None:
    weight = weights(64, 128, seed=6)
    importance = np.where(np.arange(128) % 8 == 0, 100.0, 1.0).astype(np.float32)
    for name in ("int4-g32", "int4-g32-asym", "int4-channel"):
        grid = grid_of(name)
        blind = np.square(weight - grid.quantize(weight).decode())
        seeing = np.square(weight - grid.quantize(weight, importance).decode())
        assert (seeing * importance).sum() < 0.95 * (blind * importance).sum()
        assert seeing.sum() > blind.sum()


def test_scale_of_importance_is_of_no_account() -> None:
    weight = weights()
    importance = np.random.default_rng(0).gamma(1.0, size=256).astype(np.float32)
    grid = grid_of("int4-g32")
    small, large = (grid.quantize(weight, importance * factor) for factor in (2.0**-20, 2.0**20))
    assert np.array_equal(small.codes, large.codes)
    assert grid.fit(weight, np.zeros(256, np.float32))["scale"].any()


@pytest.mark.parametrize("name", NAMES)
def test_degenerate_groups(name: str) -> None:
    grid = grid_of(name)
    weight = weights(8)
    weight[0] = 0
    weight[1] = 0.37
    weight[2] = -0.37
    weight[3, 5] = 60000.0
    weight[4] = 1e-8
    weight[5] *= 1e-30
    decoded = grid.quantize(weight).decode()
    assert np.isfinite(decoded).all()
    assert (decoded[0] == 0).all()
    np.testing.assert_allclose(decoded[1:3], weight[1:3], rtol=0.08)
    assert decoded[3, 5] == pytest.approx(60000.0, rel=0.08)
    assert np.abs(decoded[4:6]).max() <= 2.0**-24
    # Other rows have the same result as without the special rows.
    alone = grid.quantize(weight[6:]).decode()
    assert np.array_equal(alone, decoded[6:])


@pytest.mark.parametrize("name", NAMES)
def test_codes_and_parameters_are_what_the_files_hold(name: str) -> None:
    grid = grid_of(name)
    weight = weights(10, 256)
    quantized = grid.quantize(weight)
    groups = grid.groups((10, 256))
    assert quantized.codes.dtype == np.uint8
    assert quantized.codes.shape == (10, 256)
    assert quantized.codes.max() < 2**grid.bits
    assert quantized.params["scale"].dtype == np.float16
    assert quantized.params["zero_point"].dtype == np.uint8
    assert quantized.params["scale"].shape == quantized.params["zero_point"].shape == (10, groups)
    if grid.symmetric:
        assert (quantized.params["zero_point"] == grid.middle).all()
    # decode, spelled out
    codes = quantized.codes.reshape(10, groups, -1).astype(np.float32)
    zero = quantized.params["zero_point"][..., None].astype(np.float32)
    scale = quantized.params["scale"][..., None].astype(np.float32)
    assert np.array_equal(quantized.decode(), ((codes - zero) * scale).reshape(10, 256))
    # encode finds the nearest level
    assert np.array_equal(grid.encode(quantized.decode(), quantized.params), quantized.codes)
    nearest = np.abs(weight - quantized.decode())
    for step in (-1, 1):
        moved = np.clip(quantized.codes.astype(int) + step, 0, 2**grid.bits - 1).astype(np.uint8)
        assert (nearest <= np.abs(weight - grid.decode(moved, quantized.params)) + 1e-7).all()


def test_same_bytes_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.grids import lanes

    weight = weights(700, 128)

    def run(name: str, threads: int) -> tuple[np.ndarray, Params]:
        monkeypatch.setattr(lanes, "worker_threads", lambda: threads)
        quantized = grid_of(name).quantize(weight)
        return quantized.codes, quantized.params

    for name in ("int4-g32", "int4-g32-asym"):
        codes, params = run(name, 1)
        for threads in (2, 5):
            again, others = run(name, threads)
            assert np.array_equal(codes, again)
            assert all(np.array_equal(params[key], others[key]) for key in params)


def test_a_slab_is_quantized_as_the_whole() -> None:
    weight = weights(100)
    for name in ("int4-g32", "int8-g16-asym"):
        grid = grid_of(name)
        whole = grid.quantize(weight)
        slab = grid.quantize(weight[33:90])
        assert np.array_equal(whole.codes[33:90], slab.codes)


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [
        ("int4-g32", 8 * 96 // 2 + 8 * 3 * 2),
        ("int4-g32-asym", 8 * 96 // 2 + 8 * 3 * 2 + 8 * 2),  # three half bytes take two
        ("int8-g32-asym", 8 * 96 + 8 * 3 * 2 + 8 * 3),
        ("int8-channel", 8 * 96 + 8 * 2),
    ],
)
def test_bytes(name: str, nbytes: int) -> None:
    assert grid_of(name).nbytes((8, 96)) == nbytes


def test_refusals() -> None:
    with pytest.raises(GridError, match="not a multiple of 128") as caught:
        grid_of("int4-g128").quantize(weights(4, 576 // 2 + 32))
    assert "group_size 64" in caught.value.hint
    with pytest.raises(GridError, match="power of two"):
        get_grid("int4-g48")
    for bad in (np.nan, np.inf, 1e6):
        weight = weights(4)
        weight[2, 7] = bad
        with pytest.raises(GridError, match="not finite or beyond"):
            grid_of("int4-g32").quantize(weight)
    with pytest.raises(GridError, match="importance"):
        grid_of("int4-g32").quantize(weights(4), np.ones(3, np.float32))
