"""Measures, with noise, the KL divergence that an error in a tensor adds to the model's output.

Each tensor alone gets noise of a known relative error, and the KL divergence of the output is
measured. To second order the divergences of several tensors add up, and each is proportional to
its tensor's relative squared error (the linearity of HIGGS, arXiv 2411.17525), so one measurement
per tensor serves every grid.

All variants run through the model together, block by block: a variant branches off the float states
at the block of its tensor, so weights are read once. Where one variant per tensor would be too much
work, the tensors of a block share one, and its divergence is divided among them in proportion to
the change of the block's output by each.

Noise is Gaussian, scaled like a grid's error: by the root mean square of every group of 32 columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compress.allocation.tensor_error import relative_error, sample_rows
from compress.calibration.statistics import Statistics
from compress.checkpoint.sources import Source
from compress.decoder.config import DecoderConfig, Float32, WeightMap, split_name

if TYPE_CHECKING:
    from torch import Tensor

    from compress.decoder.layers import RopeTables

__all__ = ["Sensitivity", "measure"]

LEVEL = 0.1  # of the noise, relative to the weights: a squared error of 1 %, as with four bits
GROUP = 32
FEWEST_TOKENS, MOST_TOKENS = 128, 1024
WORK = 3e13  # most multiplications and additions of a measurement: some minutes
HEAD = "lm_head.weight"
SLAB = 1 << 20  # weights that get noise at a time
HEAD_ROWS = 1 << 13  # rows of the head that get noise at a time

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sensitivity:
    """The measured sensitivity of one tensor.

    Attributes:
        divergence: mean KL(float ‖ with noise), nats per token.
        error: relative squared error of the noise, weighted as in ``relative_error``.
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
    work: float = WORK,
) -> dict[str, Sensitivity]:
    """The sensitivity of every linear and of the embedding, by unfused name, stored blocks once.

    Args:
        source: the weights.
        windows: token ids; as many are used as ``work`` allows.
        statistics: of the inputs, to weight the noise's error.
        progress: ``progress(done, total)`` in blocks.
        most: most tokens used.
        work: most multiplications and additions.
    """
    import torch

    with torch.inference_mode():
        return _Measurement(source, windows, statistics, most, work).run(progress)


def partition(
    config: DecoderConfig, tokens: int, work: float = WORK
) -> tuple[tuple[tuple[str, ...], ...], int]:
    """Groups of a block's roles that share a variant, and the number of tokens used.

    The finest that ``work`` allows: each role alone; attention and MLP; the whole block.
    """
    roles = config.linear_roles
    attention = tuple(role for role in roles if role in ("q_proj", "k_proj", "v_proj", "o_proj"))
    mlp = tuple(role for role in roles if role not in attention)
    finest = tuple((role,) for role in roles)
    blocks = config.num_hidden_layers // config.block_repeat
    forward = 2 * config.num_parameters * config.block_repeat
    parts: tuple[tuple[str, ...], ...] = finest
    for parts in (finest, (attention, mlp), (roles,)):
        # A variant runs through half of the blocks on average; a shared role runs its block once.
        shared = len(roles) if len(parts) < len(roles) else 0
        passes = 1 + len(parts) * blocks / 2 + shared
        affordable = int(work / (forward * passes))
        if affordable >= min(FEWEST_TOKENS, tokens):
            break
    return parts, max(min(tokens, affordable), min(FEWEST_TOKENS, tokens))


