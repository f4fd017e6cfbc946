"""Runs a written folder in onnxruntime, on the CPU, with a KV cache that is never copied.

Keys and values are in one buffer per layer, as long as the context, bound both as past and as
present: GroupQueryAttention then appends in place. Pages of the buffers beyond the last position
are not touched and take no memory.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import ArtifactError, RuntimeMissingError, first_line
from compress.machine import available_cpus
from compress.plan.shapes import check_room
from exporters.onnx.inspection import find_graph
from exporters.onnx.planning import CONTEXT_KEY, SWITCH_KEY

Float32 = NDArray[np.float32]

# Positions per run of a long prompt: bounds onnxruntime's copy of the logits.
BATCH = 512


class OnnxRuntime:
    """See ``compress.plan.shapes.Runtime``."""

    def __init__(self, path: Path, *, context: int, threads: int = 0, batch: int = BATCH) -> None:
        """Load the folder.

        Args:
            path: the folder with config.json, or the .onnx file.
            context: positions to make room for, at most the graph's.
            threads: 0 for the CPUs that the process may use.
            batch: tokens per run; bounds the memory of scores.

        Raises:
            ArtifactError: unreadable, or refused by onnxruntime.
            RuntimeMissingError: onnxruntime is not installed.
        """
        # Otherwise it stores a device id and a queue of events in the home folder, even on Linux.
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        try:
            import onnxruntime
        except ImportError as error:
            raise RuntimeMissingError(
                "onnxruntime is not installed", hint="pip install onnxruntime"
            ) from error
        graph = find_graph(path)
        self._graph, self._threads = graph, threads or available_cpus()
        session = self._session = self._open()
        self._version: str = onnxruntime.__version__
        self._vocab: int = session.get_outputs()[0].shape[-1]
        metadata = session.get_modelmeta().custom_metadata_map
        held = metadata.get(CONTEXT_KEY)
        self._context = min(context, int(held)) if held else context
        self._switch = int(metadata.get(SWITCH_KEY) or 0)  # of longrope, see ``_grown``
        self._fed: list[int] = []  # the tokens of the cache, where there is a switch
        self._ahead = 0  # positions that ``_grown`` adds
        self._caches: dict[str, Float32] = {}
        self._states: dict[str, Float32] = {}  # which do not grow
        for value in session.get_inputs():
            if value.name.startswith("past_key_values."):
                _, heads, _, size = value.shape
                self._caches[value.name] = untouched((1, heads, self._context, size))
            elif value.name.startswith("past_"):
                self._states[value.name] = np.zeros((1, *value.shape[1:]), np.float32)
        self._length, self._batch = 0, batch

    def _open(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 4  # its errors are raised as exceptions
        try:
            return onnxruntime.InferenceSession(
                str(self._graph), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # pybind11 classes without a common base
            raise ArtifactError(
                f"onnxruntime refuses {self._graph.name}: {first_line(error)}",
                hint="an interrupted copy? the .onnx_data file must lie beside the .onnx file",
            ) from error

    def use_threads(self, count: int) -> None:
        """Compute on so many threads from now on; loads the graph again, whose session has them."""
        if count != self._threads:
            self._threads, self._session = count, None
            self._session = self._open()

    @property
    def name(self) -> str:
        return f"onnxruntime {self._version}"

    @property
    def vocab_size(self) -> int:
        return self._vocab

    def logits(self, tokens: Sequence[int]) -> Float32:
        self.reset()
        check_room(0, len(tokens), self._context)
        tokens = self._grown(tokens) if self._switch else tokens
        result = np.empty((len(tokens), self._vocab), np.float32)
        for start in range(0, len(tokens), self._batch):
            chunk = tokens[start : start + self._batch]
            result[start : start + len(chunk)] = self._run(chunk)
        self.reset()
        return result

    def reset(self) -> None:
        # The buffers beyond the length are never read.
        self._length = 0
        for state in self._states.values():
            state[:] = 0

    def feed(self, tokens: Sequence[int]) -> Float32:
        check_room(self._length, len(tokens), self._context)
        tokens = self._grown(tokens) if self._switch else tokens
        last: Float32
        for start in range(0, len(tokens), self._batch):
            last = self._run(tokens[start : start + self._batch])[-1]
        return last.copy()

    def extend(self, tokens: Sequence[int]) -> Float32:
        check_room(self._length, len(tokens), self._context)
        count, tokens = len(tokens), self._grown(tokens) if self._switch else tokens
        starts = range(0, len(tokens), self._batch)
        rows = [self._run(tokens[start : start + self._batch]) for start in starts]
        return np.concatenate(rows)[-count:]

    def rewind(self, length: int) -> int:
        # The buffers beyond the length are never read. Across the switch their keys are useless.
        across = length <= self._switch < self._length and self._switch
        if across or (self._states and length < self._length):  # earlier states are gone
            self.reset()
        self._length = min(self._length, length)
        return self._length

    def close(self) -> None:
        self._session = None
        self._caches.clear()
        self._states.clear()

    def _grown(self, tokens: Sequence[int]) -> Sequence[int]:
        """The tokens to run next: where a text grows beyond the switch, all of it from its start.

        The graph takes the long factors from the length so far; the first batches of a longer text
        get them by positions that are ahead of those rows of its tables.
        """
        end = self._length + len(tokens)
        self._fed = [*self._fed[: self._length], *tokens]
        if self._length <= self._switch < end:
            self._length, tokens = 0, self._fed
        self._ahead = self._switch if end > self._switch else 0
        return tokens

    def _run(self, tokens: Sequence[int]) -> Float32:
        """Append to the cache; logits ``[len(tokens), vocab]``."""
        end = self._length + len(tokens)
        first = self._length + (self._ahead if end <= self._switch else 0)
        positions = np.arange(first, first + len(tokens), dtype=np.int64)
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, end), np.int64))
        binding.bind_cpu_input("position_ids", positions[None])
        binding.bind_output("logits", "cpu")
        for name, cache in self._caches.items():
            place = ("cpu", 0, np.float32, cache.shape, cache.ctypes.data)
            binding.bind_input(name, *place)
            binding.bind_output(name.replace("past_key_values", "present"), *place)
        for name, state in self._states.items():
            binding.bind_cpu_input(name, state)
            binding.bind_output(name.replace("past", "present"), "cpu")
        self._session.run_with_iobinding(binding)
        self._length = end
        outputs = binding.get_outputs()
        for name, value in zip(
            self._states, outputs[len(outputs) - len(self._states) :], strict=True
        ):
            self._states[name] = value.numpy()
        logits: Float32 = outputs[0].numpy()[0]
        return logits


def untouched(shape: tuple[int, ...]) -> Float32:
    """Zeros in pages of 4 KB: with huge pages, which numpy requests, the first position of every
    head would allocate the memory of all positions."""
    pages = mmap.mmap(-1, math.prod(shape) * 4)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, np.float32).reshape(shape)


open_runtime = OnnxRuntime
