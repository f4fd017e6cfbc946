"""The GGUF block grids against gguf-py (bytes to values) and llama.cpp's quantizer (error)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import ggml_oracle
import gguf
import numba
import numpy as np
import pytest

import compress
from compress.errors import GridError
from compress.grids import get_grid, lanes
from compress.grids.kquant import BlockGrid, make

NAMES = [
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K",
]  # fmt: skip
ALL = [*NAMES, "MXFP4"]
ROWS, COLUMNS = 64, 2048


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint8)


def importance() -> np.ndarray:
    return np.exp(np.random.default_rng(1).standard_normal(COLUMNS)).astype(np.float32)


def tensors() -> dict[str, np.ndarray]:
    """Usual and extreme weights."""
    draw = np.random.default_rng(0)
    shape = (ROWS, COLUMNS)
    normal = draw.standard_normal(shape) * 0.02
    kinds = {
        "normal": normal,
        "student-t5": draw.standard_t(5, shape) * 0.02,
        "laplace": draw.laplace(size=shape),
        "outlier channels": normal * np.where(draw.random(COLUMNS) < 0.01, 20, 1),
        "positive": np.abs(normal),
        "zero blocks": normal * np.repeat(draw.random((ROWS, COLUMNS // 256)) < 0.5, 256, axis=1),
        "zero runs": normal * np.repeat(draw.random((ROWS, COLUMNS // 32)) < 0.5, 32, axis=1),
        "rows of any size": normal * np.exp(3 * draw.standard_normal((ROWS, 1))),
        "tiny": normal * 5e-4,
        "subnormal scales": normal * 5e-5,
        "huge": normal * 6e5,
    }
    return {name: values.astype(np.float32) for name, values in kinds.items()}


TENSORS = tensors()


def weighted(weight: np.ndarray, decoded: np.ndarray, factor: np.ndarray | float) -> float:
    return float((factor * (weight.astype(np.float64) - decoded) ** 2).sum())


@pytest.mark.parametrize("with_importance", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", ALL)
def test_error_is_at_most_that_of_llama_cpp(name: str, with_importance: bool) -> None:
    given = importance() if with_importance else None
    grid = get_grid(name)
    ratios = {}
    print(
        f"\n{name}: error / llama.cpp's, weighted as it weights, and weighted by importance alone"
    )
    for kind, weight in TENSORS.items():
        decoded = grid.quantize(weight, given).decode()
        theirs = ggml_oracle.decode(name, ggml_oracle.quantize(name, weight, given))
        factor = ggml_oracle.error_weights(name, weight, given)
        bare = 1.0 if given is None else given.astype(np.float64)
        ratios[kind] = weighted(weight, decoded, factor) / weighted(weight, theirs, factor)
        plain = weighted(weight, decoded, bare) / weighted(weight, theirs, bare)
        print(f"  {kind:18s} {ratios[kind]:.4f}  {plain:.4f}")
    assert max(ratios.values()) <= 1.0, ratios


@pytest.mark.parametrize("name", NAMES)
def test_constant_blocks_are_kept_to_float16(name: str) -> None:
    draw = np.random.default_rng(2)
    weight = np.repeat(draw.standard_normal((ROWS, COLUMNS // 256)), 256, axis=1).astype(np.float32)
    for given in (None, importance()):
        decoded = get_grid(name).quantize(weight, given).decode()
        assert weighted(weight, decoded, 1.0) < 1e-5 * float((weight**2).sum())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-10], ids=["zero", "denormal", "below float16"])
def test_what_float16_cannot_hold_becomes_zero(name: str, scale: float) -> None:
    weight = TENSORS["normal"][:3] * np.float32(scale)
    quantized = get_grid(name).quantize(weight)
    assert np.array_equal(quantized.decode(), np.zeros_like(weight))


@pytest.mark.parametrize("name", ALL)
def test_packed_bytes_decode_as_gguf_py_decodes_them(name: str) -> None:
    grid = get_grid(name)
    for kind in ("student-t5", "positive", "subnormal scales"):
        quantized = grid.quantize(TENSORS[kind])
        blocks = quantized.pack()["blocks"]
        assert blocks.nbytes == grid.nbytes((ROWS, COLUMNS))
        assert np.array_equal(bits(ggml_oracle.decode(name, blocks)), bits(quantized.decode()))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # MXFP4's scales go up to 2**127
@pytest.mark.parametrize("name", ALL)
def test_every_byte_is_understood(name: str) -> None:
    """Random blocks: unpack, decode as gguf-py does, pack to the same bytes again."""
    grid = get_grid(name)
    blocks = np.random.default_rng(3).integers(0, 256, (32, grid.nbytes((1, COLUMNS))), np.uint8)
    codes, params = grid.unpack(blocks)
    halves = {key: value for key, value in params.items() if value.dtype == np.float16}
    finite = {key: np.where(np.isfinite(h), h, np.float16(0.5)) for key, h in halves.items()}
    params = {**params, **finite}
    blocks = grid.pack(codes, params)["blocks"]
    again, again_params = grid.unpack(blocks)
    assert codes.max() == grid.lattice(params).levels.shape[1] - 1
    assert np.array_equal(codes, again)
    assert all(np.array_equal(bits(params[key]), bits(again_params[key])) for key in params)
    expected = ggml_oracle.decode(name, blocks)
    assert np.array_equal(bits(expected), bits(grid.decode(codes, params)))


@pytest.mark.parametrize("name", ALL)
def test_codes_are_the_nearest_and_the_lattice_says_of_what(name: str) -> None:
    """Also for weights that the parameters were not fitted to, as a solver changes them."""
    grid = get_grid(name)
    weight = TENSORS["student-t5"][:8]
    params = grid.fit(weight)
    moved = (weight * 1.3 + 0.01).astype(np.float32)
    codes = grid.encode(moved, params)
    lattice = grid.lattice(params)
    (levels,), run = lattice.levels, COLUMNS // lattice.scale.shape[1]
    scale, minimum = (np.repeat(part, run, axis=1) for part in (lattice.scale, lattice.offset))
    assert np.array_equal(grid.decode(codes, params), scale * levels[codes] - minimum)
    choices = scale[..., None] * levels - minimum[..., None]
    nearest = np.abs(moved[..., None] - choices).min(axis=-1)
    taken = np.abs(moved - grid.decode(codes, params))
    assert np.all(taken <= nearest + 1e-6 * np.abs(scale))


@pytest.mark.parametrize("name", ALL)
def test_rows_depend_on_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on their neighbours, nor on being a multiple of the lanes, nor on threads."""
    weight = np.concatenate([TENSORS["student-t5"], TENSORS["outlier channels"]] * 2)
    grid = get_grid(name)
    packed = {}
    for threads in (1, 2):
        monkeypatch.setattr(lanes, "worker_threads", lambda count=threads: count)
        packed[threads] = grid.quantize(weight, importance()).pack()["blocks"]
    assert np.array_equal(packed[1], packed[2])
    part = grid.quantize(weight[45:82], importance()).pack()["blocks"]
    assert np.array_equal(part, packed[1][45:82])


