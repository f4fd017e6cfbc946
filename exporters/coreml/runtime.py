"""Runs a written package as a ``Runtime``: Core ML on macOS, the MIL evaluator elsewhere.

Both are called as by an app: with the new token ids, a mask whose last dimension is the end of the
cache, and a state that the program updates.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress import __version__
from compress.errors import ArtifactError, RuntimeMissingError, UsageError, first_line
from compress.plan.shapes import Runtime, check_room
from exporters.coreml.card import CHUNKS
from exporters.coreml.mil import read_package

if TYPE_CHECKING:
    from exporters.coreml.evaluator import Evaluator

Float32 = NDArray[np.float32]
Predict = Callable[[Mapping[str, NDArray[Any]], Any], Mapping[str, NDArray[Any]]]

EVALUATOR = f"MIL evaluator (packlight {__version__})"
OLDEST_MACOS = 15  # states, 4-bit constants
# Ids per call of a prompt: bounds the scores, [heads, ids, positions].
BATCH = 512
TOGETHER = 1 << 29  # bytes of logits and caches of the windows in one call of the evaluator


def open_runtime(path: Path, *, context: int, threads: int = 0, batch: int = BATCH) -> Runtime:
    """Load a package; see ``compress.formats``.

    Raises:
        ArtifactError: not a package of packlight's, damaged, or refused by Core ML.
        RuntimeMissingError: coremltools is not installed.
        UsageError: more context than the package has.
    """
    if (path / CHUNKS).is_file():
        from exporters.coreml.ane.runtime import open_chunks

        return open_chunks(path, context, threads)
    function = read_package(path).function("main")
    if set(function.states) != {"keyCache", "valueCache"} or "inputIds" not in function.inputs:
        raise ArtifactError(f"{path.name} is not a decoder with keyCache and valueCache states")
    slots = function.states["keyCache"].shape[3] or 0
    check_slots(path, slots, context)
    vocab = function.outputs["logits"].shape[-1] or 0
    if has_core_ml():
        name, predict, make_state = _core_ml(path)
        return CoreMLRuntime(name, predict, make_state, slots, vocab, batch)
    from exporters.coreml.evaluator import Evaluator

    evaluator = Evaluator(path, fp16=True, threads=threads)  # rounds to float16 where Core ML does
    return EvaluatorRuntime(EVALUATOR, evaluator, slots, vocab, batch)


def check_slots(path: Path, slots: int, context: int) -> None:
    """Raise the error for more context than there are slots.

    Raises:
        UsageError: that.
    """
    if context > slots:
        raise UsageError(
            f"{path.name} has a KV cache of {slots} positions, {context} are asked for",
            hint=f"build with targets.coreml.context={context}",
        )


class CoreMLRuntime:
    """See ``compress.plan.shapes.Runtime``.

    Args:
        name: for the report.
        predict: ``predict(inputs, state) -> outputs``.
        make_state: an empty KV cache.
        slots: positions in the cache.
        vocab_size: width of the logits.
        batch: tokens per call of a prompt.
    """

    def __init__(
        self,
        name: str,
        predict: Predict,
        make_state: Callable[[], Any],
        slots: int,
        vocab_size: int,
        batch: int,
    ) -> None:
        self._name = name
        self._predict: Predict | None = predict
        self._make_state = make_state
        self._slots = slots
        self._vocab_size, self._batch = vocab_size, batch
        self.reset()

    @property
    def name(self) -> str:
        return self._name

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def reset(self) -> None:
        """Empty the KV cache."""
        self._state: Any = None
        self._length = 0

    def logits(self, tokens: Sequence[int]) -> Float32:
        """Logits at every position of a fresh sequence, float32 ``[len(tokens), vocab]``.

        Raises:
            UsageError: no tokens, or more than the cache holds.
        """
        self.reset()
        return np.concatenate(list(self._append(tokens)))

    def feed(self, tokens: Sequence[int]) -> Float32:
        """Append to the cached sequence; logits after the last token, float32 ``[vocab]``.

        Raises:
            UsageError: no tokens, or more than the cache has room for.
        """
        return np.array(list(self._append(tokens))[-1][-1])

    def extend(self, tokens: Sequence[int]) -> Float32:
        """``feed`` with the logits at every new position, float32 ``[len(tokens), vocab]``."""
        return np.concatenate(self._append(tokens))

    def rewind(self, length: int) -> int:
        """Keep the first ``length`` positions; the mask's shape hides the others."""
        self._length = min(self._length, length)
        return self._length

    def _append(self, tokens: Sequence[int]) -> list[Float32]:
        if self._predict is None:
            raise UsageError("the runtime is closed")
        check_room(self._length, len(tokens), self._slots)
        if self._state is None:
            self._state = self._make_state()
        pieces = []
        for start in range(0, len(tokens), self._batch):
            ids = np.asarray(tokens[start : start + self._batch], np.int32)[None]
            self._length += ids.shape[1]
            # The program adds the causal mask itself. The mask's shape gives the end of the ids.
            mask = np.zeros((1, 1, 1, self._length), np.float16)
            outputs = self._predict({"inputIds": ids, "causalMask": mask}, self._state)
            pieces.append(np.asarray(outputs["logits"], np.float32)[0])
        return pieces

    def close(self) -> None:
        """Free the model and its cache."""
        self._predict = None
        self._state = None


