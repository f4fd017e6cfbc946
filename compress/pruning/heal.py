"""Healing: trains the remaining weights of each block to reproduce the float model's states.

Block by block, in order: all weights of a pruned block (linears, norms, biases) are trained so that
its output approaches the float model's hidden states at the same position, on inputs from the
pruned and healed blocks before it. After dropped blocks that position is the next retained block's
input, so that a retained block learns to replace those that followed it. (Block-wise
reconstruction as in BRECQ, Li et al., arXiv 2102.05426, which uses it for rounding.)

Memory holds one block's weights, their gradients and Adam's two moments in float32, activations of
one window, and the hidden states of all windows twice, in bfloat16 (in a mapped file where they are
large). One window in sixteen is held out: on those, weights rounded to the checkpoint's dtype are
evaluated, and the best are used; a block that does not improve is not changed.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.calibration.walk import HELD_BACK, hidden_states
from compress.checkpoint.safetensors import write_safetensors
from compress.checkpoint.save import stored_dtypes
from compress.checkpoint.sources import Source
from compress.decoder.config import FUSED
from compress.decoder.decoder import Block, Decoder
from compress.decoder.layers import RopeTables
from compress.errors import UsageError
from compress.plan.cut import Healing
from compress.pruning.pruned import Healed

__all__ = ["Adam", "heal"]

BATCH = 4  # windows per step
RATE = 0.002  # size of the first step, relative to a tensor's root mean square
ROUNDING = 2.0**-18  # relative squared error of rounding states to bfloat16
MEASURES = 8  # evaluations of a block during its training


class Adam:
    """Adam (Kingma & Ba, arXiv 1412.6980) with steps relative to each tensor's size, in place.

    A step of ``rate`` changes a weight by about ``rate`` times its tensor's initial root mean
    square, so that norms around 1 and linears around 0.02 change in proportion.
    """

    def __init__(self, weights: Sequence[Tensor], betas: tuple[float, float] = (0.9, 0.99)) -> None:
        self._weights = weights
        self._betas = betas
        self._sizes = [max(float(w.detach().square().mean().sqrt()), 1e-3) for w in weights]
        self._moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
        self._steps = 0

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update the weights from their gradients, and clear these."""
        self._steps += 1
        first, second = self._betas
        mean_scale, square_scale = 1 - first**self._steps, 1 - second**self._steps
        for weight, size, (mean, square) in zip(
            self._weights, self._sizes, self._moments, strict=True
        ):
            assert weight.grad is not None
            mean.lerp_(weight.grad, 1 - first)
            square.mul_(second).addcmul_(weight.grad, weight.grad, value=1 - second)
            weight.grad.copy_(square).div_(square_scale).sqrt_().add_(1e-12)
            weight.addcdiv_(mean, weight.grad, value=-rate * size / mean_scale)
            weight.grad = None


class WindowStates:
    """The hidden states of all windows: a block's inputs, and its target outputs (goals).

    Args:
        whole: the float model.
        windows: of one length, at least two.
        work: folder for the states, where they are large.
    """

    def __init__(self, whole: Source, windows: Sequence[Sequence[int]], work: Path) -> None:
        decoder = Decoder(whole.config, whole.read)
        embedded = decoder.embed(windows)
        self.rope: RopeTables = decoder.rope(len(windows[0]))
        self.goals = hidden_states(embedded, torch.bfloat16, work, "floats.bin")
        self.states = hidden_states(embedded, torch.bfloat16, work)
        every = min(HELD_BACK, len(windows))
        self.held = [i for i in range(len(windows)) if i % every == every - 1]
        self.trained = [i for i in range(len(windows)) if i % every != every - 1]
        self._whole = whole
        self._repeat = whole.config.block_repeat

    def advance_goals(self, stored: int) -> None:
        """Run the float model's states through one of its stored blocks."""
        config = self._whole.config
        self._advance(self.goals, Block(config, stored * self._repeat, self._whole.read))

    def advance_states(self, block: Block) -> None:
        """Run the pruned model's states through a finished block."""
        self._advance(self.states, block)

    def _advance(self, states: Tensor, block: Block) -> None:
        for position in range(len(states)):
            states[position] = self.run(block, states[position].float())

    def run(self, block: Block, hidden: Tensor) -> Tensor:
        """Run a stored block with its repeats: ``[n, hidden]`` → ``[n, hidden]``."""
        for _ in range(self._repeat):
            hidden = block(hidden, self.rope)
        return hidden

    def misfit(self, block: Block, position: int) -> Tensor:
        """Mean over a window's tokens of squared error ÷ squared goal.

        Relative, because the next norm divides each token by its size: first tokens are often a
        hundred times larger than the rest.
        """
        goal = self.goals[position].float()
        error = self.run(block, self.states[position].float()) - goal
        return (error.square().sum(-1) / goal.square().sum(-1).clamp_min(1e-12)).mean()

    def held_error(self, block: Block) -> float:
        """The same, for the held-out windows."""
        with torch.no_grad():
            return sum(float(self.misfit(block, i)) for i in self.held) / len(self.held)

    def batches(self, seed: int) -> Iterator[list[int]]:
        """Endless batches of training windows, shuffled; each window once per epoch."""
        order, shuffle = list(self.trained), random.Random(seed)
        size = min(BATCH, len(order))
        while True:
            shuffle.shuffle(order)
            for start in range(0, len(order) - size + 1, size):
                yield order[start : start + size]


