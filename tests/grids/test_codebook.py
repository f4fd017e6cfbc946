"""The codebook grids against gguf-py and ggml (bytes to values), llama.cpp's quantizer (error) and
exhaustive search (words)."""

from __future__ import annotations

import ggml_oracle
import gguf
import numpy as np
import pytest
from test_kquant import COLUMNS, ROWS, TENSORS, bits, importance, weighted

from compress.errors import GridError
from compress.grids import get_grid, lanes
from compress.grids.codebook import WordGrid, make

NAMES = ["IQ3_S", "IQ3_XXS"]
GIVEN = {"plain": None, "importance": importance(), "ones": np.ones(COLUMNS, np.float32)}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN.keys())
@pytest.mark.parametrize("name", NAMES)
def test_error_is_at_most_that_of_llama_cpp(name: str, given: np.ndarray | None) -> None:
    """Weighted as llama.cpp weights it, and weighted by the importance alone."""
    grid = get_grid(name)
    ratios = {}
    for kind, weight in TENSORS.items():
        decoded = grid.quantize(weight, given).decode()
        theirs = ggml_oracle.decode(name, ggml_oracle.quantize(name, weight, given))
        bare = 1.0 if given is None else given.astype(np.float64)
        factors = (ggml_oracle.error_weights(name, weight, given), bare)
        ratios[kind] = tuple(
            weighted(weight, decoded, f) / weighted(weight, theirs, f) for f in factors
        )
        print(f"  {kind:18s} {ratios[kind][0]:.4f}  {ratios[kind][1]:.4f}")
    assert max(max(pair) for pair in ratios.values()) <= 1.0, ratios


@pytest.mark.parametrize("name", NAMES)
def test_importance_lowers_the_error_it_weighs(name: str) -> None:
    weight, given = TENSORS["student-t5"], importance()
    blind, seeing = (get_grid(name).quantize(weight, g).decode() for g in (None, given))
    assert weighted(weight, seeing, given) < 0.97 * weighted(weight, blind, given)


