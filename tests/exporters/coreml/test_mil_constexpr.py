"""Compressed constants decode to the values of Apple's decompress_weights, bit for bit."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mil_program import save_program

from compress.errors import ArtifactError
from exporters.coreml import blockwise, constexpr, weights
from exporters.coreml.blobs import Packed
from exporters.coreml.mil import read_package

logging.disable(logging.WARNING)  # coremltools and its missing macOS libraries
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import coremltools as ct
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types
logging.disable(logging.NOTSET)

ROWS, COLUMNS = 16, 64
NUMPY_TYPES = {
    name: types.nptype_from_builtin(types.string_to_builtin(name))
    for name in ("int4", "uint1", "uint2", "uint3", "uint4", "uint6", "uint8", "int8")
}


class Draw:
    """Random parts of compressed constants."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def codes(self, dtype: str, *shape: int) -> np.ndarray:
        bits = int(dtype.lstrip("uint"))
        low = -(2 ** (bits - 1)) if dtype.startswith("int") else 0
        return self.rng.integers(low, low + 2**bits, shape).astype(NUMPY_TYPES[dtype])

    def floats(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=shape).astype(np.float16)

    def mask(self) -> np.ndarray:
        return (self.rng.random((ROWS, COLUMNS)) < 0.4).astype(NUMPY_TYPES["uint1"])


def affine(
    draw: Draw, data: str, blocks: tuple[int, int], offset: str = "", rows: int = ROWS
) -> object:
    parts = {"scale": draw.floats(*blocks)}
    if offset:
        parts["offset"] = draw.floats(*blocks) if offset == "fp16" else draw.codes(offset, *blocks)
    return mb.constexpr_blockwise_shift_scale(data=draw.codes(data, rows, COLUMNS), **parts)


def palette(draw: Draw, bits: int, blocks: tuple[int, int] = (1, 1), entries: str = "") -> object:
    shape = (*blocks, 2**bits, 1)
    return mb.constexpr_lut_to_dense(
        indices=draw.codes(f"uint{bits}", ROWS, COLUMNS),
        lut=draw.codes(entries, *shape) if entries else draw.floats(*shape),
    )


def vectors(draw: Draw, axis: int) -> object:
    shape = [ROWS, COLUMNS]
    shape[axis] //= 2
    return mb.constexpr_lut_to_dense(
        indices=draw.codes("uint4", *shape),
        lut=draw.floats(2, 1, 16, 2),
        vector_axis=np.int32(axis),
    )


def scaled(draw: Draw, data: object) -> object:
    return mb.constexpr_blockwise_shift_scale(data=data, scale=draw.floats(ROWS, 1))


def sparse(draw: Draw) -> object:
    mask = draw.mask()
    return mb.constexpr_sparse_to_dense(nonzero_data=draw.floats(int(mask.sum())), mask=mask)


def sparse_palette(draw: Draw) -> object:
    mask = draw.mask()
    mask, values = mb.constexpr_lut_to_sparse(
        indices_mask=mask,
        indices_nonzero_data=draw.codes("uint3", int(mask.sum())),
        lut=draw.floats(4, 1, 8, 1),
    )
    return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask)


def sparse_affine(draw: Draw) -> object:
    mask = draw.mask()
    mask, values = mb.constexpr_sparse_blockwise_shift_scale(
        data_mask=mask,
        nonzero_data=draw.codes("int4", int(mask.sum())),
        scale=draw.floats(ROWS, 2),
        offset=draw.codes("int4", ROWS, 2),
    )
    return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=mask)