class EvaluatorRuntime(CoreMLRuntime):
    """A package in the MIL evaluator, whose threads can be changed, and which runs several windows
    at once."""

    def __init__(self, name: str, evaluator: Evaluator, *sizes: int) -> None:
        super().__init__(name, evaluator.predict, evaluator.make_state, *sizes)
        self._evaluator = evaluator

    def use_threads(self, count: int) -> None:
        """Compute on so many threads from now on."""
        self._evaluator.threads = count

    def at_once(self, length: int) -> int:
        """How many windows of ``length`` tokens ``logits_of`` should get: those whose logits and
        caches take at most ``TOGETHER`` bytes."""
        cached = sum(
            state.numel() * state.element_size() for state in self._evaluator.make_state().values()
        )
        each = length * (4 * self.vocab_size + cached // self._slots)
        return max(1, TOGETHER // each) if length <= self._batch else 1

    def logits_of(self, windows: Sequence[Sequence[int]]) -> list[Float32]:
        """``logits`` of several sequences, of at most ``at_once`` each; the state is not touched.

        Raises:
            UsageError: as ``logits``.
        """
        calls = []
        for tokens in windows:
            check_room(0, len(tokens), self._slots)
            mask = np.zeros((1, 1, 1, len(tokens)), np.float16)
            ids = np.asarray(tokens, np.int32)[None]
            inputs: Mapping[str, NDArray[Any]] = {"inputIds": ids, "causalMask": mask}
            calls.append((inputs, self._evaluator.make_state()))
        outputs = self._evaluator.predict_each(calls)
        return [np.asarray(found["logits"], np.float32)[0] for found in outputs]


def has_core_ml() -> bool:
    return sys.platform == "darwin" and int(platform.mac_ver()[0].split(".")[0]) >= OLDEST_MACOS


def _core_ml(path: Path) -> tuple[str, Predict, Callable[[], Any]]:
    """coremltools' binding of Core ML; macOS only."""
    try:
        import coremltools
    except ImportError as error:
        raise RuntimeMissingError(
            "running a Core ML package needs coremltools", hint="pip install coremltools"
        ) from error
    try:
        # As swift-transformers runs models of flexible shape.
        model = coremltools.models.MLModel(
            str(path), compute_units=coremltools.ComputeUnit.CPU_AND_GPU
        )
    except Exception as error:  # an NSError is raised as a bare RuntimeError
        raise ArtifactError(f"Core ML refuses {path.name}: {first_line(error)}") from error
    return core_ml_name(), model.predict, model.make_state


def core_ml_name() -> str:
    """Core ML's name and the version of macOS, for the report."""
    version = re.sub(r"(\d+\.\d+).*", r"\1", platform.mac_ver()[0])
    return f"Core ML (macOS {version})"
