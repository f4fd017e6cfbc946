"""The error of one tensor: what its change does to what it multiplies, relative to what it gives.

``Σ (ΔW x)² / Σ (W x)²`` over rows and inputs: with second moments ``H`` of the inputs it is
``tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)``; with their mean squares alone, inputs are taken to be uncorrelated;
with nothing (an embedding), every column counts the same. Some rows stand for all of a large
tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from compress.calibration.statistics import LayerStats
from compress.grids import Float32

__all__ = ["relative_error", "sample_rows", "sampled"]

SAMPLE = 1 << 19  # weights of a tensor that are looked at, where nothing else is said
RUN = 32  # rows that stay together: as many as share a palette


def relative_error(weight: Float32, change: Float32, stats: LayerStats | None) -> float:
    """See the module; 0 for a tensor of zeros.

    Args:
        weight, change: float32 ``[rows, columns]``.
        stats: of the input.
    """
    total = squares(weight, stats)
    return squares(change, stats) / total if total > 0 else 0.0


def squares(values: Float32, stats: LayerStats | None) -> float:
    """Mean square of what ``values`` make of the input, summed over rows."""
    if stats is not None and stats.hessian is not None:
        total, start = 0.0, 0
        for block in stats.hessian:
            part = values[:, start : start + len(block)]
            total += float(np.einsum("rc,rc->", part @ block, part, dtype=np.float64))
            start += len(block)
        return total
    by_column = np.einsum("rc,rc->c", values, values, dtype=np.float64)
    if stats is None or not stats.importance.any():
        return float(by_column.sum())
    return float(by_column @ stats.importance)


def sample_rows(rows: int, columns: int, sample: int = SAMPLE) -> list[slice]:
    """Runs of rows, evenly over the tensor, of about ``sample`` weights; all of a small one."""
    runs = max(1, sample // (RUN * columns))
    if rows <= runs * RUN:
        return [slice(0, rows)]
    places = np.linspace(0, rows // RUN - 1, runs).astype(int)
    return [slice(int(place) * RUN, int(place + 1) * RUN) for place in dict.fromkeys(places)]


def sampled(
    read: Callable[[slice], Float32], rows: int, columns: int, sample: int = SAMPLE
) -> Float32:
    """The rows of ``sample_rows``, one after the other."""
    return np.concatenate([read(run) for run in sample_rows(rows, columns, sample)])