def test_sizes_are_those_of_ggml() -> None:
    for name in ALL:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert get_grid(name).nbytes((5, 512)) == 5 * 512 // block * size


def test_float16_rounding_inside_a_fast_math_caller() -> None:
    """numba's callees inherit fast-math unless they have their own; it would undo the rounding."""

    @numba.njit(fastmath=lanes.FAST)
    def rounded(values):  # type: ignore[no-untyped-def]
        for i in range(len(values)):
            values[i] = lanes.half(values[i])

    draw = np.random.default_rng(4)
    values = (draw.standard_normal(4096) * 10.0 ** draw.uniform(-7, 4.5, 4096)).astype(np.float32)
    expected = np.clip(values, -65504, 65504).astype(np.float16).astype(np.float32)
    expected = np.where(expected == 0, np.copysign(np.float32(2.0**-24), values), expected)
    rounded(values)
    assert np.array_equal(values, expected)


def broken(value: float) -> np.ndarray:
    weight = np.zeros((2, 256), dtype=np.float32)
    weight[1, 7] = value
    return weight


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 65505.0, -1e30])
def test_weights_that_do_not_fit_are_refused(value: float) -> None:
    for grid in map(get_grid, ("Q4_0", "Q4_K", "Q6_K", "MXFP4")):
        with pytest.raises(GridError, match="not finite or beyond"):
            grid.fit(broken(value))
        with pytest.raises(GridError, match="not finite or beyond"):
            grid.encode(broken(value), grid.fit(broken(1.0)))


