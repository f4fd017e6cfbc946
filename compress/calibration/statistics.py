"""Calibration statistics of the inputs of the linears, in memory and on disk.

Linears that multiply the same input share its statistics: q, k and v; gate and up; in a parallel
block (phi) also up and q. An input is named after its first linear: ``blocks.3.q_proj``,
``blocks.3.o_proj``, ``blocks.3.gate_proj`` (``up_proj`` without a gate), ``blocks.3.down_proj``,
``lm_head``; those of an expert, over the tokens that were sent to it,
``blocks.3.experts.17.gate_proj`` and ``….down_proj``. A stored block that runs several times
(MobileLLM-LS) has pooled statistics.

On disk: one ``.npz`` per stored block, one per expert and one for the head. A Hessian is stored as
the square roots of its diagonal and the upper triangle of the correlations in int16 (error 1.5e-5
of the geometric mean of the two diagonal entries), a quarter of float32's bytes: 3.1 GB for
Phi-3-mini. Held-back inputs are stored in float16, each row divided by its largest magnitude.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from compress.decoder.config import DecoderConfig, input_roles, split_name, stored_block
from compress.errors import CheckpointError, one_line

__all__ = ["LayerStats", "Statistics", "input_names", "input_of"]

Float32 = NDArray[np.float32]

CORRELATION_STEPS = 32767  # of int16: correlations are in [-1, 1]
TINY = np.float32(1e-30)


@dataclass(frozen=True)
class LayerStats:
    """Statistics of one input ``x`` over the calibration tokens; ``columns`` is its width.

    Attributes:
        count: tokens seen.
        importance: mean of ``x²``, float32 ``[columns]``: weights of the squared error.
        mean: mean of ``x``, float32 ``[columns]``; None where it is unknown (an imatrix file).
        hessian: mean of ``x xᵀ`` as its diagonal blocks in order, float32 ``[n, n]`` each, the
            ``n`` adding up to ``columns``: usually one block, several where a wide input was split
            to save memory. None where no solver needs it.
        held_back: rows of ``x`` that are not in the Hessian, float32 ``[rows, columns]``, to
            measure errors on. None without a Hessian, or with too few windows.
        drift: mean of ``(f - x) xᵀ``, where the float model has the input ``f``, as diagonal
            blocks like the Hessian's. None where ``x`` is the float model's; never on disk.

    Example:
        >>> x = np.eye(4, dtype=np.float32)  # four tokens
        >>> stats = LayerStats(len(x), (x**2).mean(0), hessian=((x.T @ x) / len(x),))
        >>> stats.importance.tolist()
        [0.25, 0.25, 0.25, 0.25]
    """

    count: int
    importance: Float32
    mean: Float32 | None = None
    hessian: tuple[Float32, ...] | None = None
    held_back: Float32 | None = None
    drift: tuple[Float32, ...] | None = None


class Statistics:
    """Statistics by weight name.

    Args:
        config: the model.
        load: input name (see ``input_names``) → its statistics, or None where there are none.
    """

    def __init__(self, config: DecoderConfig, load: Callable[[str], LayerStats | None]) -> None:
        self._config = config
        self.load = load
        self._folder: Path | None = None
        self._last: tuple[str, LayerStats | None] = ("", None)
        self._lock = threading.Lock()  # slabs of one weight are solved at a time

    def for_weight(self, name: str) -> LayerStats | None:
        """Statistics of a weight's input; None for an embedding or an input without statistics.

        Args:
            name: as in ``compress.decoder.config.WeightMap``, fused or not.

        Consecutive calls for weights of the same input (row slabs; q, k and v) return the same
        object, so that a solver can cache what it computes from it.
        """
        key = input_of(self._config, name)
        if key is None:
            return None
        with self._lock:
            if key != self._last[0]:
                self.forget()  # before the next is loaded: it is large
                self._last = (key, self.load(key))
            return self._last[1]

    def forget(self) -> None:
        """Drop the cached statistics; the next use reads them again."""
        self._last = ("", None)

    @classmethod
    def of(cls, config: DecoderConfig, stats: Mapping[str, LayerStats]) -> Statistics:
        """Statistics from a mapping by input name, all in memory."""
        return cls(config, stats.get)

    @classmethod
    def open(cls, config: DecoderConfig, folder: Path, *, hessian: bool) -> Statistics:
        """Statistics from the files of ``save``, read on request.

        Args:
            hessian: False does not load Hessians.
        """
        made = cls(config, lambda key: load(folder / file_name(key), key, hessian=hessian))
        made._folder = folder
        return made

    def count(self, key: str) -> int:
        """The tokens that an input has seen; no Hessian is loaded."""
        if self._folder is None:
            found = self.load(key)
        else:
            found = load(self._folder / file_name(key), key, hessian=False)
        return found.count if found else 0


def input_of(config: DecoderConfig, name: str) -> str | None:
    """Input name of a weight: ``blocks.3.v_proj.weight`` → ``blocks.3.q_proj``.

    None for embeddings, norms and biases.
    """
    block, role, kind = split_name(name)
    if kind != "weight":
        return None
    if role == "lm_head":
        return role
    group, dot, last = role.rpartition(".")  # of an expert: experts.17
    leader = input_roles(config).get(last)
    if block is None or leader is None or group == "experts":  # all of them together
        return None
    return f"blocks.{stored_block(config, block)}.{group}{dot}{leader}"


def input_names(config: DecoderConfig) -> Iterator[str]:
    """Every input once, in order of execution."""
    first = [input_of(config, f"blocks.0.{role}.weight") for role in config.linear_roles]
    roles = [key.removeprefix("blocks.0.") for key in dict.fromkeys(first) if key]
    for block in range(0, config.num_hidden_layers, config.block_repeat):
        absent = config.kinds[config.layers[block]].absent
        for role in roles:
            if role not in absent:
                yield f"blocks.{block}.{role}"
    yield "lm_head"


# --- files -----------------------------------------------------------------------------------


def file_name(key: str) -> str:
    """The file that holds an input's statistics: ``blocks.3.npz``, ``blocks.3.experts.17.npz``,
    ``lm_head.npz``."""
    return ".".join(key.split(".")[: 4 if ".experts." in key else 2]) + ".npz"


def save(path: Path, stats: Mapping[str, LayerStats]) -> None:
    """Write the statistics of one file's inputs."""
    arrays: dict[str, Any] = {}
    for key, entry in stats.items():
        arrays[f"{key}.count"] = np.int64(entry.count)
        arrays[f"{key}.importance"] = entry.importance
        if entry.mean is not None:
            arrays[f"{key}.mean"] = entry.mean
        for index, hessian in enumerate(entry.hessian or ()):
            roots, triangle = pack_hessian(hessian)
            arrays[f"{key}.hessian.{index}.roots"] = roots
            arrays[f"{key}.hessian.{index}.correlations"] = triangle
        if entry.held_back is not None:
            peaks = np.maximum(np.abs(entry.held_back).max(axis=1, keepdims=True), TINY)
            arrays[f"{key}.held_back.peaks"] = peaks
            arrays[f"{key}.held_back.rows"] = (entry.held_back / peaks).astype(np.float16)
    np.savez(path, **arrays)