CASES: dict[str, Callable[[Draw], object]] = {
    "int4 per block": lambda d: affine(d, "int4", (ROWS, 2)),
    "int4 per block, offset": lambda d: affine(d, "int4", (ROWS, 2), "int4"),
    "uint4 per block, offset": lambda d: affine(d, "uint4", (ROWS, 4), "uint4"),
    "uint4 blocks of rows, fp16 offset": lambda d: affine(d, "uint4", (ROWS // 2, 4), "fp16"),
    "int8 per channel": lambda d: affine(d, "int8", (ROWS, 1)),
    "int8 per channel, offset": lambda d: affine(d, "int8", (ROWS, 1), "int8"),
    "uint8 per tensor, offset": lambda d: affine(d, "uint8", (1, 1), "uint8"),
    "int4 odd rows": lambda d: affine(d, "int4", (5, 1), rows=5),
    **{f"palette {b} bits": lambda d, b=b: palette(d, b) for b in (1, 2, 3, 4, 6, 8)},
    **{f"palette {b} bits, groups": lambda d, b=b: palette(d, b, (4, 1)) for b in (1, 2, 3, 4, 6)},
    "palette 4 bits, row groups of one": lambda d: palette(d, 4, (ROWS, 1)),
    "palette 4 bits, groups of columns": lambda d: palette(d, 4, (2, 4)),
    "palette of vectors of rows": lambda d: vectors(d, 0),
    "palette of vectors of columns": lambda d: vectors(d, 1),
    "palette of int8, scaled": lambda d: scaled(d, palette(d, 4, (2, 1), "int8")),
    "palette of fp16, scaled": lambda d: scaled(d, palette(d, 3)),
    "sparse": sparse,
    "sparse palette": sparse_palette,
    "sparse int4": sparse_affine,
}


def apple_and_ours(package: Path) -> dict[str, tuple[np.ndarray, constexpr.Constant]]:
    """By the name of the ``linear`` that uses it: Apple's decompressed weight, our constant."""
    model = ct.models.MLModel(str(package), skip_model_load=True)
    dense = cto.decompress_weights(model)
    apple = {
        child.name: entry.val
        for entry in cto.get_weights_metadata(dense, weight_threshold=1).values()
        if entry.val.ndim == 2  # else a bias
        for child in entry.child_ops
    }
    function = read_package(package).function("main")
    constants = constexpr.constants_of(function.operations)
    ours = {
        operation.name: constants[operation.inputs["weight"][0]]
        for operation in function.operations
        if operation.kind == "linear"
    }
    assert set(apple) == set(ours)
    return {name: (apple[name], ours[name]) for name in ours}


def save(outputs: Callable[[object], tuple[object, ...]], path: Path) -> ct.models.MLModel:
    """A program of outputs of ``x``, fp16 ``[1, COLUMNS]``, written without graph passes."""

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, COLUMNS), dtype=types.fp16)],
        opset_version=ct.target.iOS18,
    )
    def program(x: object) -> tuple[object, ...]:
        return outputs(x)

    return save_program(program, path)


