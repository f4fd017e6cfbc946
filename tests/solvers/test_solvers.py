"""Solvers by name, with statistics bound; and what importance is worth on every grid."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from compress.calibration.statistics import LayerStats, Statistics
from compress.checkpoint.checkpoint import read_json
from compress.decoder.config import DecoderConfig
from compress.errors import UsageError
from compress.grids import get_grid
from compress.solvers import get_solver, rtn, scale_search

GRIDS = [
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL",
    "IQ4_XS", "IQ3_S", "IQ3_XXS", "MXFP4",
    "int4-g32", "int4-g128", "int4-g32-asym", "int4-channel", "int8-g32",
    "lut4-g8", "lut4-g16", "lut4-tensor", "lut2-g8", "lut6-g8",
]  # fmt: skip


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    draw = np.random.default_rng(0)
    return (draw.standard_normal((64, 512)) * draw.lognormal(0, 0.3, 512) * 0.05).astype("f4")


@pytest.fixture(scope="module")
def stats() -> LayerStats:
    """Importance as models have it: a few columns carry most of it."""
    draw = np.random.default_rng(1)
    return LayerStats(1000, draw.lognormal(0, 1.5, 512).astype(np.float32))


@pytest.mark.parametrize("name", GRIDS)
def test_the_weighted_error_is_never_above_rtns(weight, stats, name):
    grid = get_grid(name)

    def error(found) -> float:
        return float(((found.decode() - weight) ** 2 * stats.importance).sum(dtype=np.float64))

    assert error(scale_search(weight, grid, stats)) <= error(rtn(weight, grid))


@pytest.mark.parametrize("name", ["Q4_K", "int4-g32", "lut4-g8", "F16"])
def test_without_importance_it_is_rtn(weight, name):
    grid = get_grid(name)
    plain = rtn(weight, grid).decode()
    assert (scale_search(weight, grid).decode() == plain).all()
    unused = LayerStats(10, np.zeros(512, np.float32))  # an input that is always zero
    assert (scale_search(weight, grid, unused).decode() == plain).all()


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "int4-g32", "lut4-g8"])
def test_slabs_of_rows_are_the_whole(weight, stats, name):
    grid = get_grid(name)
    whole = scale_search(weight, grid, stats).decode()
    slabs = [scale_search(weight[a : a + 16], grid, stats).decode() for a in range(0, 64, 16)]
    assert (np.concatenate(slabs) == whole).all()


def test_statistics_are_found_by_weight_name(weight, stats, tmp_path):
    folder = tiny.make("phi3", tmp_path, tokenizer=False)
    config = DecoderConfig.from_hf(read_json(folder / "config.json"))
    statistics = Statistics.of(config, {"blocks.1.down_proj": stats})
    solve, grid = get_solver("scale_search"), get_grid("int4-g32")
    known = solve(weight, grid, statistics.for_weight("blocks.1.down_proj.weight")).decode()
    assert (known == scale_search(weight, grid, stats).decode()).all()
    for name in ("embed_tokens.weight", "blocks.0.down_proj.weight"):
        found = solve(weight, grid, statistics.for_weight(name))
        assert (found.decode() == rtn(weight, grid).decode()).all()
    assert (get_solver("rtn")(weight, grid, None).decode() == rtn(weight, grid).decode()).all()


def test_an_unknown_solver_is_named():
    with pytest.raises(UsageError, match="unknown solver 'awk'") as caught:
        get_solver("awk")
    assert "scale_search" in caught.value.hint