def noise_like(weight: Float32, name: str, first_row: int = 0) -> Float32:
    """Gaussian noise for a weight or some of its rows, seeded by name and row."""
    digest = hashlib.sha256(f"{name} {first_row}".encode()).digest()
    random = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    rows, columns = weight.shape
    noise = np.empty((rows, columns), np.float32)
    starts = range(0, columns, GROUP)
    widths = np.minimum(GROUP, columns - np.array(starts))
    slab = max(1, SLAB // columns)
    for start in range(0, rows, slab):
        some = weight[start : start + slab]
        part = random.standard_normal(out=noise[start : start + slab], dtype=np.float32)
        squares = np.add.reduceat(some * some, starts, axis=1)
        scale = LEVEL * np.sqrt(squares / widths).astype(np.float32)
        part *= np.repeat(scale, widths, axis=1)
    return noise


class _Measurement:
    """One measurement; states are lists of ``[length, hidden]``, one tensor per window."""

    def __init__(
        self,
        source: Source,
        windows: Sequence[Sequence[int]],
        statistics: Statistics,
        most: int,
        work: float,
    ) -> None:
        from compress.decoder.decoder import Decoder

        self.source, self.config, self.statistics = source, source.config, statistics
        self.parts, tokens = partition(source.config, min(most, sum(map(len, windows))), work)
        count = max(1, tokens // len(windows[0]))
        self.windows = [list(window[:tokens]) for window in windows[:count]]
        self.decoder = Decoder(self.config, source.read)
        self.rope: RopeTables = self.decoder.rope(len(self.windows[0]))
        self.names = WeightMap(self.config)
        self.errors: dict[str, float] = {}
        self.shares: dict[tuple[str, ...], dict[str, float]] = {}
        self.variants: dict[tuple[str, ...], list[Tensor]] = {}

    def run(self, progress: Progress) -> dict[str, Sensitivity]:
        clean = self.embed()
        stored = range(0, self.config.num_hidden_layers, self.config.block_repeat)
        for done, index in enumerate(stored):
            clean = self.pass_block(index, clean)
            progress(done + 1, len(stored) + 1)
        divergences = self.judge(clean)
        progress(len(stored) + 1, len(stored) + 1)
        found = {}
        for names, divergence in divergences.items():
            shares = self.shares.get(names, {names[0]: 1.0})
            total = sum(shares.values()) or 1.0
            for name in names:
                part = divergence * shares[name] / total
                found[name] = Sensitivity(part, self.errors[name])
        return found

    def embed(self) -> list[Tensor]:
        """Clean states before the first block, and a variant with noise in the embedding."""
        import torch

        name = "embed_tokens.weight"
        clean = self.decoder.embed(self.windows)
        tokens, where = np.unique(np.concatenate(self.windows), return_inverse=True)
        flat = torch.cat(clean).numpy()
        rows = np.empty((len(tokens), flat.shape[1]), np.float32)
        rows[where] = flat
        noise = noise_like(rows, name)
        self.errors[name] = relative_error(rows, noise, None)
        noisy = torch.from_numpy(flat + noise[where])
        lengths = [len(window) for window in self.windows]
        self.variants[(name,)] = list(torch.split(noisy, lengths))
        return clean

    def pass_block(self, index: int, clean: list[Tensor]) -> list[Tensor]:
        """Run all states through a stored block; the variants of its tensors branch off here."""
        weights = {
            name.partition(".")[2].partition(".")[2]: self.source.read(name)
            for name in self.names.names()
            if split_name(name)[0] == index
        }

        def run(states: list[Tensor], noisy: Mapping[str, Float32]) -> list[Tensor]:
            return self.through(index, {**weights, **noisy}, states)

        after = run(clean, {})
        for label, states in self.variants.items():
            self.variants[label] = run(states, {})
        for roles in self.parts:
            names = tuple(f"blocks.{index}.{role}.weight" for role in roles)
            noisy: dict[str, Float32] = {}  # one group at a time: as large as its weights
            for role, name in zip(roles, names, strict=True):
                key = f"{role}.weight"
                noisy[key] = self.with_noise(name, weights[key])
                if len(roles) > 1:
                    alone = run(clean, {key: noisy[key]})
                    self.shares.setdefault(names, {})[name] = distance(alone, after)
            self.variants[names] = run(clean, noisy)
        return after

    def with_noise(self, name: str, weight: Float32) -> Float32:
        """A weight with noise; records the noise's error."""
        noise = noise_like(weight, name)
        self.note_error(name, weight, noise)
        noise += weight
        return noise

    def through(
        self, index: int, weights: Mapping[str, Float32], states: list[Tensor]
    ) -> list[Tensor]:
        """Run states through a block with these weights, with its repeats."""
        from compress.decoder.decoder import Block

        def read(name: str) -> Float32:
            return weights[name.partition(".")[2].partition(".")[2]]

        for repeat in range(self.config.block_repeat):
            block = Block(self.config, index + repeat, read)
            states = [block(hidden, self.rope) for hidden in states]
        return states

    def note_error(self, name: str, weight: Float32, noise: Float32) -> None:
        """Record the relative error of a tensor's noise, from some of its rows."""
        runs = sample_rows(*weight.shape)
        some, change = (np.concatenate([m[run] for run in runs]) for m in (weight, noise))
        self.errors[name] = relative_error(some, change, self.statistics.for_weight(name))

    def judge(self, clean: list[Tensor]) -> dict[tuple[str, ...], float]:
        """Mean divergence of every variant, including one with noise in the head."""
        import torch
        import torch.nn.functional as F

        from compress.decoder.layers import as_tensor, finished, normalize

        def vector(name: str, present: bool) -> Tensor | None:
            return as_tensor(self.source.read(name)) if present else None

        scale, c = as_tensor(self.source.read("norm.weight")), self.config
        shift = vector("norm.bias", c.has_bias("norm"))
        head, bias = self.source.read(HEAD), vector("lm_head.bias", c.has_bias("lm_head"))
        matrix = as_tensor(head)

        def final(hidden: Tensor) -> Tensor:
            return normalize(c, hidden, scale, shift, c.norm_eps)

        moved = self.through_noisy_head(head, torch.cat([final(hidden) for hidden in clean]))
        sums: dict[tuple[str, ...], float] = dict.fromkeys([*self.variants, (HEAD,)], 0.0)
        start = 0
        for window, hidden in enumerate(clean):
            logits = F.linear(final(hidden), matrix, bias)
            expected = F.log_softmax(finished(c, logits).double(), dim=-1)
            for label, states in self.variants.items():
                other = F.linear(final(states[window]), matrix, bias)
                sums[label] += divergence(expected, finished(c, other))
            noisy = logits + moved[start : start + len(hidden)]
            sums[(HEAD,)] += divergence(expected, finished(c, noisy))
            start += len(hidden)
        return {label: total / start for label, total in sums.items()}

    def through_noisy_head(self, head: Float32, hidden: Tensor) -> Tensor:
        """The change of the logits by noise in the head, ``[positions, vocabulary]``."""
        import torch

        added = torch.empty(hidden.shape[0], head.shape[0])
        for start in range(0, head.shape[0], HEAD_ROWS):
            rows = head[start : start + HEAD_ROWS]
            noise = noise_like(rows, HEAD, start)
            added[:, start : start + len(rows)] = hidden @ torch.from_numpy(noise).T
            if start == 0:
                self.note_error(HEAD, rows, noise)
        return added


def distance(states: list[Tensor], others: list[Tensor]) -> float:
    """Sum of squared differences."""
    pairs = zip(states, others, strict=True)
    return sum(float((a - b).double().square().sum()) for a, b in pairs)


def divergence(expected: Tensor, logits: Tensor) -> float:
    """Sum over positions of KL; ``expected``: float64 log-probabilities, ``logits``: float32."""
    import torch.nn.functional as F

    found = F.log_softmax(logits.double(), dim=-1)
    return float((expected.exp() * (expected - found)).sum())
