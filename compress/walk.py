"""The walk: windows of tokens go through one block after the other, and every linear's input leaves
its statistics behind (``compress.statistics``).

The walk holds one block's weights and the hidden states of all windows, in bfloat16; above
``STATES_LIMIT`` the states live in a memory-mapped file. Blocks see what
the previous blocks produce: those of the float model, or what the caller makes of them (``carry``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.arch import DecoderConfig, Float32, split_name
from compress.statistics import LayerStats, input_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["walk"]

STATES_LIMIT = 1 << 29  # bytes of hidden states in memory: 512 MiB
WIDEST_HESSIAN = 8192  # columns; wider inputs are split into diagonal blocks (268 MB each)
HELD_BACK = 16  # of so many windows one is kept out of the Hessian, to measure solvers on ...
HELD_ROWS = 1024  # ... or of more, where that would be more tokens than these


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

    def add(self, x: Tensor, *, hold_back: bool) -> None:
        """Rows ``[n, columns]`` of the input; those held back are not for the Hessian."""
        self.count += x.shape[0]
        self.sums += x.sum(0)
        self.squares += (x * x).sum(0)
        if hold_back and self.spans:
            self.held_back.append(x.clone())
            return
        self.hessian_count += x.shape[0]
        for span, product in zip(self.spans, self.products, strict=True):
            part = x[:, span]
            product.addmm_(part.T, part)

    def finish(self) -> LayerStats:
        """The means."""

        import torch

        def mean(total: Tensor, count: int) -> Float32:
            values: Float32 = (total / count).float().numpy()
            return values

        return LayerStats(
            count=self.count,
            importance=mean(self.squares, self.count),
            mean=mean(self.sums, self.count),
            hessian=tuple(mean(p, self.hessian_count) for p in self.products) or None,
            held_back=torch.cat(self.held_back).float().numpy() if self.held_back else None,
        )


def hessian_spans(columns: int) -> list[slice]:
    """Diagonal blocks of a Hessian: equal, of whole 256s, none wider than ``WIDEST_HESSIAN``."""
    count = math.ceil(columns / WIDEST_HESSIAN)
    width = columns if count == 1 else 256 * math.ceil(columns / count / 256)
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]


def walk(
    config: DecoderConfig,
    read: Callable[[str], Float32],
    windows: Sequence[Sequence[int]],
    *,
    hessian: bool,
    carry: Callable[[str], Float32] | None = None,
    exact: bool = False,
    roles: Collection[str] = (),
    work: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[dict[str, LayerStats]]:
    """All windows through one block after the other.

    Args:
        config: the model.
        read: weights by name, float32.
        windows: token ids, all of the same length.
        hessian: also the means of ``x xᵀ``.
        carry: the weights that carry the states on, where they are not those of ``read``. The
            embedding's come first; a block's are asked for once its statistics were given out;
            the final norm's last.
        exact: hidden states in float32 instead of bfloat16.
        roles: of the inputs to listen to (``compress.statistics.input_roles``); all where empty.
        work: folder for the file that holds states beyond ``STATES_LIMIT``.
        progress: ``progress(done, total)`` in windows times blocks.

    Yields the statistics of each stored block by input name, and at last those of ``lm_head``.
    """
    import torch

    from compress.decoder import Block, Decoder, as_tensor, normalize

    read_on = carry or read
    decoder = Decoder(config, read_on)
    rope = decoder.rope(len(windows[0]))
    dtype = torch.float32 if exact else torch.bfloat16
    states = hidden_states(decoder.embed(windows), dtype, work)
    sums: dict[str, Accumulator] = {}

    every = max(HELD_BACK, math.ceil(len(windows) * len(windows[0]) / HELD_ROWS))

    def listen(name: str, x: Tensor, position: int) -> None:
        key = input_of(config, name)
        # Linears of one input come with the same x; the first speaks for all.
        role = split_name(name)[1]
        if key is None or key.rpartition(".")[2] != role or (roles and role not in roles):
            return
        if key not in sums:
            sums[key] = Accumulator(x.shape[1], hessian=hessian)
        sums[key].add(x, hold_back=position % every == every - 1)

    def finish() -> dict[str, LayerStats]:
        done = {key: entry.finish() for key, entry in sums.items()}
        sums.clear()
        return done

    runs = range(config.block_repeat)  # of a stored block, one after the other
    total = len(windows) * (config.num_hidden_layers + 1)
    for index in range(0, config.num_hidden_layers, config.block_repeat):
        block = Block(config, index, read)
        for position in range(len(windows)):
            heard = partial(listen, position=position)
            hidden = states[position]
            for _ in runs:
                hidden = block(hidden.float(), rope, on_input=heard).to(dtype)
            if carry is None:
                states[position] = hidden
            progress((index + len(runs) - 1) * len(windows) + position + 1, total)
        del block
        yield finish()
        for run in runs if carry is not None else ():
            block = Block(config, index + run, read_on)
            for position in range(len(windows)):
                states[position] = block(states[position].float(), rope)
            del block
    norm = as_tensor(read_on("norm.weight"))
    bias = as_tensor(read_on("norm.bias")) if config.has_bias("norm") else None
    for position in range(len(windows)):
        final = normalize(config, states[position].float(), norm, bias)
        listen("lm_head.weight", final, position)
        progress(total - len(windows) + position + 1, total)
    yield finish()


def hidden_states(embedded: Sequence[Tensor], dtype: Any, work: Path | None) -> Tensor:
    """The states of all windows, ``[windows, length, hidden]``, mapped to a file when large."""
    import torch

    shape = (len(embedded), *embedded[0].shape)
    size = math.prod(shape)
    if work is not None and size * dtype.itemsize > STATES_LIMIT:
        path = str(work / "states.bin")
        states = torch.from_file(path, shared=True, size=size, dtype=dtype).view(shape)
    else:
        states = torch.empty(shape, dtype=dtype)
    for position, hidden in enumerate(embedded):
        states[position] = hidden
    return states