def test_shapes_and_importances_that_do_not_fit_are_refused() -> None:
    with pytest.raises(GridError, match="rows of 288 columns are not whole blocks of 256"):
        make("Q4_K").check((4, 288))
    with pytest.raises(GridError, match="not whole blocks of 32"):
        make("Q8_0").fit(np.zeros((2, 33), dtype=np.float32))
    with pytest.raises(GridError, match="MXFP4: rows of 40 columns are not whole blocks of 32"):
        get_grid("MXFP4").fit(np.zeros((2, 40), dtype=np.float32))
    for bad in (np.ones(255), np.full(256, np.nan), np.full(256, -1.0)):
        with pytest.raises(GridError, match="importance"):
            make("Q4_K").fit(broken(1.0), bad.astype(np.float32))
    with pytest.raises(GridError, match="no grid"):
        get_grid("Q7_K")
    with pytest.raises(GridError, match="no grid"):
        make("Q4_2")


def test_importance_of_zero_still_decodes() -> None:
    weight = TENSORS["normal"]
    for name in ("Q4_K", "Q6_K", "Q4_1", "IQ4_NL"):
        for given in (np.zeros(COLUMNS), np.arange(COLUMNS) % 512 < 256):
            decoded = get_grid(name).quantize(weight, given.astype(np.float32)).decode()
            assert weighted(weight, decoded, 1.0) < 0.02 * float((weight**2).sum())


@pytest.mark.parametrize("with_importance", [False, True], ids=["plain", "importance"])
def test_the_exponent_of_mxfp4_is_the_best_of_all(with_importance: bool) -> None:
    grid, given = get_grid("MXFP4"), importance() if with_importance else None
    factor = np.ones(COLUMNS) if given is None else given.astype(np.float64)
    for kind in ("student-t5", "outlier channels", "zero runs"):
        weight = TENSORS[kind][:8]
        best = np.full((8, COLUMNS // 32), np.inf)
        for exponent in range(64, 160):
            params = {"e": np.full(best.shape, exponent, dtype=np.uint8)}
            decoded = grid.decode(grid.encode(weight, params), params)
            errors = factor * (weight.astype(np.float64) - decoded) ** 2
            best = np.minimum(best, errors.reshape(*best.shape, 32).sum(-1))
        found = factor * (weight.astype(np.float64) - grid.quantize(weight, given).decode()) ** 2
        np.testing.assert_allclose(found.reshape(*best.shape, 32).sum(-1), best, rtol=1e-5)


def test_every_grid_is_a_grid() -> None:
    assert all(isinstance(get_grid(name), BlockGrid) for name in NAMES)
    assert all(get_grid(name).name == name for name in NAMES)


PROGRAM = """
import sys
import numpy as np
import compress.grids
assert "numba" not in sys.modules
grid = compress.grids.get_grid("Q8_0")
codes = grid.encode(np.ones((1, 32), np.float32), {"d": np.full((1, 1), 0.5, np.float16)})
assert (codes == 130).all()
print(compress.__file__)
"""


def test_kernels_compile_where_nothing_can_be_cached(tmp_path: Path) -> None:
    """A package folder and a home that cannot be written: files where folders are wanted."""
    package = tmp_path / "compress"
    source = Path(compress.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__", "demo"))
    (package / "grids" / "__pycache__").touch()
    (tmp_path / "home").touch()
    home = str(tmp_path / "home")
    variables = {
        **os.environ,
        "HOME": home,
        "XDG_CACHE_HOME": home,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(tmp_path),
    }
    variables.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=variables, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