@pytest.fixture(scope="module")
def handmade(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("constexpr") / "handmade.mlpackage"
    draw = Draw(0)
    names = {name: name.replace(" ", "_").replace(",", "") for name in CASES}
    save(
        lambda x: tuple(
            mb.linear(x=x, weight=make(draw), name=names[n]) for n, make in CASES.items()
        ),
        path,
    )
    pairs = apple_and_ours(path)
    return {name: pairs[names[name]] for name in CASES}


def bits(array: np.ndarray) -> np.ndarray:
    assert array.dtype == np.float16
    return array.view(np.uint16)


@pytest.mark.parametrize("name", CASES)
def test_decoded_weight_equals_apples(handmade: dict, name: str) -> None:
    apple, ours = handmade[name]
    assert isinstance(ours, constexpr.Compressed)
    np.testing.assert_array_equal(bits(constexpr.decode(ours).numpy()), bits(apple))


@pytest.mark.parametrize("name", CASES)
def test_rows_equal_the_whole(handmade: dict, name: str) -> None:
    apple, ours = handmade[name]
    rows = np.array([4, 0, 3, 4])
    weight = weights.Weight(ours)
    np.testing.assert_array_equal(bits(weight.rows(rows).numpy()), bits(apple[rows]))
    slabs = [(first, last, part) for first, last, part in weight.slabs()]
    assert slabs[0][0] == 0 and slabs[-1][1] == len(apple)
    np.testing.assert_array_equal(bits(torch.cat([p for *_, p in slabs]).numpy()), bits(apple))


def test_slabs_of_a_large_weight() -> None:
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, 200 * 48, dtype=np.uint8)
    scale = rng.random((200, 3)).astype(np.float16)
    parts = {
        "data": Packed("int4", (200, 96), raw),
        "scale": Packed("fp16", (200, 3), scale.view(np.uint8).reshape(-1)),
    }
    constant = constexpr.Compressed("constexpr_blockwise_shift_scale", parts, "fp16", (200, 96))
    nibbles = np.stack([raw & 15, raw >> 4], axis=-1).reshape(200, 96).astype(np.int8)
    signed = ((nibbles ^ 8) - 8).astype(np.float32)
    expected = (signed * np.repeat(scale, 32, axis=1).astype(np.float32)).astype(np.float16)
    for keep_as in (None, torch.float16, torch.float32):
        weight = weights.Weight(constant, slab=64 * 96)
        weight.keep_as = keep_as
        slabs = list(weight.slabs())
        assert len(slabs) == (1 if keep_as == torch.float32 else 4)
        np.testing.assert_array_equal(torch.cat([p for *_, p in slabs]).numpy(), expected)
        np.testing.assert_array_equal(weight.whole().numpy(), expected)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "uint8"])