def heal(
    whole: Source,
    pruned: Source,
    retained: Sequence[int],
    healing: Healing,
    windows: Sequence[Sequence[int]],
    folder: Path,
    work: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    clock: Callable[[], float] = time.monotonic,
    rate: float = RATE,
) -> dict[str, Any]:
    """Train every stored block of a pruned model.

    Args:
        whole: the float model.
        pruned: the model to heal.
        retained: for each stored block of the pruned model its index in the float model, ascending.
        healing: minutes for all blocks together, or steps for each.
        windows: calibration text, all of one length.
        folder: gets a safetensors file for each improved block.
        work: for temporary files, on the same disk.
        progress: in blocks.
        clock: returns seconds.
        rate: size of the first step, relative to a tensor's root mean square.

        Returns:
            Lists by block: ``steps`` done, held-out error ``before`` and ``after``; and ``digest``
            of the new weights.

    Raises:
        UsageError: fewer than two windows.
    """
    if len(windows) < 2:
        raise UsageError(
            "healing needs two windows of calibration text, one to train on and one to measure",
            hint="more calibration.tokens, or a smaller calibration.sequence_length",
        )
    window_states = WindowStates(whole, windows, work)
    shares = Shares(healing, len(retained), clock)
    ends = [*retained[1:], whole.config.num_hidden_layers // whole.config.block_repeat]
    found: dict[str, Any] = {"steps": [], "before": [], "after": []}
    digest = hashlib.sha256()
    reached = 0
    for number, end in enumerate(ends):
        shares.next_block()
        for stored in range(reached, end):
            window_states.advance_goals(stored)
        reached = end
        index = number * pruned.config.block_repeat
        file = folder / f"blocks.{index}.safetensors"
        shares.begin()
        steps, before, after = heal_block(
            window_states, pruned, index, shares.done, file, work, rate
        )
        for key, value in (("steps", steps), ("before", before), ("after", after)):
            found[key].append(value)
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(
                    f"{index} {hashlib.file_digest(stream, 'sha256').hexdigest()} ".encode()
                )
        window_states.advance_states(healed_block(pruned, index, folder))
        progress(number + 1, len(ends))
    return found | {"digest": digest.hexdigest()}


class Shares:
    """The progress of a block's healing from 0 to 1: by its steps, or by its share of the minutes.

    Time that a block leaves or overruns is shared by the blocks after it.
    """

    def __init__(self, healing: Healing, blocks: int, clock: Callable[[], float]) -> None:
        self._steps, self._blocks, self._clock = healing.steps, blocks, clock
        self._end = clock() + 60 * (healing.minutes or 0)
        self._start = self._limit = 0.0

    def next_block(self) -> None:
        """Start the time of a block, including its goals and evaluations."""
        now = self._clock()
        self._limit = now + (self._end - now) / self._blocks
        self._blocks -= 1

    def begin(self) -> None:
        """Mark the start of training steps."""
        self._start = self._clock()

    def done(self, steps: int) -> float:
        """The progress after so many steps; 1 ends the training, between steps."""
        if self._steps is not None:
            return min(1.0, steps / self._steps)
        left = self._limit - self._start
        return min(1.0, (self._clock() - self._start) / left) if left > 0 else 1.0


def heal_block(
    window_states: WindowStates,
    pruned: Source,
    index: int,
    done: Callable[[int], float],
    file: Path,
    work: Path,
    rate: float,
) -> tuple[int, float, float]:
    """Train one stored block; writes ``file`` if it improved.

    Args:
        window_states: states and goals of this block.
        pruned: its weights.
        index: of its first run.
        done: steps → progress of the healing.
        file: of the new weights, in the checkpoint's dtype.
        work: for weights that are being evaluated.
        rate: as for ``heal``.

    Returns:
        Steps done, held-out error before and after.
    """
    block = Block(pruned.config, index, pruned.read)
    before = best = window_states.held_error(block)
    if before <= ROUNDING:  # nothing to recover
        return 0, before, best
    for name, weight in block.weights.items():
        block.weights[name] = weight.clone().requires_grad_()
    adam = Adam(list(block.weights.values()))
    dtypes = stored_dtypes(pruned.checkpoint)
    trial = work / "trial"
    trial.mkdir(exist_ok=True)
    batches = window_states.batches(index)
    steps = measured = 0
    while (share := done(steps)) < 1:
        batch = next(batches)
        for position in batch:
            (window_states.misfit(block, position) / len(batch)).backward()  # type: ignore[no-untyped-call]
        adam.step(rate * (1 + math.cos(math.pi * share)) / 2)
        steps += 1
        if int(done(steps) * MEASURES) > measured:
            measured = int(done(steps) * MEASURES)
            save_block(block, dtypes, trial / file.name)
            error = window_states.held_error(healed_block(pruned, index, trial))
            if error < best:
                best = error
                (trial / file.name).replace(file)
    return steps, before, best


def healed_block(pruned: Source, index: int, folder: Path) -> Block:
    """A block with its weights from a folder, or unchanged where the folder has none."""
    return Block(pruned.config, index, Healed(pruned, pruned.config, folder, "").read)


def save_block(block: Block, dtypes: Mapping[tuple[str, str], str], file: Path) -> None:
    """Write a block's weights, unfused, each in its dtype in the checkpoint."""
    unfused = {
        f"{member}.{kind}": dtype
        for (role, kind), dtype in dtypes.items()
        for member in FUSED.get(role, (role,))
    }
    headers = {
        f"blocks.{block.index}.{name}": (unfused[name], tuple(weight.shape))
        for name, weight in block.weights.items()
    }
    values = (weight.detach().numpy() for weight in block.weights.values())
    write_safetensors(file, headers, values)
