"""GPTQ against its definition in float64, and against scale_search on real and made-up inputs."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from compress import machine
from compress.calibration.statistics import LayerStats
from compress.calibration.walk import walk
from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.config import DecoderConfig
from compress.decoder.tokenizer import Tokenizer
from compress.demo import heldout_path, model_path
from compress.grids import CodebookGrid, LatticeGrid, get_grid
from compress.solvers import gptq as module
from compress.solvers import scale_search
from compress.solvers.gptq import descend, gptq, round_rows
from compress.solvers.hessian import factor_in_place, factors_of, output_errors
from compress.solvers.rounding import Spans, Whole

GRIDS = [
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL",
    "IQ4_XS", "IQ3_S", "IQ3_XXS", "MXFP4",
    "int4-g32", "int4-g128", "int4-g32-asym", "int4-channel", "int8-g32",
    "lut4-g8", "lut4-g16", "lut4-tensor", "lut2-g8", "lut6-g8",
]  # fmt: skip
# 512 and 256 words to search: what default runs have of them is the words' rounding itself, slabs,
# and IQ3_XXS on few rows.
SLOW = {name: pytest.param(name, marks=pytest.mark.slow) for name in ("IQ3_S", "IQ3_XXS")}


def correlated(columns: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Inputs as layers see them: a few directions and a few columns carry most, float32."""
    draw = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((columns // 8 + 1, columns))
    x = draw.standard_normal((tokens, len(mixing))) @ mixing + draw.standard_normal(
        (tokens, columns)
    )
    return (x * np.random.default_rng(98).lognormal(0, 0.7, columns)).astype(np.float32)


def stats_of(x: np.ndarray, blocks: int = 1) -> LayerStats:
    parts = np.split(x, blocks, axis=1)
    hessians = tuple((p.T @ p / len(p)).astype(np.float32) for p in parts)
    return LayerStats(len(x), (x * x).mean(0), x.mean(0), hessians)


def weight_of(rows: int, columns: int, seed: int = 7) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return (draw.standard_normal((rows, columns)) * 0.05).astype(np.float32)


def compensated(weight, grid, stats, descents=0):
    """Without the falling back: codes, what they leave of the weight, and their parameters."""
    whole = grid.lattice(scale_search(weight, grid, stats).params)
    everything = slice(0, len(weight))
    fits = Spans(grid, weight.shape[1]) if grid.span else Whole(whole, len(weight), everything)
    codes, left = round_rows(weight, factors_of(stats, grid.span, 0.01), fits, 128)
    for _ in range(descents):
        descend(weight, codes, left, fits, stats, damping=module.DAMPING, block=128)
    return codes, left, fits.params()


def brute_force(weight, grid, stats):
    """Column by column, with each error distributed by a newly inverted Hessian (Optimal Brain
    Quantization), and scales from the current weights of their columns."""
    h = np.float64(stats.hessian[0])
    span, diagonal = grid.span or len(h), np.diagonal(h).copy()
    h = h + 0.01 * diagonal.mean() * np.eye(len(h))
    groups = [range(start, start + span) for start in range(0, len(h), span)]
    groups.sort(key=lambda group: -diagonal[group].sum())
    order = [column for group in groups for column in sorted(group, key=lambda c: -diagonal[c])]
    inverses = [np.linalg.inv(h[np.ix_(order[k:], order[k:])])[0] for k in range(len(h))]
    cost = {column: 1 / inverse[0] for column, inverse in zip(order, inverses, strict=True)}
    params = scale_search(weight, grid, stats).params
    w = np.float64(weight)
    for place, (column, inverse) in enumerate(zip(order, inverses, strict=True)):
        group = groups[place // span]
        if grid.span and place % span == 0:
            params = grid.fit(np.float32(w[:, group]), np.float32([cost[c] for c in group]))
        nearest = grid.decode(grid.encode(np.float32(w[:, group]), params), params)
        error = (w[:, column] - nearest[:, column - group[0]]) * cost[column]
        w[:, order[place:]] -= np.outer(error, inverse)
    return w


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("int4-g16", 16), ("int4-g16", 64), ("int4-g16-asym", 48), ("int8-g16", 32),
        ("int4-channel", 16), ("lut2-g4", 16), ("lut4-g8", 16), ("lut3-tensor", 40),
        ("IQ4_NL", 64), ("Q4_0", 64), ("Q5_1", 64), ("Q4_K", 256), ("Q3_K", 512), ("Q6_K", 256),
        ("IQ4_XS", 256), ("IQ4_XS", 512), ("MXFP4", 64),
    ],
)  # fmt: skip
def test_it_is_the_definition(name, columns):
    grid, weight = get_grid(name), weight_of(8, columns)
    stats = stats_of(correlated(columns, 4 * columns))
    codes, left, params = compensated(weight, grid, stats)
    expected = brute_force(weight, grid, stats)
    np.testing.assert_allclose(weight - left, expected, rtol=0, atol=1e-6)
    if params:  # the file's parameters decode to the same
        np.testing.assert_allclose(grid.decode(codes, params), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [SLOW[name] if name == "IQ3_S" else name for name in GRIDS])
def test_correlated_inputs_see_less_error(name):
    rows = 16 if name == "IQ3_XXS" else 64
    grid, weight, stats = get_grid(name), weight_of(rows, 512), stats_of(correlated(512, 2048))
    assert isinstance(grid, LatticeGrid | CodebookGrid)
    found, searched = gptq(weight, grid, stats), scale_search(weight, grid, stats)
    fresh = stats_of(correlated(512, 1024, seed=1))  # inputs that neither has seen

    def error(quantized) -> float:
        return float(output_errors(weight - quantized.decode(), fresh).sum())

    assert error(found) < 0.8 * error(searched)
    assert {k: v.shape for k, v in found.params.items()} == {
        k: v.shape for k, v in searched.params.items()
    }
    assert {k: v.dtype for k, v in found.params.items()} == {
        k: v.dtype for k, v in searched.params.items()
    }


def test_dense_grids_only_round():
    weight, stats = weight_of(8, 64), stats_of(correlated(64, 256))
    assert (gptq(weight, get_grid("F16"), stats).codes == weight.astype(np.float16)).all()


# --- the demo model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    """Weights by name, and the statistics of two halves of a text."""
    checkpoint = Checkpoint.open(model_path())
    config = DecoderConfig.from_hf(checkpoint.config)
    read = Stored(checkpoint, config).read
    tokens = Tokenizer(model_path()).encode(heldout_path().read_text(encoding="utf-8"))
    windows = [tokens[start : start + 256] for start in range(0, 32 * 256, 256)]
    seen, fresh = {}, {}
    for part, stats in ((windows[:24], seen), (windows[24:], fresh)):
        for found in walk(config, read, part, hessian=True):
            stats |= found
    return config, read, seen, fresh


@pytest.mark.parametrize("name", ["Q4_K", "IQ4_XS", *SLOW.values(), "MXFP4", "int4-g32", "lut4-g8"])
def test_every_linear_of_the_demo_is_better_off(demo, name):
    config, read, seen, fresh = demo
    roles = {"q_proj": "qkv_proj", "o_proj": "o_proj", "gate_proj": "gate_up_proj",
             "down_proj": "down_proj"}  # fmt: skip
    grid, ratios = get_grid(name), {}
    for index in range(config.num_hidden_layers):
        for source, role in roles.items():
            key = f"blocks.{index}.{source}"
            weight = read(f"blocks.{index}.{role}.weight")
            errors = [
                output_errors(weight - solve(weight, grid, seen[key]).decode(), fresh[key]).sum()
                for solve in (gptq, scale_search)
            ]
            ratios[key] = errors[0] / errors[1]
    assert max(ratios.values()) < 0.9, ratios
    assert np.exp(np.mean(np.log(list(ratios.values())))) < 0.5, ratios


# --- codebooks --------------------------------------------------------------------------------


def least_cost(grid, scale, x, w, upper, variances, parity=None):
    """Of four columns in one row: the word and signs of least ``Σ D_k z_k²``, by trying all (of
    one parity of minus signs). Returns cost and values."""
    patterns = 1 - 2 * ((np.arange(16)[:, None] >> np.arange(4)) & 1)
    if parity is not None:
        patterns = patterns[patterns.prod(axis=1) == parity]
    q = (patterns[:, None] * grid.levels[grid.words] * scale).reshape(-1, 4)
    z = x - q + (w - q) @ (upper - np.eye(4))
    costs = (z**2 * variances).sum(axis=1)
    best = int(costs.argmin())
    return costs[best], q[best]


@pytest.mark.parametrize("name", ["IQ3_S", "IQ3_XXS"])
def test_words_are_rounded_to_the_best_that_there_is(name):
    """Each word beside what trying all words and signs would find in its place; where eight
    columns share a parity, each half so with either parity."""
    grid, weight = get_grid(name), weight_of(6, 512)
    assert isinstance(grid, CodebookGrid)
    stats = stats_of(correlated(512, 2048))
    (factor,) = factors_of(stats, grid.span, 0.01, grid.together)
    assert (np.diff(factor.order.reshape(-1, grid.together)) == 1).all()
    fits = Spans(grid, 512)
    codes, left = round_rows(weight, (factor,), fits, 128)
    np.testing.assert_allclose(weight - left, grid.decode(codes, fits.params()), atol=1e-6)
    scales = np.repeat(grid.codebook(fits.params()).scale, 32, axis=1)
    upper = np.triu(np.float64(factor.feedback))
    ratios = []
    for w, e, scale in zip(weight, np.float64(left), scales, strict=True):
        w, e, scale = w[factor.order], e[factor.order], scale[factor.order]
        z = e @ upper
        for k in range(0, 512, grid.together):
            part = slice(k, k + 4)
            x = w[part] + e[:k] @ upper[:k, part]
            inner, d = upper[part, part], factor.variances
            if not grid.even:
                least = least_cost(grid, scale[k], x, w[part], inner, d[part])[0]
            else:
                rest, ways = slice(k + 4, k + 8), []
                for parity in (1, -1):
                    cost, q = least_cost(grid, scale[k], x, w[part], inner, d[part], parity)
                    y = w[rest] + e[:k] @ upper[:k, rest] + (w[part] - q) @ upper[part, rest]
                    then = (w[rest], upper[rest, rest], d[rest], parity)
                    ways.append(cost + least_cost(grid, scale[k], y, *then)[0])
                least = min(ways)
            whole = slice(k, k + grid.together)
            ratios.append((z[whole] ** 2 * d[whole]).sum() / least)
    assert np.quantile(ratios, 0.9) < 1.001  # nearly always the very best
    assert np.mean(ratios) < 1.01, np.mean(ratios)


# --- falling back -----------------------------------------------------------------------------


def test_rows_that_measure_worse_on_held_back_inputs_fall_back():
    # Correlations of calibration that have the opposite sign in the held-back inputs.
    draw = np.random.default_rng(5)
    shared = draw.standard_normal((2048, 1))
    noise = draw.standard_normal((2048, 64)) * 0.3
    signs = np.where(np.arange(64) % 2, 1, -1)
    stats = stats_of((shared + noise).astype(np.float32))
    stats = replace(stats, held_back=(shared * signs + noise)[:512].astype(np.float32))
    grid, weight = get_grid("int4-g32"), weight_of(96, 64)
    found, searched = gptq(weight, grid, stats), scale_search(weight, grid, stats)
    x = stats.held_back.astype(np.float64)

    def errors(left) -> np.ndarray:
        return ((left @ x.T) ** 2).mean(1)

    trial = errors(compensated(weight, grid, stats, module.DESCENTS)[1])
    plain = errors(weight - searched.decode())
    np.testing.assert_allclose(errors(weight - found.decode()), np.minimum(trial, plain), rtol=1e-3)
    fallen = int((trial > plain).sum())
    assert 48 < fallen < 96
    assert found.fallen == fallen
    back = trial > plain
    assert (found.codes[back] == searched.codes[back]).all()
    assert (found.params["scale"][back] == searched.params["scale"][back]).all()


@pytest.mark.parametrize("what", ["none", "zero", "nan", "indefinite"])
def test_a_hessian_of_no_use_falls_back(what):
    stats, grid, weight = stats_of(correlated(64, 256)), get_grid("int4-g32"), weight_of(16, 64)
    (h,) = stats.hessian
    bad = {"none": None, "zero": (h * 0,), "nan": (h * np.nan,), "indefinite": (
        np.full_like(h, -5) + np.diag(np.full(64, 10, np.float32)),)}[what]  # fmt: skip
    found = gptq(weight, grid, replace(stats, hessian=bad))
    assert (found.codes == scale_search(weight, grid, stats).codes).all()
    assert found.fallen == (16 if bad else 0)


def test_without_statistics_it_is_rtn():
    grid, weight = get_grid("Q4_K"), weight_of(8, 256)
    assert (gptq(weight, grid).decode() == grid.quantize(weight).decode()).all()


# --- robustness -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Q4_K", "int4-g32", "int4-channel", "lut4-g8"])
def test_dead_columns_harm_nobody(name):
    x = correlated(512, 2048)
    x[:, 100:200] = 0
    grid, weight, stats = get_grid(name), weight_of(64, 512), stats_of(x)
    found, searched = gptq(weight, grid, stats), scale_search(weight, grid, stats)
    left = weight - found.decode()
    assert (
        output_errors(left, stats).sum()
        < 0.8 * output_errors(weight - searched.decode(), stats).sum()
    )
    # They may be nonzero on other texts: still rounded to nearest.
    dead = np.abs(left[:, 100:200]).mean()
    assert dead < 1.5 * np.abs(weight - grid.quantize(weight).decode())[:, 100:200].mean()


@pytest.mark.parametrize("tokens", [3, 40])
def test_fewer_tokens_than_columns(tokens):
    grid, weight, stats = (
        get_grid("int4-g32"),
        weight_of(32, 256),
        stats_of(correlated(256, tokens)),
    )
    found, searched = gptq(weight, grid, stats), scale_search(weight, grid, stats)
    before = output_errors(weight - searched.decode(), stats).sum()
    assert output_errors(weight - found.decode(), stats).sum() < 0.5 * before


def test_a_hessian_that_is_not_quite_positive_is_repaired():
    # The variance of one column is a thousand times the damping, and rounding to 16 bits (as in the
    # cache) has made its correlations impossible for a covariance.
    stats = stats_of(correlated(64, 256))
    h = stats.hessian[0].copy()
    h[0, 0] = h[1, 1] = 1e4 * h.max()
    h[0, 1] = h[1, 0] = 1.02 * h[0, 0]
    assert np.linalg.eigvalsh(h.astype(np.float64)).min() < -1
    spoilt = replace(stats, hessian=(h,), importance=np.diagonal(h).copy())
    (factor,) = factors_of(spoilt, 32, 0.01)
    assert np.isfinite(np.triu(factor.feedback)).all() and (factor.variances > 0).all()
    found = gptq(weight_of(16, 64), get_grid("int4-g32"), spoilt)
    assert np.isfinite(found.decode()).all()


def test_the_factor():
    (h,) = stats_of(correlated(100, 150)).hessian
    upper = h.copy()
    variances = factor_in_place(upper, tile_columns=24)
    upper = np.triu(upper).astype(np.float64)
    assert (np.diagonal(upper) == 1).all()
    np.testing.assert_allclose(upper * variances @ upper.T, h, rtol=0, atol=1e-5 * h.max())
    # D_k is what input k varies by once those after it are known.
    for k in (0, 37, 99):
        known = np.linalg.inv(h[k:, k:].astype(np.float64))[0, 0]
        assert variances[k] == pytest.approx(1 / known, rel=1e-3)


# --- slabs, blocks, settings ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ3_S", "int4-g32", "lut4-g8", "int4-channel"])
def test_slabs_of_rows_are_the_whole(name):
    grid, weight, stats = get_grid(name), weight_of(136, 512), stats_of(correlated(512, 2048))
    whole = gptq(weight, grid, stats)
    again = gptq(weight, grid, stats)
    assert (again.codes == whole.codes).all()
    slabs = [gptq(weight[part], grid, stats) for part in (slice(0, 64), slice(64, 136))]
    assert (np.concatenate([slab.decode() for slab in slabs]) == whole.decode()).all()
    assert (gptq(weight, grid, stats, slab=48).decode() == whole.decode()).all()


def test_a_tensor_wide_table_is_whole_whatever_the_slabs_inside():
    grid, weight, stats = (
        get_grid("lut4-tensor"),
        weight_of(100, 128),
        stats_of(correlated(128, 512)),
    )
    whole = gptq(weight, grid, stats)
    assert (gptq(weight, grid, stats, slab=48).codes == whole.codes).all()


@pytest.mark.parametrize("name", ["Q4_K", "int4-g32", "lut4-g8"])
def test_a_slab_has_one_thread_for_all_its_steps(name, monkeypatch):
    """Threads for each of its thousands of steps took longer than the steps."""
    monkeypatch.setattr(machine, "default_threads", lambda: 2)
    weight, grid = weight_of(512, 512), get_grid(name)
    started = []
    start = threading.Thread.start
    monkeypatch.setattr(
        threading.Thread, "start", lambda thread: (started.append(thread), start(thread))
    )
    gptq(weight, grid, stats_of(correlated(512, 1024)), slab=256)
    assert 2 <= len(started) <= 20  # two slabs, the first fit, the factor; there were 38 to 392


@pytest.mark.parametrize("name", ["Q4_K", "int4-g32", "lut4-g8"])
def test_the_block_changes_nothing_but_speed(name):
    grid, weight, stats = get_grid(name), weight_of(64, 512), stats_of(correlated(512, 2048))
    one, other = (gptq(weight, grid, stats, block=block).codes for block in (32, 512))
    assert (one != other).mean() < 1e-3  # float32 sums in another order


@pytest.mark.parametrize("name", ["Q4_K", "int4-channel", "lut4-g8"])
def test_diagonal_blocks_are_columns_apart(name):
    grid, weight, x = get_grid(name), weight_of(32, 512), correlated(512, 2048)
    split, whole = stats_of(x, blocks=2), stats_of(x)
    apart = whole.hessian[0].copy()
    apart[:256, 256:] = apart[256:, :256] = 0
    found = gptq(weight, grid, split)
    same = gptq(weight, grid, replace(whole, hessian=(apart,)), damping=0.01)
    left, right = (output_errors(weight - q.decode(), split).sum() for q in (found, same))
    assert left == pytest.approx(right, rel=0.03)  # damped by the mean of each half, or of both
    assert (
        left < 0.8 * output_errors(weight - scale_search(weight, grid, split).decode(), split).sum()
    )
