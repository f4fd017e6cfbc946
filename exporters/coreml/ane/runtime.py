"""Runs the packages of ``iphone-ane`` one after the other, as an app does: in Core ML on macOS, in
the MIL evaluator elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import ArtifactError, first_line
from compress.files import read_bounded
from exporters.coreml.card import CHUNKS
from exporters.coreml.runtime import (
    EVALUATOR,
    CoreMLRuntime,
    check_slots,
    core_ml_name,
    has_core_ml,
)

if TYPE_CHECKING:
    from exporters.coreml.evaluator import Evaluator

__all__ = ["Chunks", "Evaluators", "open_chunks", "read_chunks"]

CACHE = 1 << 30  # bytes of decoded weights of all packages together

Array = NDArray[Any]
Predict = Callable[[Mapping[str, Array]], Mapping[str, Array]]
Cache = list[tuple[Array, Array]]


def read_chunks(folder: Path) -> dict[str, Any]:
    """``chunks.json`` of a folder.

    Raises:
        ArtifactError: damaged, or of another version.
    """
    file = folder / CHUNKS
    try:
        document: dict[str, Any] = json.loads(read_bounded(file).decode("utf-8"))
        version, sizes = document["format_version"], document["functions"]
        kinds = [row["kind"] for row in document["packages"]]
        caches = [row[key] for row in document["packages"] if row["kind"] == "blocks"
                  for key in ("key_cache", "value_cache")]  # fmt: skip
        paths = [Path(row["file"]) for row in document["packages"]]
        int(document["context"]), int(document["vocab_size"]), float(document["mask_value"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{file} is damaged: {error!r}") from error
    if version != 1 or set(sizes) != {"prefill", "decode"} or len(kinds) < 3:
        raise ArtifactError(f"{file} is of another version than packlight reads")
    if kinds[0] != "embedding" or kinds[-1] != "head" or any(len(c) != 4 for c in caches):
        raise ArtifactError(f"{file} is damaged: packages {kinds}")
    if any(len(path.parts) != 1 or path.suffix != ".mlpackage" for path in paths):
        raise ArtifactError(f"{file} names files outside of its folder")
    return document


class Chunks:
    """The model of a folder of packages.

    Args:
        folder: with ``chunks.json``.
        open_function: opens a function of a package.
        dtype: of the caches.

    Attributes:
        context: slots of the caches.
        vocab_size: width of the logits.
        ids: of the longest call.
    """

    def __init__(
        self, folder: Path, open_function: Callable[[Path, str], Predict], dtype: Any = np.float16
    ) -> None:
        document = read_chunks(folder)
        self.context, self.vocab_size = int(document["context"]), int(document["vocab_size"])
        self._sizes: Mapping[str, int] = document["functions"]
        self.ids = max(self._sizes.values())
        self._hidden = float(document["mask_value"])
        self._packages: list[dict[str, Any]] = document["packages"]
        self._folder, self._open, self._dtype = folder, open_function, dtype
        self._opened: dict[tuple[str, str], Predict] = {}

    def make_state(self) -> Cache:
        """Empty caches: keys ``[blocks, context, 1, kv]`` and values ``[blocks, kv, 1, context]``
        of each package of blocks."""
        rows = [row for row in self._packages if row["kind"] == "blocks"]
        return [
            (np.zeros(row["key_cache"], self._dtype), np.zeros(row["value_cache"], self._dtype))
            for row in rows
        ]

    def predict(self, inputs: Mapping[str, Array], state: Cache) -> dict[str, Array]:
        """Run all packages for some ids, as ``runtime.CoreMLRuntime`` calls a package.

        Args:
            inputs: ``inputIds`` ``[1, n]``, and ``causalMask``, whose last size is where they end.
            state: of ``make_state``; the new keys and values are written into it.

        Returns:
            ``logits`` float32 ``[1, n, vocab]``.
        """
        ids = inputs["inputIds"][0]
        count, end = len(ids), inputs["causalMask"].shape[-1]
        name = min(
            (name for name, size in self._sizes.items() if size >= count),
            key=self._sizes.__getitem__,
        )
        size, begin = self._sizes[name], end - count
        padded = np.zeros((1, size), np.int32)
        padded[0, :count] = ids
        positions = np.minimum(np.arange(begin, begin + size), self.context - 1).astype(np.int32)
        first, *blocks, last = self._packages
        values = dict(self._run(first, name, {"ids": padded, "positions": positions}))
        for package, (keys, cached) in zip(blocks, state, strict=True):
            tables = {key: value for key, value in values.items() if key.startswith(("cos", "sin"))}
            given = {"hidden": values["hidden"], "key_cache": keys, "value_cache": cached, **tables}
            for mask, window in package["masks"].items():
                given[mask] = self.mask(begin, size, window)
            found = self._run(package, name, given)
            keys[:, begin:end] = found["new_keys"][:, :count]
            cached[..., begin:end] = found["new_values"][..., :count]
            values["hidden"] = found["hidden_next"]
        logits = self._run(last, name, {"hidden": values["hidden"]})
        pieces = [logits[f"logits_{n}"] for n in range(1, len(logits) + 1)]
        whole = np.concatenate(pieces, axis=1)[0, :, 0, :count]
        return {"logits": np.ascontiguousarray(whole.T)[None]}

    def mask(self, begin: int, size: int, window: int | None) -> Array:
        """The mask ``[1, context + size, 1, size]`` of ids from position ``begin`` on."""
        query = np.arange(begin, begin + size)
        slots = np.arange(self.context)
        key = np.concatenate((slots, query))[:, None]
        visible = key <= query
        visible[: self.context] &= (slots < begin)[:, None]  # later slots hold nothing, or old ids
        if window:
            visible &= query - key < window
        return np.where(visible, 0, self._hidden).astype(np.float16)[None, :, None]

    def _run(
        self, package: Mapping[str, Any], name: str, given: Mapping[str, Array]
    ) -> Mapping[str, Array]:
        key = (package["file"], name)
        if key not in self._opened:
            self._opened[key] = self._open(self._folder / package["file"], name)
        return self._opened[key](given)


class Evaluators:
    """The MIL evaluators of all functions, opened when they are called.

    Functions of a package share its weights.

    Args:
        fp16, threads: of ``Evaluator``.
        cache_bytes: of all of them together.
        count: number of packages.
    """

    def __init__(self, *, fp16: bool, threads: int, cache_bytes: int, count: int) -> None:
        self._options: dict[str, Any] = {"fp16": fp16, "cache_bytes": cache_bytes // count}
        self._threads = threads
        self._of: dict[Path, list[Evaluator]] = {}

    def open_function(self, package: Path, name: str) -> Predict:
        """A function of a package, for ``Chunks``."""
        from exporters.coreml.evaluator import Evaluator

        others = self._of.setdefault(package, [])
        like = others[0] if others else None
        made = Evaluator(package, function=name, threads=self._threads, like=like, **self._options)
        others.append(made)

        def predict(given: Mapping[str, Array]) -> Mapping[str, Array]:
            return made.predict({key: value for key, value in given.items() if key in made.inputs})

        return predict

    @property
    def threads(self) -> int:
        """Of every call."""
        return self._threads

    @threads.setter
    def threads(self, count: int) -> None:
        self._threads = count
        for made in (one for many in self._of.values() for one in many):
            made.threads = count


class ChunksRuntime(CoreMLRuntime):
    """The packages in the MIL evaluator, whose threads can be changed."""

    def __init__(self, chunks: Chunks, evaluators: Evaluators) -> None:
        sizes = (chunks.context, chunks.vocab_size, chunks.ids)
        super().__init__(EVALUATOR, chunks.predict, chunks.make_state, *sizes)
        self._evaluators = evaluators

    def use_threads(self, count: int) -> None:
        """Compute on so many threads from now on."""
        self._evaluators.threads = count


def open_chunks(path: Path, context: int, threads: int) -> CoreMLRuntime:
    """``runtime.open_runtime`` of a folder of packages.

    Raises:
        ArtifactError: damaged, or refused by Core ML.
        UsageError: more context than there are slots.
    """
    count = len(read_chunks(path)["packages"])
    evaluators = Evaluators(fp16=True, threads=threads, cache_bytes=CACHE, count=count)
    apple = has_core_ml()
    chunks = Chunks(path, core_ml_function if apple else evaluators.open_function)
    check_slots(path, chunks.context, context)
    if apple:
        sizes = (chunks.context, chunks.vocab_size, chunks.ids)
        return CoreMLRuntime(core_ml_name(), chunks.predict, chunks.make_state, *sizes)
    return ChunksRuntime(chunks, evaluators)


def core_ml_function(package: Path, name: str) -> Predict:
    """A function of a package on the Neural Engine; macOS only."""
    import coremltools

    units = coremltools.ComputeUnit.CPU_AND_NE
    try:
        model = coremltools.models.MLModel(str(package), compute_units=units, function_name=name)
    except Exception as error:  # an NSError is raised as a bare RuntimeError
        raise ArtifactError(f"Core ML refuses {package.name}: {first_line(error)}") from error
    predict: Predict = model.predict
    return predict
