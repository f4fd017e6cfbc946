"""The relative squared output error of a changed tensor.

``Σ (ΔW x)² / Σ (W x)²`` over rows and inputs: with the Hessian ``H`` of the inputs it is
``tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)``; with importance alone, inputs are taken to be uncorrelated; without
statistics (an embedding), all columns have equal weight. For a large tensor it is estimated on a
sample of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from compress.calibration.statistics import LayerStats
from compress.grids import Float32

__all__ = ["relative_error", "sample_rows", "sampled"]

SAMPLE = 1 << 19  # weights of a tensor in the sample, by default
RUN = 32  # adjacent rows in the sample: at least those that share a palette


def relative_error(weight: Float32, change: Float32, stats: LayerStats | None) -> float:
    """See the module; 0 for a tensor of zeros.

    Args:
        weight, change: float32 ``[rows, columns]``.
        stats: of the input.
    """
    total = squares(weight, stats)
    return squares(change, stats) / total if total > 0 else 0.0


def squares(values: Float32, stats: LayerStats | None) -> float:
    """Mean square of ``values @ x``, summed over rows."""
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
    """Evenly spaced runs of rows with about ``sample`` weights; all rows of a small tensor."""
    runs = max(1, sample // (RUN * columns))
    if rows <= runs * RUN:
        return [slice(0, rows)]
    places = np.linspace(0, rows // RUN - 1, runs).astype(int)
    return [slice(int(place) * RUN, int(place + 1) * RUN) for place in dict.fromkeys(places)]


def sampled(
    read: Callable[[slice], Float32], rows: int, columns: int, sample: int = SAMPLE
) -> Float32:
    """The rows of ``sample_rows``, concatenated."""
    return np.concatenate([read(run) for run in sample_rows(rows, columns, sample)])
