"""GPTQ on every grid: round column by column, and let the columns left make up for each error.

The order of the columns is one that the files can hold without an index of groups (no ``g_idx``):
columns that share parameters stay together, and whole such spans go by falling importance, the
columns of a span too. On entering a span its parameters are fitted to the weights as they are by
then, with what earlier columns left over; K-quants' integer scales are fixed by that before a code
is chosen. Where parameters belong to whole rows (channel scales, palettes) they are those of
``scale_search``, and all columns go by falling importance. Codebook grids are rounded a word at a
time (``gptq_words.py``), and the columns of a word stay beside each other.
When all codes are chosen, each is looked at again (``descend``).

``compress.solvers.hessian`` has the algebra.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from compress.calibration.statistics import LayerStats
from compress.grids import Array, CodebookGrid, Float32, Grid, LatticeGrid, Quantized
from compress.machine import in_order, worker_threads
from compress.solvers import error_weights
from compress.solvers.hessian import Factor, factor_in_place, factors_of, output_errors
from compress.solvers.rounding import PIECE, Spans, Whole, round_piece

__all__ = ["gptq"]

DESCENTS = 2  # times that every code is looked at again ...
DAMPING = 0.03  # ... with this share of the diagonal's mean added to it
ROWS = 1024  # of a slab; temporaries are a few float32 matrices of so many rows
SLABS = 4  # in work at once, at most


def gptq(
    weight: Float32,
    grid: Grid,
    stats: LayerStats | None = None,
    *,
    damping: float = 0.01,
    block: int = 128,
    slab: int = ROWS,
) -> Quantized:
    """Codes of least output error, found greedily column by column.

    Rows that measure worse than those of ``scale_search``, on inputs held back from the Hessian,
    become the latter.

    Args:
        weight: float32 ``[rows, columns]``, whole or some of its rows: rows are independent, except
            those that share a palette.
        grid: any grid; one that has no parameters just rounds.
        stats: of the weight's input. Without a Hessian this is ``scale_search``.
        damping: share of the Hessian diagonal's mean that is added to the diagonal.
        block: columns whose errors are spread over all later ones at once. Speed only.
        slab: rows that are solved for at once. Memory and speed only.

    Returns:
        ``fallen``: the rows that became those of ``scale_search``; all of them where the Hessian is
        empty or not a covariance.
    """
    searched = grid.quantize(weight, error_weights(stats))
    if stats is None or stats.hessian is None or not isinstance(grid, LatticeGrid | CodebookGrid):
        return searched
    together = grid.together if isinstance(grid, CodebookGrid) else 1
    factors = factors_of(stats, grid.span, damping, together)
    if not factors:
        return replace(searched, fallen=len(weight))
    rows = len(weight)
    codes, params = searched.codes.copy(), {k: v.copy() for k, v in searched.params.items()}
    whole = grid.lattice(params) if isinstance(grid, LatticeGrid) and not grid.span else None
    decoded = searched.decode()
    fallen = []

    def solve(start: int) -> None:
        part = slice(start, min(start + slab, rows))
        fits = Spans(grid, weight.shape[1]) if whole is None else Whole(whole, rows, part)
        trial, left = round_rows(weight[part], factors, fits, block)
        for _ in range(DESCENTS):
            descend(weight[part], trial, left, fits, stats, damping=DAMPING, block=block)
        before = weight[part] - decoded[part]
        better = output_errors(left, stats) <= output_errors(before, stats)
        codes[part][better] = trial[better]
        for key, values in fits.params().items():
            params[key][part][better] = values[better]
        fallen.append(len(better) - int(better.sum()))

    # A slab has a thread to itself: its steps are thousands, each too short to be shared out.
    slabs = (partial(solve, start) for start in range(0, rows, slab))
    for _ in in_order(slabs, min(worker_threads(), SLABS), share=1):
        pass
    return Quantized(codes, params, grid, searched.shape, sum(fallen))


def round_rows(
    weight: Float32, factors: tuple[Factor, ...], fits: Whole | Spans, block: int
) -> tuple[Array, Float32]:
    """Codes, uint8 ``[rows, columns]``, and what they leave of the weight, float32 likewise."""
    codes = np.empty(weight.shape, np.uint8)
    left = np.empty(weight.shape, np.float32)
    for factor in factors:
        codes[:, factor.order], left[:, factor.order] = round_columns(
            weight[:, factor.order], factor, fits, block
        )
    return codes, left


def round_columns(
    weight: Float32, factor: Factor, fits: Whole | Spans, block: int
) -> tuple[Array, Float32]:
    """As ``round_rows``, for the columns of one factor in its order of rounding."""
    codes = np.empty(weight.shape, np.uint8)
    left = np.empty(weight.shape, np.float32)
    columns, step = weight.shape[1], fits.span or PIECE
    stride = max(block // step, 1) * step
    for first in range(0, columns, stride):
        last = min(first + stride, columns)
        shares = left[:, :first] @ factor.feedback[:first, first:last]
        for start in range(first, last, step):
            part = slice(start, min(start + step, last))
            carried = shares[:, part.start - first : part.stop - first]
            carried += left[:, first:start] @ factor.feedback[first:start, part]
            values, run = fits.enter(weight[:, part], carried, factor, part)
            metric = factor.feedback[part, part], factor.variances[part]
            round_piece(
                weight[:, part], carried, *metric, values, run, codes[:, part], left[:, part]
            )
    return codes, left


# --- descent ------------------------------------------------------------------------------------


def descend(
    weight: Float32,
    codes: Array,
    left: Float32,
    fits: Spans | Whole,
    stats: LayerStats,
    *,
    damping: float,
    block: int,
) -> None:
    """Coordinate descent: every code is chosen once more, given all others; in place.

    GPTQ is greedy: what a column is rounded to takes account of the columns before it and of how
    those after it could still make up for it, not of what they became. Here each column in turn, in
    the weight's order, is rounded to what is best given all others, ``w_k + Σ_{j≠k} e_j H_jk /
    H_kk``, which can only lower ``e H eᵀ`` (cyclic coordinate descent, as in CDQuant, Nair &
    Suggala, arXiv 2406.17542). After the columns of a span its parameters are scaled by the factor
    that is best for those codes, where float16 can say it.

    On five kinds of linears of the demo model, in three blocks, two visits take off another 5 % of
    the output error on other text in int4-g32 and Q4_0, 3 % in K-quants and palettes; a third one
    nothing to speak of. (A least-squares refit of whole palettes under the Hessian took off 0.6 %
    and costs as much as two visits, so there is none.)

    Args:
        weight: float32 ``[rows, columns]``.
        codes: uint8 ``[rows, columns]``.
        left: float32 ``[rows, columns]``: the weight minus what the codes stand for.
        fits: the parameters of those codes; those of spans are scaled.
        stats: of the input; with a Hessian.
        damping: share of the Hessian diagonal's mean that is added to the diagonal.
        block: columns whose errors are spread over all others at once. Speed only.
    """
    start = 0
    for hessian in stats.hessian or ():
        columns = slice(start, start + len(hessian))
        some, theirs, rest = weight[:, columns], codes[:, columns], left[:, columns]
        damp = np.float32(damping) * np.diagonal(hessian).mean()
        step = fits.span or PIECE
        stride = max(block // step, 1) * step
        for first in range(0, len(hessian), stride):
            tile = slice(first, min(first + stride, len(hessian)))
            pulls = rest @ hessian[:, tile]  # e H, updated for these columns
            for inner in range(tile.start, tile.stop, step):
                part = slice(inner, min(inner + step, tile.stop))
                place = slice(start + part.start, start + part.stop)
                square, before = hessian[part, part], rest[:, part].copy()
                pull = pulls[:, part.start - first : part.stop - first] - before @ square
                damped = square + damp * np.eye(len(square), dtype="f4")
                piece = some[:, part], theirs[:, part], rest[:, part]
                descend_piece(*piece, damped, pull, fits, place)
                pulls += (rest[:, part] - before) @ hessian[part, tile]
        start += len(hessian)


def descend_piece(
    weight: Float32,
    codes: Array,
    left: Float32,
    square: Float32,
    pull: Float32,
    fits: Spans | Whole,
    place: slice,
) -> None:
    """As ``descend``, for a few columns.

    Args:
        square: float32 ``[n, n]``, their part of the damped Hessian.
        pull: float32 ``[rows, n]``: the errors of all other columns times the Hessian.
        place: which columns of the weight they are.
    """
    feedback, variances, settle, later = metric_of(square, fits.together)
    values, run = fits.at(place)
    carried = (pull + left @ later) @ settle
    found, rest = np.empty_like(codes), np.empty_like(left)
    round_piece(weight, carried, feedback, variances, values, run, found, rest)
    take_lower(found, rest, codes, left, square, pull)
    if scaled := fits.scaled(place, codes, best_factors(weight, weight - left, square, pull)):
        params, decoded = scaled
        lower = take_lower(codes, weight - decoded, codes, left, square, pull)
        fits.take(place, params, lower)


def metric_of(square: Float32, together: int) -> tuple[Float32, Float32, Float32, Float32]:
    """What the kernels of GPTQ need to round columns, or words of columns, given all others.

    For a word ``w`` with ``H_ww = U D Uᵀ`` and a pull ``p`` of all others ``e H_ww eᵀ + 2 p eᵀ`` is
    ``Σ_k D_k (c_k + Σ_{j<=k} e_j U_jk)²`` and a constant, where ``c = p U⁻ᵀ D⁻¹``.

    Args:
        square: float32 ``[n, n]``, positive definite.
        together: columns of a word.

    Returns:
        ``feedback``: float32 ``[n, n]``, ``U`` within a word, and what an error adds to the ``c``
        of later words. ``variances``: float32 ``[n]``, ``D``. ``settle``: float32 ``[n, n]``, the
        ``U⁻ᵀ D⁻¹`` of each word. ``later``: float32 ``[n, n]``, ``square`` from later words to
        earlier ones.
    """
    word = np.arange(len(square)) // together
    unit, settle = np.eye(len(square), dtype=np.float32), np.zeros_like(square)
    variances = np.diagonal(square).copy()
    for first in range(0, len(square), together) if together > 1 else ():
        part = slice(first, first + together)
        upper = square[part, part].copy()
        found = factor_in_place(upper)
        if found is not None:
            unit[part, part], variances[part] = np.triu(upper), found
            settle[part, part] = np.linalg.inv(unit[part, part]).T / found
    if together == 1:
        settle = np.diag(1 / variances)
    same = word[:, None] == word
    feedback = np.where(same, unit, square @ settle)
    return feedback, variances, settle, np.where(word[:, None] > word, square, np.float32(0))


def take_lower(
    codes: Array, errors: Float32, old: Array, left: Float32, square: Float32, pull: Float32
) -> Array:
    """Replace ``old`` codes and what they ``left`` in the rows where that costs less; which."""
    lower: Array = costs(errors, square, pull) < costs(left, square, pull)
    old[lower], left[lower] = codes[lower], errors[lower]
    return lower


def best_factors(weight: Float32, rounded: Float32, square: Float32, pull: Float32) -> Float32:
    """What to multiply each row's ``rounded`` by, float32 ``[rows]``, for the least output error.

    Args:
        weight: float32 ``[rows, n]``.
        rounded: float32 ``[rows, n]``.
        square: float32 ``[n, n]``, their part of the Hessian.
        pull: float32 ``[rows, n]``: the errors of all other columns times the Hessian.
    """
    wanted = np.einsum("ij,ij->i", rounded, weight @ square + pull)
    had = np.einsum("ij,ij->i", rounded, rounded @ square)
    factors: Float32 = np.divide(wanted, had, out=np.ones_like(had), where=had > 0)
    return factors


def costs(errors: Float32, square: Float32, pull: Float32) -> Array:
    """What some columns' errors add to each row's output error, float64 ``[rows]``.

    Args:
        errors: float32 ``[rows, n]``.
        square, pull: as ``best_factors``.
    """
    added: Array = np.einsum("ij,ij->i", errors, errors @ square + 2 * pull, dtype=np.float64)
    return added
