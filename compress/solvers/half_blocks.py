"""Measures the output error of half a block, or of the head, after folding and rounding, on inputs
that were held back from calibration: attention runs whole windows, an MLP rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from compress.calibration.statistics import LayerStats, Statistics, input_of
from compress.checkpoint.sources import Source
from compress.decoder.config import DecoderConfig, Float32, WeightMap, input_roles
from compress.decoder.decoder import Block, Decoder, reader
from compress.decoder.layers import as_tensor
from compress.errors import UsageError
from compress.grids import Grid
from compress.solvers import get_solver
from compress.solvers.folding import Folded, Folds, fold_statistics

__all__ = ["HalfTrial", "HeadTrial", "Trial", "halves", "some_rows"]

RUN = 32  # rows that are sampled together, or whole palettes
HEAD = "lm_head"
HEAD_ROWS = 4096  # rows of the head that its error is measured on


@dataclass(frozen=True)
class Half:
    """Attention or MLP of a stored block; both where they share their input (phi).

    Attributes:
        block: index of the block.
        roles: of its weights.
        sites: names of the inputs inside, its own first.
    """

    block: int
    roles: tuple[str, ...]
    sites: tuple[str, ...]


def halves(config: DecoderConfig, block: int) -> Iterator[Half]:
    """The halves of a block in order of execution."""
    roles = config.linear_roles
    attention, mlp = roles[:4], roles[4:]
    norms = [role for role in config.norm_roles if role in ("q_norm", "k_norm")]
    shared = config.parallel_residual and len(config.norms) == 1
    parts = [(*norms, *roles)] if shared else [(*norms, *attention), mlp]
    for part in parts:
        leaders = dict.fromkeys(input_roles(config)[role] for role in part if role in roles)
        yield Half(block, part, tuple(f"blocks.{block}.{leader}" for leader in leaders))


class Trial:
    """Folds and rounds some weights and measures the error of their output.

    Args:
        source: the float weights.
        statistics: of their inputs; some were held back.
        sites: names of the inputs, in order of execution (``calibration.statistics.input_names``).
        entries: weights that will be rounded, and their grids.
        solver: name of the solver that chooses the codes.
    """

    def __init__(
        self,
        source: Source,
        statistics: Statistics,
        sites: tuple[str, ...],
        entries: Mapping[str, Grid],
        solver: str,
    ) -> None:
        self.source, self.statistics, self.sites = source, statistics, sites
        self.entries, self.solver = entries, solver

    def stats(self, site: str) -> LayerStats:
        """Statistics of an input."""
        return stats_of(self.statistics, site)

    def entries_of(self, site: str) -> list[tuple[str, Grid]]:
        """The weights that multiply an input and will be rounded."""
        config = self.source.config
        return [(n, grid) for n, grid in self.entries.items() if input_of(config, n) == site]

    def error(self, folds: Folds) -> float:
        """The error on held-back inputs, with folds and the solver's codes."""
        raise NotImplementedError


class HalfTrial(Trial):
    """Half a block; its error is the mean square of the output's over the output's mean square.

    Args:
        half: which half.
        entries: as ``Trial``; may be of the whole block.
        length: tokens of a window.

    Raises:
        UsageError: no inputs were held back.
    """

    def __init__(
        self,
        source: Source,
        statistics: Statistics,
        half: Half,
        entries: Mapping[str, Grid],
        solver: str,
        length: int,
    ) -> None:
        super().__init__(source, statistics, half.sites, entries, solver)
        self._half, self._length = half, length
        self._wanted = self._outputs(source.read, held_back(statistics, half.sites[0]))

    def error(self, folds: Folds) -> float:
        """See ``Trial.error``."""
        config = self.source.config
        folded = Folded(self.source, folds)
        statistics = fold_statistics(config, self.statistics, folds)
        solve = get_solver(self.solver)
        weights = {
            name: solve(folded.read(name), grid, statistics.for_weight(name)).decode()
            for site in self.sites
            for name, grid in self.entries_of(site)
        }
        rounded = reader(config, weights)

        def read(name: str) -> Float32:
            try:
                return rounded(name)
            except KeyError:  # a norm, a bias, a weight that stays float
                return folded.read(name)

        found = self._outputs(read, held_back(statistics, self.sites[0]))
        size = float(np.mean(self._wanted**2))
        return float(np.mean((found - self._wanted) ** 2)) / (size or 1.0)  # 1: the output is 0

    def _outputs(self, read: Callable[[str], Float32], inputs: Float32) -> Float32:
        """The half block's output, added to the residual stream, float32 ``[rows, hidden]``."""
        import torch

        config, x = self.source.config, as_tensor(inputs)
        block = Block(config, self._half.block, read, self._half.roles)
        total = torch.zeros(len(x), config.hidden_size)
        if "q_proj" in self._half.roles:
            rope = Decoder(config, read).rope(self._length)
            windows = torch.split(x, self._length)
            total += torch.cat([block.attention(window, rope) for window in windows])
        if "up_proj" in self._half.roles:
            total += block.mlp(x)
        outputs: Float32 = total.numpy()
        return outputs