@pytest.mark.parametrize("offset", ["", "uint4", "int8"])
def test_blocks_decoded_in_one_pass_equal_the_operations(dtype: str, offset: str) -> None:
    """With scales whose products are subnormal, are zero, or are beyond float16."""
    rng, rows, columns = np.random.default_rng(3), 64, 96
    size = [2.0**-24, 3e-7, 5e-5, 6.2e-5, 0.01, 1.0, 127.0, 600.0, 60000.0, 0.0, -0.03, 2.0**-14]
    scale = (rng.random((rows, 3)) + 0.5) * rng.choice(size, (rows, 3))
    halves = np.clip(scale, -65504, 65504).astype(np.float16)
    bits = 4 if dtype.endswith("4") else 8
    raw = rng.integers(0, 256, rows * columns * bits // 8, dtype=np.uint8)
    parts = {
        "data": Packed(dtype, (rows, columns), raw),
        "scale": Packed("fp16", (rows, 3), halves.view(np.uint8).reshape(-1)),
    }
    if offset:
        shift = rng.integers(0, 256, rows * 3 // (1 if offset == "int8" else 2), dtype=np.uint8)
        parts["offset"] = Packed(offset, (rows, 3), shift)
    kind = "constexpr_blockwise_shift_scale"
    constant = constexpr.Compressed(kind, parts, "fp16", (rows, columns))
    assert blockwise.has_blocks(constant)
    found, expected = blockwise.decode_blocks(constant), constexpr.decode(constant)
    np.testing.assert_array_equal(found.numpy(), expected.to(torch.float32).numpy())
    assert torch.isinf(expected).any() and (expected.abs() < 2.0**-14).sum() > 100


def test_what_apples_tools_write(tmp_path: Path) -> None:
    """The packages of coremltools.optimize: quantized, palettized, pruned, and both."""
    rng = np.random.default_rng(2)
    kinds = ["blocks", "channels", "offsets", "uniform", "grouped"]
    kinds += ["pruned", "pruned_lut", "pruned_int8"]
    matrices = {k: rng.normal(size=(ROWS, COLUMNS)).astype(np.float16) for k in kinds}
    # Unique values, of which there are few, need no k-means (and no scikit-learn).
    matrices["grouped"] = rng.integers(-7, 8, (ROWS, COLUMNS)).astype(np.float16)

    model = save(
        lambda x: tuple(mb.linear(x=x, weight=m, name=k) for k, m in matrices.items()),
        tmp_path / "float.mlpackage",
    )
    quantizer, palettizer = cto.OpLinearQuantizerConfig, cto.OpPalettizerConfig
    pruner = cto.OpMagnitudePrunerConfig(n_m_ratio=(2, 4), weight_threshold=1)

    def only(**configs: object) -> cto.OptimizationConfig:
        return cto.OptimizationConfig(op_name_configs=configs)

    small = {"weight_threshold": 1}
    model = cto.prune_weights(model, only(pruned=pruner, pruned_lut=pruner, pruned_int8=pruner))
    model = cto.linear_quantize_weights(
        model, only(pruned_int8=quantizer(dtype="int8", **small)), joint_compression=True
    )
    model = cto.palettize_weights(
        model, only(pruned_lut=palettizer(mode="uniform", nbits=3, **small)), joint_compression=True
    )
    model = cto.linear_quantize_weights(
        model,
        only(
            blocks=quantizer(dtype="int4", granularity="per_block", block_size=32, **small),
            channels=quantizer(dtype="int8", granularity="per_channel", **small),
            offsets=quantizer(
                mode="linear", dtype="uint4", granularity="per_block", block_size=16, **small
            ),
        ),
    )
    model = cto.palettize_weights(
        model,
        only(
            uniform=palettizer(mode="uniform", nbits=6, **small),
            grouped=palettizer(
                mode="unique", granularity="per_grouped_channel", group_size=4, **small
            ),
        ),
    )
    path = tmp_path / "compressed.mlpackage"
    model.save(str(path))
    operations = [o.kind for o in read_package(path).function("main").operations]
    for kind in constexpr.CONSTEXPR.keys() - {"constexpr_affine_dequantize"}:
        assert kind in operations
    for name, (apple, ours) in apple_and_ours(path).items():
        assert isinstance(ours, constexpr.Compressed), name
        np.testing.assert_array_equal(bits(constexpr.decode(ours).numpy()), bits(apple))


def test_ios16_constants(tmp_path: Path) -> None:
    """The older operations, whose parameters are attributes."""
    rng = np.random.default_rng(3)
    names = ["affine", "uniform", "pruned"]
    matrices = {n: rng.normal(size=(ROWS, COLUMNS)).astype(np.float16) for n in names}

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, COLUMNS), dtype=types.fp16)],
        opset_version=ct.target.iOS16,
    )
    def program(x: object) -> tuple[object, ...]:
        return tuple(mb.linear(x=x, weight=m, name=n) for n, m in matrices.items())

    model = ct.convert(program, minimum_deployment_target=ct.target.iOS16, skip_model_load=True)
    small = {"weight_threshold": 1}
    model = cto.linear_quantize_weights(
        model,
        cto.OptimizationConfig(op_name_configs={"affine": cto.OpLinearQuantizerConfig(**small)}),
    )
    palettizer = cto.OpPalettizerConfig(mode="uniform", nbits=4, **small)
    model = cto.palettize_weights(
        model, cto.OptimizationConfig(op_name_configs={"uniform": palettizer})
    )
    pruner = cto.OpThresholdPrunerConfig(threshold=0.5, minimum_sparsity_percentile=0.1, **small)
    model = cto.prune_weights(model, cto.OptimizationConfig(op_name_configs={"pruned": pruner}))
    path = tmp_path / "ios16.mlpackage"
    model.save(str(path))
    for name, (apple, ours) in apple_and_ours(path).items():
        assert isinstance(ours, constexpr.Compressed), name
        np.testing.assert_array_equal(bits(constexpr.decode(ours).numpy()), bits(apple))


def test_parts_that_do_not_fit_are_refused() -> None:
    codes = Packed("uint4", (4, 6), np.zeros(12, np.uint8))
    table = Packed("fp16", (3, 1, 16, 1), np.zeros(96, np.uint8))
    constant = constexpr.Compressed(
        "constexpr_lut_to_dense", {"indices": codes, "lut": table}, "fp16", (4, 6)
    )
    with pytest.raises(ArtifactError, match="constexpr_lut_to_dense"):
        constexpr.decode(constant)
