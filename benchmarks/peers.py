"""Quantizers of other tools, written to packlight's files: only the choice of codes differs.

Each peer is a function, ``peer(weight, grid, name) -> Quantized``, that calls the peer's code and
returns its codes, so that its file has the same tensors, types, bytes and runtime as packlight's.

llama.cpp
    ``ggml_quantize_chunk`` with an importance: the bytes of ``llama-quantize --imatrix``, the
    imatrix made with ``--process-output``. As there, the embedding has no importance.
onnxruntime
    ``MatMulNBitsQuantizer`` on a model of one MatMul, at its defaults but for the group size.
    Scales are rounded to float16 as in packlight. Algorithms without a symmetric form are compared
    with the asymmetric grid; HQQ's zero points are floats, with four times as many bits, and are
    written as such. The embedding always has plain rounding, the only one that supports it.
    Its GPTQ is left out: in 1.31 it multiplies errors by the empty half of a triangular factor,
    and its codes are those of plain rounding. Its k-quant fails on rows of an odd number of groups.
coremltools
    The functions under ``linear_quantize_weights`` and ``palettize_weights``, on float16 weights
    as a converted model has them. It clusters groups of at least 10,000 weights, which those of
    any real model are, by ``kmeans1d`` (the optimum), smaller ones by scikit-learn (one run of
    k-means++, stopped early); here it is always the first.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent)]

import ggml_oracle  # noqa: E402

# Uses internal names: other tools' quantizers, in the layouts of packlight's grids.
from compress.calibration.statistics import LayerStats, Statistics  # noqa: E402
from compress.checkpoint.sources import Source  # noqa: E402
from compress.grids import Array, Float32, Grid, Params, Quantized  # noqa: E402
from compress.grids.affine import Affine  # noqa: E402
from compress.grids.palette import Palette  # noqa: E402
from compress.plan.shapes import Artifact  # noqa: E402
from compress.plan.weights import Weights  # noqa: E402
from compress.solvers import rtn  # noqa: E402

T = TypeVar("T")

EMBEDDING = "embed_tokens.weight"


class Peer:
    """A quantizer of another tool.

    Args:
        statistics: packlight's calibration; None for peers that use only the weights.

    Attributes:
        name: as in the tables.
    """

    name = ""

    def __init__(self, statistics: Statistics | None = None) -> None:
        self._statistics = statistics

    def __call__(self, weight: Float32, grid: Grid, name: str) -> Quantized:
        """The peer's codes for a weight (or some of its rows) on a grid."""
        raise NotImplementedError

    def finish(self, artifact: Artifact) -> Artifact:
        """Change the written file, if needed."""
        return artifact

    def stats(self, name: str) -> LayerStats | None:
        """Of the input that a weight multiplies."""
        return self._statistics.for_weight(name) if self._statistics else None


class PeerWeights(Weights):
    """``Weights`` quantized by a peer, by the weight's name."""

    def __init__(self, source: Source, peer: Peer) -> None:
        super().__init__(source, rtn)
        self._peer = peer

    def in_slabs(
        self, name: str, grid: Grid, slabs: Sequence[slice | None], pack: Callable[[Quantized], T]
    ) -> Iterator[T]:
        """See ``Weights.in_slabs``; in sequence."""
        for rows in slabs:
            yield pack(self._peer(self.read(name, rows), grid, name))


# --- llama.cpp -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Bytes:
    """Replaces a GGUF grid: blocks that are already packed."""

    name: str

    def pack(self, codes: Array, params: Params) -> dict[str, Array]:
        return {"blocks": codes}


class LlamaCpp(Peer):
    """See the module."""

    name = "llama.cpp + imatrix"

    def __call__(self, weight: Float32, grid: Grid, name: str) -> Quantized:
        if grid.name in ("F16", "BF16", "F32"):
            return grid.quantize(weight)
        stats = self.stats(name)
        importance = None if stats is None else stats.importance
        blocks = ggml_oracle.quantize(grid.name, weight, importance)
        packed: Any = Bytes(grid.name)
        return Quantized(blocks, {}, packed, (weight.shape[0], weight.shape[1]))


# --- onnxruntime ---------------------------------------------------------------------------


