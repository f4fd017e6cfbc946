"""The KL divergence that an error in a tensor adds to the model's output, to second order.

For a change ``δ`` of the weights it is ``½ δᵀ F δ`` nats, where ``F`` is the Fisher information of
the output. Rounding errors are nearly independent, so that its mean needs the diagonal of ``F``
alone: ``½ Σ σᵢ² Fᵢᵢ``. The diagonal is the mean square of a gradient: of a Gaussian vector with the
covariance of the output, ``diag(p) - p pᵀ``, passed backwards through the model. So a few backward
passes serve all tensors, where a measurement with noise takes a forward pass for each; and one
figure of a tensor serves all grids, as divergences are proportional to its relative squared error
and add up (the linearity of HIGGS, arXiv 2411.17525).

``σ`` is that of a grid's error: proportional to the root mean square of every group of 32 columns.
One block's weights are in memory at a time, and the states before every block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compress.allocation.tensor_error import sample_rows, squares
from compress.calibration.statistics import LayerStats, Statistics
from compress.checkpoint.sources import Source
from compress.decoder.config import Float32

if TYPE_CHECKING:
    from torch import Tensor

    from compress.decoder.decoder import Block

__all__ = ["Sensitivity", "measure"]

LEVEL = 0.1  # of the error, relative to the weights: a squared error of 1 %, as with four bits
GROUP = 32
MOST_TOKENS = 1024
SHORTEST, PIECES = 128, 4  # tokens of a piece of text, and number of pieces at least
SAMPLES = 2  # backward passes of each piece
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
POSITIONS = 64  # whose logits are in memory at a time
HEAD_ROWS = 1 << 13

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivity of one tensor.

    Attributes:
        divergence: mean KL(float ‖ with an error of ``LEVEL``), nats per token.
        error: relative squared error of the outputs at ``LEVEL``, as of ``relative_error``.
    """

    divergence: float
    error: float

    @property
    def slope(self) -> float:
        """Nats per unit of relative squared error."""
        return self.divergence / self.error if self.error > 0 else 0.0


def measure(
    source: Source,
    windows: Sequence[Sequence[int]],
    statistics: Statistics,
    progress: Progress = lambda done, total: None,
    *,
    most: int = MOST_TOKENS,
    samples: int = SAMPLES,
) -> dict[str, Sensitivity]:
    """The sensitivity of every linear and of the embedding, by unfused name, stored blocks once.

    Args:
        source: the weights.
        windows: token ids.
        statistics: of the inputs, to weight the error.
        progress: ``progress(done, total)`` in blocks, of which each is run twice.
        most: most tokens used.
        samples: backward passes of each piece of text; the estimate's variance is inverse to it.
    """
    return _Measurement(source, pieces_of(windows, most), statistics, samples).run(progress)


