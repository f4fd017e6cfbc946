"""The accuracy benchmark's quantizers (`benchmarks/peers.py`) give the codes of their tools."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import accuracy
import peers

from compress.calibration.statistics import LayerStats
from compress.grids import get_grid

NAME = "blocks.0.q_proj.weight"


def matrix(rows: int, columns: int) -> np.ndarray:
    draw = np.random.default_rng(0)
    return (draw.standard_t(5, (rows, columns)) * 0.02).astype(np.float32)


class Known:
    """Statistics in which every input has this importance."""

    def __init__(self, importance: np.ndarray) -> None:
        self._stats = LayerStats(1, importance.astype(np.float32))

    def for_weight(self, name: str) -> LayerStats:
        return self._stats


def test_llama_cpp_goes_by_the_importance():
    weight = matrix(16, 256)
    importance = np.where(np.arange(256) % 2, 100.0, 1.0)
    statistics: Any = Known(importance)
    squares = []
    for given in (None, statistics):
        (blocks,) = peers.LlamaCpp(given)(weight, get_grid("Q4_K"), NAME).pack().values()
        decoded = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q4_K)
        squares.append((importance * (weight - decoded) ** 2).sum())
    assert squares[1] < 0.95 * squares[0] < 0.05 * (importance * weight**2).sum()


@pytest.mark.parametrize("peer", [peers.OnnxRtn, peers.OnnxKQuant])
@pytest.mark.parametrize("grid", ["int4-g32-asym", "int4-g128-asym"])
def test_onnxruntime_codes_are_read_in_their_order(peer, grid):
    weight = matrix(12, 512)
    found = peer()(weight, get_grid(grid), NAME)
    # Its plain rounding, by definition: extremes (with zero between them) on the extreme codes.
    groups = weight.reshape(12, -1, 32 if "g32" in grid else 128)
    step = (groups.max(-1) - groups.min(-1)) / 15
    assert np.median(np.abs(found.decode() - weight) / step.mean()) < 0.4
    if peer is peers.OnnxRtn:
        np.testing.assert_allclose(found.params["scale"], step, rtol=1e-3)
        worst = np.abs(found.decode().reshape(groups.shape) - groups).max(-1)
        assert (worst < 1.05 * step).all()


def test_onnxruntime_symmetric_has_no_zero_points():
    found = peers.OnnxRtn()(matrix(12, 64), get_grid("int4-g32"), NAME)
    assert (found.params["zero_point"] == 8).all()


def test_hqq_zero_points_are_floats():
    weight = matrix(16, 64)
    peer = peers.OnnxHqq()
    found = peer(weight, get_grid("int4-g32-asym"), NAME)
    (zero,) = peer._zeros[NAME]
    assert zero.shape == (16, 2) and (zero != np.round(zero)).any()
    steps = found.codes.reshape(16, 2, 32) - zero[..., None].astype(np.float32)
    decoded = steps * found.params["scale"][..., None].astype(np.float32)
    assert np.abs(decoded.reshape(weight.shape) - weight).mean() < 0.004


def package(weight: np.ndarray) -> Any:
    """A Core ML model of one linear, float16."""
    ct = pytest.importorskip("coremltools")
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    @mb.program(
        input_specs=[mb.TensorSpec((1, weight.shape[1]), types.fp16)], opset_version=ct.target.iOS18
    )
    def program(x: Any) -> Any:
        return mb.linear(x=x, weight=weight.astype(np.float16), bias=np.zeros(len(weight), "f2"))

    return ct.convert(program, minimum_deployment_target=ct.target.iOS18, skip_model_load=True)


def constants(model: Any, operation: str) -> dict[str, np.ndarray]:
    """Inputs of the one operation of that type."""
    (found,) = model._mil_program.functions["main"].find_ops(op_type=operation)
    return {name: value.val for name, value in found.inputs.items() if value is not None}


def test_coremltools_palettes_are_those_of_its_public_function():
    import coremltools.optimize.coreml as cto

    weight = matrix(16, 1280)  # groups of 8 rows: 10,240 weights
    config = cto.OpPalettizerConfig(
        mode="kmeans", nbits=4, granularity="per_grouped_channel", group_size=8
    )
    model = cto.palettize_weights(package(weight), cto.OptimizationConfig(config))
    theirs = constants(model, "constexpr_lut_to_dense")
    found = peers.CoremlTools()(weight, get_grid("lut4-g8"), NAME)
    np.testing.assert_array_equal(found.params["lut"], theirs["lut"].reshape(2, 16))
    np.testing.assert_array_equal(found.codes, theirs["indices"].astype(np.uint8))


@pytest.mark.parametrize(("grid", "mode"), [("", "linear_symmetric"), ("-asym", "linear")])
def test_coremltools_integers_are_those_of_its_public_function(grid, mode):
    import coremltools.optimize.coreml as cto

    weight = matrix(64, 128)
    config = cto.OpLinearQuantizerConfig(
        mode=mode, dtype="int4", granularity="per_block", block_size=32
    )
    model = cto.linear_quantize_weights(package(weight), cto.OptimizationConfig(config))
    theirs = constants(model, "constexpr_blockwise_shift_scale")
    zero = theirs.get("offset", np.zeros((64, 4), np.int8)).astype(np.float32)
    steps = theirs["data"].astype(np.float32).reshape(64, 4, 32) - zero[..., None]
    decoded = (steps * theirs["scale"].astype(np.float32)[..., None]).reshape(weight.shape)
    found = peers.CoremlTools()(weight, get_grid(f"int4-g32{grid}"), NAME)
    np.testing.assert_array_equal(found.decode(), decoded)


@pytest.mark.slow
def test_a_file_of_each_peer_runs(tmp_path, monkeypatch):
    """The demo by each peer, in its runtime; HQQ's with its float zero points."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    chosen = argparse.Namespace(
        model=accuracy.DEMO, calibration=None, eval_text=None, windows=2, solver=[], peers=True,
        set=["calibration.tokens=2048"], cache=None,
        setting=["GGUF Q4_0", "ONNX int4-g32-asym", "Core ML int4-g32"],
    )  # fmt: skip
    found = {row["solver"]: row for row in accuracy.measure(chosen, tmp_path)["rows"]}
    assert set(found) == {
        "llama.cpp + imatrix", "onnxruntime RTN", "onnxruntime k-quant", "onnxruntime HQQ",
        "coremltools",
    }  # fmt: skip
    for row in found.values():
        assert 0.003 < row["kl_mean"] < 0.08, row
    assert found["onnxruntime HQQ"]["bytes"] > 1.03 * found["onnxruntime RTN"]["bytes"]


def test_bars_are_held_against_the_best_peer():
    rows = [
        {"setting": "ONNX int4-g32", "solver": name, "peer": peer, "kl_mean": kl}
        for name, peer, kl in [("gptq", False, 0.8), ("a", True, 2.0), ("b", True, 1.0)]
    ]
    accuracy.of_peers(rows)
    assert rows[0]["of_peer"] == 0.8 and "of_peer" not in rows[1]
    assert accuracy.bars(rows).endswith("| ONNX int4-g32 | 0.80 | 0.80 |  | pass |\n")
    rows[0]["of_peer"] = 0.81
    assert "**fail**" in accuracy.bars(rows)