class OnnxRuntime(Peer):
    """``MatMulNBitsQuantizer``; the subclasses are its algorithms."""

    def __call__(self, weight: Float32, grid: Grid, name: str) -> Quantized:
        if not isinstance(grid, Affine):
            return grid.quantize(weight)
        eight = grid.bits != 4  # of a tied embedding and of shared values: all tools round it
        config = plain(grid) if eight or name == EMBEDDING else self.config(grid, name)
        codes, scale, zero = one_matmul(weight, grid, config)
        if zero is None:
            zero = np.full(scale.shape, grid.middle, np.uint8)
        elif zero.dtype != np.uint8:
            self.keep(name, zero)
            zero = np.zeros(scale.shape, np.uint8)
        params = {"scale": scale.astype(np.float16), "zero_point": zero}
        return Quantized(codes, params, grid, (weight.shape[0], weight.shape[1]))

    def config(self, grid: Affine, name: str) -> Any:
        """Its configuration for one weight."""
        raise NotImplementedError

    def keep(self, name: str, zero: Array) -> None:
        """Record float zero points, which packlight's file does not have."""
        raise NotImplementedError


def plain(grid: Affine) -> Any:
    """The configuration of plain rounding, by onnxruntime's compiled code."""
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    return nbits.DefaultWeightOnlyQuantConfig(
        block_size=grid.group_size, is_symmetric=grid.symmetric, bits=grid.bits
    )


class OnnxRtn(OnnxRuntime):
    """Maps the extremes of each group to the extreme codes."""

    name = "onnxruntime RTN"

    def config(self, grid: Affine, name: str) -> Any:
        return plain(grid)


class OnnxKQuant(OnnxRuntime):
    """llama.cpp's search of scale and minimum, the minimum then rounded to a zero point."""

    name = "onnxruntime k-quant"

    def config(self, grid: Affine, name: str) -> Any:
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        return nbits.KQuantWeightOnlyQuantConfig()


class OnnxHqq(OnnxRuntime):
    """Half-quadratic: zero points for the least p-norm of errors, p = 0.7."""

    name = "onnxruntime HQQ"

    def __init__(self, statistics: Statistics | None = None) -> None:
        super().__init__(statistics)
        self._zeros: dict[str, list[Array]] = {}

    def config(self, grid: Affine, name: str) -> Any:
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        return nbits.HQQWeightOnlyQuantConfig(block_size=grid.group_size, bits=grid.bits)

    def keep(self, name: str, zero: Array) -> None:
        """A slab of rows."""
        self._zeros.setdefault(name, []).append(zero.astype(np.float16))

    def finish(self, artifact: Artifact) -> Artifact:
        """Write the float zero points into the graph, and the file anew."""
        import dataclasses

        import onnx

        (path,) = artifact.path.glob("onnx/*.onnx")
        model = onnx.load(path)
        graph = model.graph
        names = {e.target_name: e.name for e in artifact.plan.entries}
        casts = []
        for node in graph.node:
            if node.op_type != "MatMulNBits":
                continue
            target = node.input[3].removesuffix(".zero_points")
            values = np.concatenate(self._zeros[names[target]])
            (old,) = (held for held in graph.initializer if held.name == node.input[3])
            halves = onnx.numpy_helper.from_array(values, f"{target}.float_zero_points")
            graph.initializer.remove(old)
            graph.initializer.append(halves)
            node.input[3] = f"{target}.wide_zero_points"
            casts.append(onnx.helper.make_node("Cast", [halves.name], [node.input[3]], to=1))
        for cast in reversed(casts):
            graph.node.insert(0, cast)
        data = path.with_name(f"{path.name}_data")
        data.unlink()
        onnx.save(model, path, save_as_external_data=True, location=data.name, size_threshold=1024)
        return dataclasses.replace(artifact, nbytes=path.stat().st_size + data.stat().st_size)


