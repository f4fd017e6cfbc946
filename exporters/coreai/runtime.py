"""Runs a written program in Apple's CPU runtime, as its float32 twin (see ``twin.py``).

It is called as by Apple's runner: with the new token ids, ``0 … n - 1`` for all ids so far, and two
caches, which begin small and are doubled when they are full.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import ArtifactError, UsageError
from compress.files import scratch_folder
from compress.machine import available_memory
from compress.plan.shapes import check_room
from exporters.coreai.bytecode import read_blobs
from exporters.coreai.graph import STATES
from exporters.coreai.inspection import Bundle
from exporters.coreai.library import COREAI, CoreAI, Loaded
from exporters.coreai.magnitudes import LARGEST, largest_by_label, measure, remark
from exporters.coreai.twin import WEIGHTS, decoded_bytes, main_of, split, widen

Float32 = NDArray[np.float32]

# Ids per call of a prompt. Each call decodes every weight, so a window of text is one call.
BATCH = 512
SLOTS = 256  # of the caches at first, as in Apple's runner
# Bytes of decoded weights that are kept at most, instead of decoded in each call; and of memory.
KEEP, KEEP_SHARE = 3 << 30, 1 / 3


def open_runtime(
    path: Path, *, context: int, threads: int = 0, batch: int = BATCH, slots: int = SLOTS
) -> CoreAIRuntime:
    """Load a bundle; see ``compress.formats``. Apple's runtime chooses its threads itself.

    Raises:
        ArtifactError: not a bundle of packlight's, or damaged.
        RuntimeMissingError: coreai-core is not installed.
        UsageError: more context than the bundle has.
    """
    bundle = Bundle.open(path)
    if context > bundle.context:
        raise UsageError(
            f"{path.name} holds {bundle.context} positions, {context} are asked for",
            hint=f"build with targets.coreai.context={context}",
        )
    return CoreAIRuntime(bundle, batch, slots)


class CoreAIRuntime:
    """See ``compress.plan.shapes.Runtime``.

    Args:
        bundle: the files.
        batch: tokens per call of a prompt.
        slots: of the caches at first.

    Attributes:
        costly: whether each call decodes weights by the gigabyte, half a CPU minute for a billion.
    """

    def __init__(self, bundle: Bundle, batch: int, slots: int) -> None:
        self._batch, self._first, self._room = batch, slots, bundle.context
        self._vocab_size = bundle.vocab_size
        library, self._closing = CoreAI(), ExitStack()
        try:
            folder = self._closing.enter_context(scratch_folder()) / "twin.aimodelx"
            folder.mkdir()
            with library.context():
                module = library.read(bundle.program)
                self._cache = cache_shape(library, module)
                self._labels = measure(library, main_of(module))
                widen(library, module, read_blobs(bundle.program))
                most = min(KEEP, available_memory() * KEEP_SHARE)
                apart = decoded_bytes(library, module) <= most
                if apart:
                    split(library, module)
                library.lower(module, folder)
                del module
            self._program: Loaded | None = Loaded(folder)
            self._weights = self._program.run(WEIGHTS, {}, {}) if apart else {}
            self.costly = not apart
        except BaseException:
            self._closing.close()
            raise
        self._largest = np.zeros(len(self._labels), np.float32)
        self.reset()

    @property
    def magnitudes(self) -> dict[str, float]:
        """The largest magnitudes so far, by what they are of."""
        return largest_by_label(self._labels, self._largest)

    @property
    def remarks(self) -> list[str]:
        """What the values so far mean for a device's float16."""
        return [remark(self.magnitudes)]

    @property
    def name(self) -> str:
        return f"Core AI {COREAI}, float32 twin in Apple's CPU runtime"

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def reset(self) -> None:
        """Empty the KV cache."""
        self._state: dict[str, Any] = {}
        self._length = self._slots = 0

    def logits(self, tokens: Sequence[int]) -> Float32:
        """Logits at every position of a fresh sequence, float32 ``[len(tokens), vocab]``.

        Raises:
            UsageError: no tokens, or more than the program has positions.
        """
        self.reset()
        return np.concatenate(self._append(tokens))

    def feed(self, tokens: Sequence[int]) -> Float32:
        """Append to the cached sequence; logits after the last token, float32 ``[vocab]``.

        Raises:
            UsageError: no tokens, or more than there is room for.
        """
        return np.array(self._append(tokens)[-1][-1])

    def extend(self, tokens: Sequence[int]) -> Float32:
        """``feed`` with the logits at every new position, float32 ``[len(tokens), vocab]``."""
        return np.concatenate(self._append(tokens))

    def rewind(self, length: int) -> int:
        """Keep the first ``length`` positions; those beyond are hidden by the next call's end."""
        self._length = min(self._length, length)
        return self._length

    def close(self) -> None:
        """Free the program and its caches."""
        if self._program is not None:
            self.reset()
            self._weights = {}
            self._program.close()
            self._program = None
            self._closing.close()

    def _append(self, tokens: Sequence[int]) -> list[Float32]:
        if self._program is None:
            raise UsageError("the runtime is closed")
        check_room(self._length, len(tokens), self._room)
        pieces = []
        for start in range(0, len(tokens), self._batch):
            ids = np.asarray(tokens[start : start + self._batch], np.int32)[None]
            self._length += ids.shape[1]
            self._grow()
            positions = np.arange(self._length, dtype=np.int32)[None]
            inputs = {"input_ids": ids, "position_ids": positions}
            arrays = {name: self._program.array(values) for name, values in inputs.items()}
            outputs = self._program.run("main", {**arrays, **self._weights}, self._state)
            self._largest = np.maximum(self._largest, outputs[LARGEST].numpy())
            pieces.append(np.array(outputs["logits"].numpy(), np.float32)[0])
        return pieces

    def _grow(self) -> None:
        """Make room in the caches for the positions so far: double them, as Apple's runner does."""
        assert self._program is not None
        slots = self._slots or min(self._first, self._room)
        while slots < self._length:
            slots = min(2 * slots, self._room)
        if slots == self._slots:
            return
        layers, one, heads, _, size = self._cache
        for name in STATES:
            larger = np.zeros((layers, one, heads, slots, size), np.float32)
            if name in self._state:
                larger[:, :, :, : self._slots] = self._state[name].numpy()
            self._state[name] = self._program.array(larger)
        self._slots = slots


def cache_shape(library: CoreAI, module: Any) -> list[int]:
    """The shape of a cache, with a negative number of slots.

    Raises:
        ArtifactError: the program is not a decoder of packlight's.
    """
    handle, ranked = library.ops.HandleType, library.ir.RankedTensorType
    for child in module.body.operations:
        if child.operation.name == "coreai.graph":
            for argument in child.operation.regions[0].blocks[0].arguments:
                if handle.isinstance(argument.type):
                    return list(ranked(handle(argument.type).inner_type).shape)
    raise ArtifactError("the program is not a decoder with keyCache and valueCache states")
