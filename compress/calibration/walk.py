"""Runs windows of tokens through the model block by block and gathers statistics of every linear's
input (``compress.calibration.statistics``).

The walk holds one block's weights and the hidden states of all windows, in bfloat16; above
``states_limit`` the states are in a memory-mapped file. A block's input is the output of the
previous blocks of the float model (``walk``), or of the quantized model (``walk_beside``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.calibration.statistics import LayerStats, input_of
from compress.decoder.config import DecoderConfig, Float32, hessian_spans, split_name, stored_block
from compress.machine import available_memory

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Boundary", "held_back", "walk", "walk_beside"]

STATES_LIMIT = 1 << 29  # bytes of hidden states in memory: 512 MiB, or where that is less ...
STATES_SHARE = 1 / 8  # ... this share of the available memory
HELD_BACK = 16  # one of this many windows is left out of the Hessian, to measure solvers on ...
HELD_ROWS = 1024  # ... or of more, so that at most this many tokens are
TILE = 512  # rows of a Hessian's upper half that are added at once; the lower half is its mirror


class Accumulator:
    """Running sums over the rows of one input."""

    def __init__(self, columns: int, *, hessian: bool) -> None:
        import torch

        self.count = 0
        self.hessian_count = 0
        self.held_back: list[Tensor] = []
        self.sums = torch.zeros(columns, dtype=torch.float64)
        self.squares = torch.zeros(columns, dtype=torch.float64)
        self.spans = hessian_spans(columns) if hessian else []
        self.products = [torch.zeros(s.stop - s.start, s.stop - s.start) for s in self.spans]
        self.drifts: list[Tensor] = []

    def add(self, x: Tensor, *, hold_back: bool, beside: Tensor | None = None) -> None:
        """Add rows ``[n, columns]`` of the input; held-back rows are not added to the Hessian.

        ``beside``: the float model's input at these positions, for the drift.
        """
        import torch

        self.count += x.shape[0]
        self.sums += x.sum(0)
        self.squares += (x * x).sum(0)
        if hold_back and self.spans:
            self.held_back.append(x.clone())
            return
        self.hessian_count += x.shape[0]
        for span, product in zip(self.spans, self.products, strict=True):
            part = x[:, span]
            for tile in range(0, len(product), TILE):  # and all columns from the diagonal on
                rows = slice(tile, tile + TILE)
                product[rows, tile:].addmm_(part[:, rows].T, part[:, tile:])
        if beside is not None:
            self.drifts = self.drifts or [torch.zeros_like(product) for product in self.products]
            for span, drift in zip(self.spans, self.drifts, strict=True):
                drift.addmm_((beside[:, span] - x[:, span]).T, x[:, span])

    def finish(self) -> LayerStats:
        """The statistics of all added rows."""

        import torch

        def mean(total: Tensor, count: int) -> Float32:
            values: Float32 = (total / count).float().numpy()
            return values

        for product in self.products:
            for tile in range(0, len(product), TILE):
                rows, below = slice(tile, tile + TILE), slice(tile + TILE, None)
                product[below, rows] = product[rows, below].T
        return LayerStats(
            count=self.count,
            importance=mean(self.squares, self.count),
            mean=mean(self.sums, self.count),
            hessian=tuple(mean(p, self.hessian_count) for p in self.products) or None,
            held_back=torch.cat(self.held_back).float().numpy() if self.held_back else None,
            drift=tuple(mean(d, self.hessian_count) for d in self.drifts) or None,
        )


def spacing(windows: Sequence[Sequence[int]]) -> int:
    """Every how many windows one is left out of the Hessian."""
    return max(HELD_BACK, math.ceil(len(windows) * len(windows[0]) / HELD_ROWS))


def held_back(windows: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """The windows that are not in the Hessian; none where there are too few windows."""
    every = spacing(windows)
    return windows[every - 1 :: every]


class Boundary:
    """The hidden states before a block, saved so that an interrupted walk can continue: one file,
    ``block-3.bin``, replaced atomically. ``walk_beside`` saves two tensors, concatenated.

    Attributes:
        index: of the block; 0 where nothing is saved.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)
        saved = {int(path.stem.partition("-")[2]): path for path in folder.glob("block-*.bin")}
        self.index = max(saved, default=0)

    def load(self, *states: Tensor) -> None:
        """Fill ``states``, tensors of the saved shapes, in place."""
        import torch

        with self._file(self.index).open("rb") as stream:
            for tensor in states:
                stream.readinto(tensor.view(torch.uint8).numpy().data)

    def keep(self, index: int, *states: Tensor) -> None:
        """Save the states before block ``index`` and delete earlier ones."""
        import torch

        partial = self._folder / "partial"
        with partial.open("wb") as stream:
            for tensor in states:
                stream.write(tensor.view(torch.uint8).numpy().data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(self._file(index))
        if self.index:
            self._file(self.index).unlink()
        self.index = index

    def _file(self, index: int) -> Path:
        return self._folder / f"block-{index}.bin"


class Listener:
    """Accumulates statistics of the linears' inputs by input name.

    Args:
        config: the model.
        windows: token ids, all of the same length.
        hessian: also the means of ``x xᵀ``; it may change between inputs.
        roles: of the inputs to record (``calibration.statistics.input_roles``); all where empty.
    """

    def __init__(
        self,
        config: DecoderConfig,
        windows: Sequence[Sequence[int]],
        *,
        hessian: bool,
        roles: Collection[str] = (),
    ) -> None:
        self._config, self.hessian, self._roles = config, hessian, roles
        self.every = spacing(windows)
        self._sums: dict[str, Accumulator] = {}

    def key(self, name: str) -> str | None:
        """The input name of a linear if it is the first with that input, else None."""
        key, role = input_of(self._config, name), split_name(name)[1]
        if (
            key is None
            or not f".{key}".endswith(f".{role}")
            or (self._roles and role not in self._roles)
        ):
            return None
        return key

    def record(
        self, name: str, x: Tensor, position: int, floats: list[Tensor] | None = None
    ) -> None:
        """``OnInput`` callback: add a linear's input in the window at ``position``.

        Args:
            floats: inputs of the float model in this window, as stored by ``remember``; the
                first is removed.
        """
        key = self.key(name)
        if key is None:
            return
        if key not in self._sums:
            self._sums[key] = Accumulator(x.shape[1], hessian=self.hessian)
        beside = floats.pop(0) if floats is not None else None
        held = position % self.every == self.every - 1
        self._sums[key].add(x, hold_back=held, beside=beside)

    def remember(self, name: str, x: Tensor, seen: list[Tensor]) -> None:
        """``OnInput`` callback: append the input to ``seen``."""
        if self.key(name) is not None:
            seen.append(x)

    def finish(self) -> dict[str, LayerStats]:
        """Statistics of the inputs recorded since the last call."""
        done = {key: entry.finish() for key, entry in self._sums.items()}
        self._sums.clear()
        return done


def walk(
    config: DecoderConfig,
    read: Callable[[str], Float32],
    windows: Sequence[Sequence[int]],
    *,
    hessian: bool,
    exact: bool = False,
    roles: Collection[str] = (),
    work: Path | None = None,
    boundary: Boundary | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[dict[str, LayerStats]]:
    """Run all windows through the float model block by block and yield input statistics.

    Args:
        config: the model.
        read: weights by name, float32.
        windows: token ids, all of the same length.
        hessian: also the means of ``x xᵀ``.
        exact: hidden states in float32 instead of bfloat16.
        roles: see ``Listener``.
        work: folder for the file that holds states beyond ``states_limit``.
        boundary: saved states to continue from; the states before each block are saved there when
            the next statistics are requested, after those of earlier blocks were yielded.
        progress: ``progress(done, total)`` in windows times blocks.

    Yields the statistics of each stored block by input name, last those of ``lm_head``; only of
    blocks after the boundary. Those of experts come one expert at a time.
    """
    import torch

    from compress.decoder.decoder import Block, Decoder

    decoder = Decoder(config, read)
    rope = decoder.rope(len(windows[0]))
    dtype = torch.float32 if exact else torch.bfloat16
    first = boundary.index if boundary else 0
    if boundary and first:
        shape = (len(windows), len(windows[0]), config.hidden_size)
        states = empty_states(shape, dtype, work)
        boundary.load(states)
    else:
        states = hidden_states(decoder.embed(windows), dtype, work)
    listener = Listener(config, windows, hessian=hessian, roles=roles)
    total = len(windows) * (config.num_hidden_layers + 1)
    progress(first * len(windows), total)  # the texts are embedded
    for index in range(first, config.num_hidden_layers):
        if index > first and stored_block(config, index) == index:
            if config.experts is None:
                yield listener.finish()
            if boundary:
                boundary.keep(index, states)
        if config.experts is not None:
            from compress.calibration.experts import experts_walk

            def report(share: float, index: int = index) -> None:
                progress(int((index + share) * len(windows)), total)

            yield from experts_walk(
                config, index, read, states, rope, listener,
                hessian=hessian, work=work, progress=report,
            )  # fmt: skip
            continue
        block = Block(config, index, read)
        for position in range(len(windows)):
            record = partial(listener.record, position=position)
            states[position] = block(states[position].float(), rope, on_input=record)
            progress(index * len(windows) + position + 1, total)
        del block
    if first < config.num_hidden_layers:
        if config.experts is None:
            yield listener.finish()
        if boundary:
            boundary.keep(config.num_hidden_layers, states)
    normed = final_norm(config, read)
    for position in range(len(windows)):
        listener.record("lm_head.weight", normed(states[position].float()), position)
        progress(total - len(windows) + position + 1, total)
    yield listener.finish()


def walk_beside(
    config: DecoderConfig,
    read: Callable[[str], Float32],
    carry: Callable[[str], Float32],
    windows: Sequence[Sequence[int]],
    *,
    exact: bool = False,
    work: Path | None = None,
    boundary: Boundary | None = None,
) -> Iterator[dict[str, LayerStats]]:
    """Run all windows through the float model and a quantized model, block by block.

    Statistics are of the inputs of a float block that follows the quantized model's blocks;
    ``LayerStats.drift`` measures their difference from the float model's inputs.

    Args:
        config: of both.
        read: weights by name, float32.
        carry: the quantized model's weights by name, float32. Called for the embedding first, for
            a block once its statistics were yielded, for the final norm last.
        windows, exact, work, boundary: as ``walk``.

    Yields as ``walk``, with Hessians.
    """
    import torch

    from compress.decoder.decoder import Block, Decoder

    decoder = Decoder(config, read)
    rope = decoder.rope(len(windows[0]))
    dtype = torch.float32 if exact else torch.bfloat16
    first = boundary.index if boundary else 0
    if boundary and first:
        shape = (len(windows), len(windows[0]), config.hidden_size)
        floats = empty_states(shape, dtype, work, "floats.bin")
        states = empty_states(shape, dtype, work)
        boundary.load(floats, states)
    else:
        floats = hidden_states(decoder.embed(windows), dtype, work, "floats.bin")
        states = hidden_states(Decoder(config, carry).embed(windows), dtype, work)
    listener = Listener(config, windows, hessian=True)
    runs = range(config.block_repeat)  # of a stored block, in sequence
    for index in range(first, config.num_hidden_layers, config.block_repeat):
        block = Block(config, index, read)
        for position in range(len(windows)):
            seen: list[Tensor] = []
            remember = partial(listener.remember, seen=seen)
            record = partial(listener.record, position=position, floats=seen)
            hidden = states[position]
            for _ in runs:
                floats[position] = block(floats[position].float(), rope, on_input=remember)
                hidden = block(hidden.float(), rope, on_input=record).to(dtype)
        del block
        yield listener.finish()
        for run in runs:
            block = Block(config, index + run, carry)
            for position in range(len(windows)):
                states[position] = block(states[position].float(), rope)
            del block
        if boundary:
            boundary.keep(index + config.block_repeat, floats, states)
    normed, other = final_norm(config, read), final_norm(config, carry)
    for position in range(len(windows)):
        seen = [normed(floats[position].float())]
        listener.record("lm_head.weight", other(states[position].float()), position, seen)
    yield listener.finish()


def final_norm(config: DecoderConfig, read: Callable[[str], Float32]) -> Callable[[Tensor], Tensor]:
    """The norm before the head, as a function ``[n, hidden]`` → ``[n, hidden]``."""
    from compress.decoder.layers import as_tensor, normalize

    norm = as_tensor(read("norm.weight"))
    bias = as_tensor(read("norm.bias")) if config.has_bias("norm") else None
    return lambda hidden: normalize(config, hidden, norm, bias, config.norm_eps)


def states_limit() -> int:
    """Bytes of hidden states that stay in memory."""
    return min(STATES_LIMIT, int(available_memory() * STATES_SHARE))


def hidden_states(
    embedded: Sequence[Tensor], dtype: Any, work: Path | None, name: str = "states.bin"
) -> Tensor:
    """The states of all windows, ``[windows, length, hidden]``, in a mapped file when large."""
    states = empty_states((len(embedded), *embedded[0].shape), dtype, work, name)
    for position, hidden in enumerate(embedded):
        states[position] = hidden
    return states


def empty_states(
    shape: tuple[int, ...], dtype: Any, work: Path | None, name: str = "states.bin"
) -> Tensor:
    """An uninitialized tensor for hidden states, in a mapped file when large."""
    import torch

    size = math.prod(shape)
    if work is None or size * dtype.itemsize <= states_limit():
        return torch.empty(shape, dtype=dtype)
    return torch.from_file(str(work / name), shared=True, size=size, dtype=dtype).view(shape)
