"""Depth pruning: drops the blocks whose absence changes the model's output least.

The measure is the KL divergence of the final logits from the float model's, over calibration text,
with one more block left out. It is measured again after each removed block, because the roles of
the remaining ones change (SLEB, Song et al., arXiv 2402.09025, who re-rank by perplexity). The
change of the hidden states costs a single walk, but ignores its effect on the logits: it only
selects the candidates of a deep model (ShortGPT's block influence, Men et al., arXiv 2403.03853).

All candidates run through the model together: at block ``i`` there is the trunk, without another
block removed, and a branch for every candidate before ``i``. So each walk reads each block once,
and holds one block and ``branches x tokens x hidden`` float32 values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.checkpoint.sources import Source
from compress.decoder.decoder import Decoder

__all__ = ["Departure", "choose_blocks", "measured_windows"]

TOKENS = 2048  # that candidates are measured on
CANDIDATES = 8  # measured in a deep model; or twice the number to drop, where that is more

States = list[Tensor]


@dataclass(frozen=True)
class Departure:
    """A dropped block.

    Attributes:
        block: its index among the stored blocks of the whole model.
        kl: mean KL divergence from the float model without it and the blocks dropped before, in
            nats per token.
    """

    block: int
    kl: float


def choose_blocks(
    source: Source,
    windows: Sequence[Sequence[int]],
    count: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Departure]:
    """Select the stored blocks to drop, in the order of selection.

    Args:
        source: the model.
        windows: calibration text; about ``TOKENS`` tokens of it are used.
        count: number of blocks to drop, fewer than there are.
        progress: ``progress(done, total)`` in stored blocks read.
    """
    walks = Walks(source, measured_windows(windows), progress, 1 + count)
    influences, final = walks.survey()
    listed = sorted(range(walks.blocks), key=influences.__getitem__)[: max(CANDIDATES, 2 * count)]
    gone: list[Departure] = []
    for _ in range(count):
        left = [block for block in listed if block not in {d.block for d in gone}]
        costs = walks.costs(left, {d.block for d in gone}, final)
        best = min(left, key=costs.__getitem__)
        gone.append(Departure(best, costs[best]))
    return gone


def measured_windows(windows: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """The windows that candidates are measured on: the first ``TOKENS`` tokens, at least one."""
    return windows[: max(1, TOKENS // len(windows[0]))]


def divergence(final: States, states: States, head: Callable[[Tensor], Tensor]) -> float:
    """Mean KL divergence of the logits of two models' last hidden states, through one head."""
    total, count = 0.0, 0
    for expected, found in zip(final, states, strict=True):
        p, q = F.log_softmax(head(expected), -1), F.log_softmax(head(found), -1)
        total += float((p.exp() * (p - q)).sum(-1).double().sum())
        count += len(expected)
    return total / count


class Walks:
    """Walks of the same windows through the blocks of one model.

    Attributes:
        blocks: number of stored blocks; one that runs twice in a row counts once.
    """

    def __init__(
        self,
        source: Source,
        windows: Sequence[Sequence[int]],
        progress: Callable[[int, int], None],
        count: int,
    ) -> None:
        self._decoder = Decoder(source.config, source.read)
        self._repeat = source.config.block_repeat
        self.blocks = source.config.num_hidden_layers // self._repeat
        self._embedded = self._decoder.embed(windows)
        self._rope = self._decoder.rope(max(map(len, windows)))
        self._progress, self._done, self._total = progress, 0, count * self.blocks

    def survey(self) -> tuple[list[float], States]:
        """The change of the hidden states by each block (1 - cosine), and the last states."""
        influences = []
        states = self._embedded
        for index in range(self.blocks):
            after = self._advance(index, [states])[0]
            pairs = zip(states, after, strict=True)
            cosines = [F.cosine_similarity(old, new, dim=-1) for old, new in pairs]
            influences.append(1 - float(torch.cat(cosines).double().mean()))
            states = after
        return influences, states

    def costs(self, candidates: Sequence[int], gone: set[int], final: States) -> dict[int, float]:
        """Mean KL divergence from the float model without each candidate.

        Args:
            candidates: stored blocks, each left out alone ...
            gone: ... in addition to these.
            final: last hidden states of the float model.
        """
        trunk = self._embedded
        branches: dict[int, States] = {}
        for index in range(self.blocks):
            if index in gone:
                self._tick()
                continue
            trunk_before = trunk
            trunk, *moved = self._advance(index, [trunk, *branches.values()])
            branches = dict(zip(branches, moved, strict=True))
            if index in candidates:
                branches[index] = trunk_before
        return {block: self._divergence(final, states) for block, states in branches.items()}

    def _advance(self, index: int, paths: Sequence[States]) -> list[States]:
        """Hidden states of several paths after a stored block."""
        block = self._decoder.block(index * self._repeat)
        moved = []
        for states in paths:
            for _ in range(self._repeat):
                states = [block(hidden, self._rope) for hidden in states]
            moved.append(states)
        self._tick()
        return moved

    def _divergence(self, final: States, states: States) -> float:
        """Mean KL divergence of the logits, nats a token."""
        return divergence(final, states, self._decoder.head())

    def _tick(self) -> None:
        self._done += 1
        self._progress(self._done, self._total)