def load(path: Path, key: str, *, hessian: bool) -> LayerStats | None:
    """Read the statistics of one input; None where the file does not have it.

    Raises:
        CheckpointError: a damaged file.
    """
    try:
        with np.load(path) as arrays:
            if f"{key}.count" not in arrays:
                return None
            blocks: list[Float32] = []
            while hessian and f"{key}.hessian.{len(blocks)}.roots" in arrays:
                stem = f"{key}.hessian.{len(blocks)}"
                roots, triangle = arrays[f"{stem}.roots"], arrays[f"{stem}.correlations"]
                blocks.append(unpack_hessian(roots, triangle))
            held_back = None
            if hessian and f"{key}.held_back.rows" in arrays:
                held_back = arrays[f"{key}.held_back.rows"] * arrays[f"{key}.held_back.peaks"]
            return LayerStats(
                count=int(arrays[f"{key}.count"]),
                importance=arrays[f"{key}.importance"],
                mean=arrays.get(f"{key}.mean"),
                hessian=tuple(blocks) or None,
                held_back=held_back,
            )
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise CheckpointError(
            f"{path.name} cannot be read: {one_line(error)}",
            hint=f"delete {path.parent}, a cache that will be made again",
        ) from error


def pack_hessian(hessian: Float32) -> tuple[Float32, NDArray[np.int16]]:
    """Square roots of the diagonal, and the correlations of the upper triangle row by row."""
    size = hessian.shape[0]
    roots = np.sqrt(np.diagonal(hessian))
    inverse = np.divide(1.0, roots, out=np.zeros_like(roots), where=roots > 0)
    triangle = np.empty(size * (size + 1) // 2, np.int16)
    start = 0
    for row in range(size):
        correlations = hessian[row, row:] * inverse[row] * inverse[row:]
        steps = np.rint(correlations * CORRELATION_STEPS)
        triangle[start : start + size - row] = steps.clip(-CORRELATION_STEPS, CORRELATION_STEPS)
        start += size - row
    return roots, triangle


def unpack_hessian(roots: Float32, triangle: NDArray[np.int16]) -> Float32:
    """The inverse of ``pack_hessian``, float32 ``[n, n]``."""
    size = len(roots)
    hessian = np.empty((size, size), np.float32)
    start = 0
    for row in range(size):
        correlations = triangle[start : start + size - row]
        hessian[row, row:] = correlations * (roots[row] / CORRELATION_STEPS) * roots[row:]
        hessian[row:, row] = hessian[row, row:]
        start += size - row
    return hessian