class HeadTrial(Trial):
    """The head, unless it is tied; its error is the mean KL divergence of the next token's
    probabilities, over ``HEAD_ROWS`` of its rows.

    A squared error of logits would weigh improbable tokens as much as likely ones. On the demo
    model folds that lowered it by a quarter made the KL divergence worse.

    Args:
        grid: of the head.

    Raises:
        UsageError: no inputs were held back.
    """

    def __init__(self, source: Source, statistics: Statistics, grid: Grid, solver: str) -> None:
        super().__init__(source, statistics, (HEAD,), {f"{HEAD}.weight": grid}, solver)
        self._grid = grid
        self._wanted = self._log_probabilities(self._rows(source), held_back(statistics, HEAD))

    def error(self, folds: Folds) -> float:
        """See ``Trial.error``."""
        statistics = fold_statistics(self.source.config, self.statistics, folds)
        weight = self._rows(Folded(self.source, folds))
        stats = statistics.for_weight(f"{HEAD}.weight")
        codes = get_solver(self.solver)(weight, self._grid, stats)
        found = self._log_probabilities(codes.decode(), held_back(statistics, HEAD))
        return float(np.mean(np.sum(np.exp(self._wanted) * (self._wanted - found), axis=1)))

    def _rows(self, source: Source) -> Float32:
        return some_rows(source, f"{HEAD}.weight", self._grid, HEAD_ROWS)

    def _log_probabilities(self, weight: Float32, inputs: Float32) -> Float32:
        logits = inputs @ weight.T
        if self.source.config.has_bias(HEAD):
            logits += some_rows(self.source, f"{HEAD}.bias", self._grid, HEAD_ROWS)
        logits *= np.float32(self.source.config.logit_scale)
        logits -= logits.max(axis=1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logits


def stats_of(statistics: Statistics, site: str) -> LayerStats:
    """Statistics of an input.

    Raises:
        UsageError: there are none.
    """
    stats = statistics.for_weight(f"{site}.weight")
    if stats is None:
        raise UsageError(f"nothing is known of the input of {site}", hint="quantize.fold: none")
    return stats


def held_back(statistics: Statistics, site: str) -> Float32:
    """Inputs that the Hessian has not seen, float32 ``[rows, columns]``.

    Raises:
        UsageError: there are none.
    """
    rows = stats_of(statistics, site).held_back
    if rows is None:
        raise UsageError(
            "too few calibration windows to keep any back, and folds are measured on those",
            hint="16 windows or more: calibration.tokens, calibration.sequence_length",
        )
    return rows


def some_rows(source: Source, name: str, grid: Grid, sample: int) -> Float32:
    """A sample of a weight's rows in evenly spaced runs; all rows where they are few or make no
    whole runs.

    Args:
        source: of the weight.
        name: of the weight, or of its bias.
        grid: that it will be rounded to: rows that share a palette stay together.
        sample: number of rows, about.

    Returns:
        float32, the shape of the weight except for the rows.
    """
    rows = WeightMap(source.config).shape(name)[0]
    run = math.lcm(RUN, grid.group_rows or 1)
    if rows <= sample or rows % run:
        return source.read(name)
    starts = np.linspace(0, rows // run - 1, max(1, sample // run)).round().astype(int) * run
    return np.concatenate([source.read(name, slice(s, s + run)) for s in starts.tolist()])