def one_matmul(weight: Float32, grid: Affine, config: Any) -> tuple[Array, Float32, Array | None]:
    """Quantize a weight by ``MatMulNBitsQuantizer``, as a model of one MatMul.

    Args:
        weight: float32 ``[rows, columns]``; the model multiplies by its transpose.
        grid: 4 or 8 bits; which groups, and whether symmetric.
        config: of the algorithm.

    Returns:
        Codes uint8 ``[rows, columns]``, scales float32 ``[rows, groups]``, and zero points in that
        shape: uint8 or float32, None where it wrote none.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    rows, columns = weight.shape
    place = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], "matmul")],
        "one",
        [place("x", 1, ["n", columns])],
        [place("y", 1, ["n", rows])],
        [onnx.numpy_helper.from_array(weight.T.copy(), "w")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    model.ir_version = 10
    with quiet():
        quantizer = MatMulNBitsQuantizer(
            model, block_size=grid.group_size, is_symmetric=grid.symmetric, algo_config=config
        )
        quantizer.process()
    (node,) = (n for n in quantizer.model.model.graph.node if n.op_type == "MatMulNBits")
    held = {h.name: onnx.numpy_helper.to_array(h) for h in quantizer.model.model.graph.initializer}
    codes, scales, *zeros = (held[name] for name in node.input[1:])
    groups = columns // grid.group_size
    zero = zeros[0] if zeros else None
    if zero is not None and zero.dtype == np.uint8:
        zero = unpacked(zero.reshape(rows, -1), grid.bits)[:, :groups]
    elif zero is not None:
        zero = zero.reshape(rows, groups)
    return unpacked(codes.reshape(rows, -1), grid.bits), scales.reshape(rows, groups), zero


def unpacked(packed: Array, bits: int) -> Array:
    """uint8 ``[rows, n]`` of 8 bits, or of 4 → its halves, the low one first, ``[rows, 2n]``."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars, log lines and warnings (groups of zeros are divided by zero)."""
    logging.disable(logging.INFO)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        logging.disable(logging.NOTSET)


# --- coremltools ---------------------------------------------------------------------------


class CoremlTools(Peer):
    """Linear quantization by groups of columns, or k-means by groups of rows."""

    name = "coremltools"

    def __call__(self, weight: Float32, grid: Grid, name: str) -> Quantized:
        shape = (weight.shape[0], weight.shape[1])
        halves = weight.astype(np.float16)
        with quiet():
            if isinstance(grid, Affine):
                return Quantized(*linear(halves, grid), grid, shape)
            if isinstance(grid, Palette):
                return Quantized(*clustered(halves, grid), grid, shape)
        return grid.quantize(weight)


def linear(weight: Array, grid: Affine) -> tuple[Array, Params]:
    """``linear_quantize_weights``; its signed codes moved to 0..15."""
    from coremltools.optimize.coreml._quantization_passes import linear_quantize_weights

    found = linear_quantize_weights.blockwise_compress(
        weight,
        nbits=grid.bits,
        mode="LINEAR_SYMMETRIC" if grid.symmetric else "LINEAR",
        signed=True,
        block_sizes=[1, grid.group_size or weight.shape[1]],
    )
    codes = (found.data.astype(np.int16) + grid.middle).astype(np.uint8)
    zero = np.zeros(found.scale.shape) if found.offset is None else found.offset
    zero = (zero.astype(np.int16) + grid.middle).astype(np.uint8)
    return codes, {"scale": found.scale.astype(np.float16), "zero_point": zero}


def clustered(weight: Array, grid: Palette) -> tuple[Array, Params]:
    """``palettize_weights``, the clusters by ``kmeans1d``."""
    from coremltools.models.neural_network import quantization_utils
    from coremltools.optimize.coreml._quantization_passes import palettize_weights

    def optimum(values: Array) -> tuple[Array, Array]:
        table, codes = quantization_utils._get_kmeans_lookup_table_and_weight(
            grid.bits, values, force_kmeans1d=True
        )
        return table.astype(values.dtype), codes.astype(np.uint8)

    found = palettize_weights.grouped_channelwise_compress(
        weight, "CUSTOM", grid.bits, 0, grid.group_rows, lut_function=optimum
    )
    codes = found.indices.astype(np.uint8)
    return codes, {"lut": found.lut.reshape(-1, 1 << grid.bits).astype(np.float16)}


# Format of the artifact, and whether its grid has zero points → peers that can fill it.
PEERS: dict[tuple[str, bool], tuple[type[Peer], ...]] = {
    ("gguf", False): (LlamaCpp,),
    ("onnx", False): (OnnxRtn,),
    ("onnx", True): (OnnxRtn, OnnxKQuant, OnnxHqq),
    ("coreml", False): (CoremlTools,),
    ("coreml", True): (CoremlTools,),
}