def pieces_of(windows: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Pieces of the windows with ``most`` tokens together, at least ``PIECES`` if they are long."""
    length = min(len(windows[0]), max(SHORTEST, most // PIECES))
    starts = range(0, len(windows[0]) - length + 1, length)
    pieces = [list(w[start : start + length]) for start in starts for w in windows]
    return pieces[: max(1, most // length)]


class _Measurement:
    """One measurement; states are lists of ``[length, hidden]``, a tensor per piece of text."""

    def __init__(
        self,
        source: Source,
        pieces: Sequence[Sequence[int]],
        statistics: Statistics,
        samples: int,
    ) -> None:
        import torch

        from compress.decoder.decoder import Decoder

        self.source, self.config, self.statistics = source, source.config, statistics
        self.pieces, self.samples = pieces, samples
        self.decoder = Decoder(self.config, source.read)
        self.rope = self.decoder.rope(max(map(len, pieces)))
        self.random = torch.Generator().manual_seed(0)
        self.sums: dict[str, float] = {}  # Σ σ² g² of each tensor
        self.errors: dict[str, float] = {}

    def run(self, progress: Progress) -> dict[str, Sensitivity]:
        import torch

        stored = range(0, self.config.num_hidden_layers, self.config.block_repeat)
        total = 2 * len(stored)
        with torch.no_grad():
            states = self.decoder.embed(self.pieces)
            before = []
            for done, index in enumerate(stored):
                before.append(states)
                blocks = self.blocks(index)
                states = [self.through(blocks, hidden) for hidden in states]
                progress(done + 1, total)
        gradients = self.back_through_head(states)
        for done, index in enumerate(reversed(stored), len(stored)):
            self.back_through_block(index, before.pop(), gradients)
            progress(done + 1, total)
        self.back_through_embedding(gradients)
        count = self.samples * sum(map(len, self.pieces))
        return {
            name: Sensitivity(total / (2 * count), self.errors[name])
            for name, total in self.sums.items()
        }

    def blocks(self, index: int) -> list[Block]:
        """A stored block and its repeats, with one set of weights."""
        from compress.decoder.decoder import Block

        first = Block(self.config, index, self.source.read)
        blocks = [first]
        for repeat in range(1, self.config.block_repeat):
            blocks.append(Block(self.config, index + repeat, self.source.read, roles=()))
            blocks[-1].weights = first.weights
        return blocks

    def through(self, blocks: Sequence[Block], hidden: Tensor) -> Tensor:
        """Run a stored block with its repeats."""
        for block in blocks:
            hidden = block(hidden, self.rope)
        return hidden

    def back_through_head(self, states: Sequence[Tensor]) -> list[list[Tensor]]:
        """Gradients at the last block's output, by piece and sample; adds up the head's."""
        import torch
        import torch.nn.functional as F

        from compress.decoder.layers import as_tensor, finished, normalize

        def vector(name: str, present: bool) -> Tensor | None:
            return as_tensor(self.source.read(name)) if present else None

        scale, c = as_tensor(self.source.read("norm.weight")), self.config
        shift = vector("norm.bias", c.has_bias("norm"))
        head, bias = self.source.read(HEAD), vector("lm_head.bias", c.has_bias("lm_head"))
        matrix = as_tensor(head)
        runs = [slice(s, s + HEAD_ROWS) for s in range(0, len(head), HEAD_ROWS)]
        variances = [variances_of(matrix[run]) for run in runs]
        self.errors[HEAD] = self.expected_error(HEAD, head)
        total, found = 0.0, []
        for piece in states:
            gradients: list[list[Tensor]] = [[] for _ in range(self.samples)]
            for some in torch.split(piece, POSITIONS):
                hidden = some.detach().requires_grad_()
                normed = normalize(c, hidden, scale, shift, c.norm_eps)
                raw = F.linear(normed, matrix, bias)
                logits = finished(c, raw)
                with torch.no_grad():
                    chances = logits.softmax(dim=-1)
                    roots = chances.sqrt()
                for gradient in gradients:
                    drawn = roots * torch.randn(roots.shape, generator=self.random)
                    drawn -= chances * drawn.sum(dim=-1, keepdim=True)
                    gradient += torch.autograd.grad(logits, hidden, drawn, retain_graph=True)
                # A row of the head changes its own logit alone.
                spread = chances - chances.square()
                if logits is not raw:
                    slopes = torch.autograd.grad(logits.sum(), raw)[0]
                    spread *= slopes.square()
                inputs = squares_by_group(normed.detach())
                for run, variance in zip(runs, variances, strict=True):
                    total += float(((inputs @ variance.T) * spread[:, run]).sum())
            found.append([torch.cat(gradient) for gradient in gradients])
        self.sums[HEAD] = self.samples * total
        return found

    def back_through_block(
        self, index: int, before: Sequence[Tensor], gradients: Sequence[list[Tensor]]
    ) -> None:
        """Replace the gradients at a stored block's output by those at its input; adds up those of
        its linears."""
        import torch

        blocks = self.blocks(index)
        for role in self.config.linear_roles:
            if role in blocks[0].kind.absent:
                continue
            name, weight = f"blocks.{index}.{role}.weight", blocks[0].weights[f"{role}.weight"]
            self.errors[name] = self.expected_error(name, weight.numpy())
            self.sums[name] = 0.0
            self.count_gradients(name, weight)
        for hidden, mine in zip(before, gradients, strict=True):
            hidden = hidden.detach().requires_grad_()
            after = self.through(blocks, hidden)
            for sample, gradient in enumerate(mine):
                torch.autograd.backward(after, gradient, retain_graph=True)
                assert hidden.grad is not None
                mine[sample], hidden.grad = hidden.grad, None

    def count_gradients(self, name: str, weight: Tensor) -> None:
        """Add up the gradients of a weight, each deleted at once."""
        variances = variances_of(weight)

        def count(leaf: Tensor) -> None:
            assert leaf.grad is not None
            self.sums[name] += float((squares_by_group(leaf.grad) * variances).sum())
            leaf.grad = None

        hook = weight.requires_grad_().register_post_accumulate_grad_hook
        hook(count)  # type: ignore[no-untyped-call]

    def back_through_embedding(self, gradients: Sequence[list[Tensor]]) -> None:
        """Add up the gradients of the embedding's rows."""
        import torch

        rows = self.source.read(EMBEDDING)
        total = 0.0
        for tokens, mine in zip(self.pieces, gradients, strict=True):
            used, where = np.unique(np.array(tokens), return_inverse=True)
            variances = variances_of(torch.from_numpy(np.ascontiguousarray(rows[used])))
            for gradient in mine:
                summed = torch.zeros(len(used), gradient.shape[1])
                summed.index_add_(0, torch.from_numpy(where), gradient * self.config.embed_scale)
                total += float((squares_by_group(summed) * variances).sum())
        self.sums[EMBEDDING], self.errors[EMBEDDING] = total, LEVEL**2

    def expected_error(self, name: str, weight: Float32) -> float:
        """The relative error of a tensor at ``LEVEL``, from some of its rows."""
        import torch

        some = np.concatenate([weight[run] for run in sample_rows(*weight.shape)])
        stats = self.statistics.for_weight(name)
        roots = torch.from_numpy(np.sqrt(importance_of(stats, some.shape[1])))
        by_group = squares_by_group(roots[None])[0]
        variances = variances_of(torch.from_numpy(some)).sum(dim=0)
        total = squares(some, stats)
        return float(variances @ by_group) / total if total > 0 else 0.0


def importance_of(stats: LayerStats | None, columns: int) -> Float32:
    """What ``relative_error`` weights a column's squared error by where errors are independent."""
    if stats is not None and stats.hessian is not None:
        return np.concatenate([np.diagonal(block) for block in stats.hessian])
    if stats is None or not stats.importance.any():
        return np.ones(columns, np.float32)
    return stats.importance


def squares_by_group(values: Tensor) -> Tensor:
    """Sums of squares of every ``GROUP`` columns, ``[rows, groups]``."""
    import torch.nn.functional as F

    padded = F.pad(values.square(), (0, -values.shape[1] % GROUP))
    return padded.view(len(values), -1, GROUP).sum(dim=-1)


def variances_of(weight: Tensor) -> Tensor:
    """The variance of each weight's error at ``LEVEL``, alike in a group: ``[rows, groups]``."""
    import torch

    columns = weight.shape[1]
    starts = torch.arange(0, columns, GROUP)
    widths = (columns - starts).clamp(max=GROUP)
    return squares_by_group(weight.detach()) * (LEVEL**2 / widths)