@pytest.mark.parametrize("name", NAMES)
def test_constant_blocks_are_no_worse_than_llama_cpp_s(name: str) -> None:
    """They are not exact: the codebooks have no words of four high levels alike."""
    draw = np.random.default_rng(2)
    weight = np.repeat(draw.standard_normal((ROWS, COLUMNS // 256)), 256, axis=1).astype(np.float32)
    decoded = get_grid(name).quantize(weight).decode()
    theirs = ggml_oracle.decode(name, ggml_oracle.quantize(name, weight))
    assert weighted(weight, decoded, 1.0) <= weighted(weight, theirs, 1.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-10], ids=["zero", "denormal", "below float16"])
def test_what_float16_cannot_hold_becomes_zero(name: str, scale: float) -> None:
    weight = TENSORS["normal"][:3] * np.float32(scale)
    quantized = get_grid(name).quantize(weight)
    assert np.array_equal(np.abs(quantized.decode()), np.zeros_like(weight))


@pytest.mark.parametrize("name", NAMES)
def test_packed_bytes_decode_as_llama_cpp_decodes_them(name: str) -> None:
    grid = make(name)
    for kind in ("student-t5", "positive", "subnormal scales"):
        quantized = grid.quantize(TENSORS[kind], importance())
        blocks = quantized.pack()["blocks"]
        assert blocks.nbytes == grid.nbytes((ROWS, COLUMNS))
        assert np.array_equal(bits(ggml_oracle.decode(name, blocks)), bits(quantized.decode()))
        assert np.array_equal(bits(ggml_oracle.decode_in_c(name, blocks)), bits(quantized.decode()))


@pytest.mark.parametrize("name", NAMES)
def test_every_byte_is_understood(name: str) -> None:
    """Random blocks: unpack, decode as gguf-py does, pack to the same bytes again."""
    grid = make(name)
    blocks = np.random.default_rng(3).integers(0, 256, (32, grid.nbytes((1, COLUMNS))), np.uint8)
    codes, params = grid.unpack(blocks)
    finite = np.where(np.isfinite(params["d"]), params["d"], np.float16(0.5))
    params = {**params, "d": finite}
    blocks = grid.pack(codes, params)["blocks"]
    again, again_params = grid.unpack(blocks)
    assert np.array_equal(codes, again)
    assert all(np.array_equal(bits(params[key]), bits(again_params[key])) for key in params)
    expected = ggml_oracle.decode(name, blocks)
    assert np.array_equal(bits(expected), bits(grid.decode(codes, params)))
    assert np.array_equal(bits(ggml_oracle.decode_in_c(name, blocks)), bits(expected))


def least_errors(
    grid: WordGrid, weight: np.ndarray, scale: np.ndarray, w: np.ndarray
) -> np.ndarray:
    """Of every eight columns, by trying each word with each of its 16 patterns of signs."""
    values = grid.levels[grid.words].astype(np.float64)
    patterns = 1 - 2 * ((np.arange(16)[:, None] >> np.arange(4)) & 1)
    x, w = (v.reshape(-1, 4).astype(np.float64) for v in (weight, w))
    step = np.repeat(scale.reshape(-1), 32 // 4)
    costs = np.empty((len(x), 16))
    for k, pattern in enumerate(patterns):
        r = x[:, None, :] - step[:, None, None] * pattern * values
        costs[:, k] = np.einsum("iwc,ic->iw", r**2, w).min(axis=1)
    both = costs[0::2, :, None] + costs[1::2, None, :]
    minus = (patterns < 0).sum(axis=1)
    if grid.even:
        both[:, (minus[:, None] + minus) % 2 == 1] = np.inf
    return both.min(axis=(1, 2))


@pytest.mark.parametrize("name", NAMES)
def test_words_are_the_nearest_of_all(name: str) -> None:
    """Those of ``encode`` for weights that the parameters were not fitted to, as a solver changes
    them; those of ``quantize`` by the importance of each column."""
    grid = make(name)
    weight = TENSORS["student-t5"][:8, :512]
    moved = (weight * 1.3 + 0.01).astype(np.float32)
    params = grid.fit(weight)
    given = importance()[:512]
    quantized = grid.quantize(weight, given)
    squares = ggml_oracle.mean_squares(weight.astype(np.float64), 256)
    weights = given * np.sqrt(weight**2 + grid.weighted.spread * squares)
    cases = [
        (moved, grid.encode(moved, params), params, np.ones_like(weight)),
        (weight, quantized.codes, quantized.params, weights),
    ]
    for values, codes, used, w in cases:
        errors = w * (values.astype(np.float64) - grid.decode(codes, used)) ** 2
        least = least_errors(grid, values, grid.effective(used), w)
        assert np.all(errors.reshape(-1, 8).sum(axis=1) <= least * (1 + 1e-4))


def test_codes_that_are_no_words_are_refused() -> None:
    for name in NAMES:
        quantized = get_grid(name).quantize(TENSORS["normal"][:2])
        codes = quantized.codes.copy()
        codes[0, :4] = (0, 7, 0, 7)
        assert not (make(name).words == (0, 7, 0, 7)).all(axis=1).any()
        with pytest.raises(GridError, match="not of its codebook"):
            quantized.grid.pack(codes, quantized.params)
    quantized = get_grid("IQ3_XXS").quantize(TENSORS["normal"][:2])
    quantized.codes[1, 9] ^= 8
    with pytest.raises(GridError, match="not of its codebook"):
        quantized.pack()


@pytest.mark.parametrize("name", NAMES)
def test_rows_depend_on_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on their neighbours, nor on being a multiple of the lanes, nor on threads."""
    weight = np.concatenate([TENSORS["student-t5"], TENSORS["outlier channels"]] * 2)[:, :512]
    grid = get_grid(name)
    packed = {}
    for threads in (1, 2):
        monkeypatch.setattr(lanes, "worker_threads", lambda count=threads: count)
        packed[threads] = grid.quantize(weight, importance()[:512]).pack()["blocks"]
    assert np.array_equal(packed[1], packed[2])
    part = grid.quantize(weight[45:82], importance()[:512]).pack()["blocks"]
    assert np.array_equal(part, packed[1][45:82])


def test_sizes_are_those_of_ggml() -> None:
    for name in NAMES:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert make(name).nbytes((5, 512)) == 5 * 512 // block * size


def test_what_does_not_fit_is_refused() -> None:
    grid = make("IQ3_S")
    with pytest.raises(GridError, match="rows of 288 columns are not whole blocks of 256"):
        grid.check((4, 288))
    broken = np.full((2, 256), np.nan, np.float32)
    for work in (grid.fit, grid.quantize, lambda w: grid.encode(w, grid.fit(np.ones_like(w)))):
        with pytest.raises(GridError, match="not finite or beyond"):
            work(broken)
    with pytest.raises(GridError, match="importance"):
        grid.fit(np.ones((2, 256), np.float32), np.full(256, -1, np.float32))
    with pytest.raises(GridError, match="no grid"):
        get_grid("IQ3_M")
    with pytest.raises(GridError, match="no grid"):
        make("IQ2_S")
