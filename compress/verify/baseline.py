"""The baseline: the float model's log-probabilities of every scored position, on disk.

One file of fixed-point numbers, written window by window and memory-mapped for reading, so that
neither the writer nor a reader holds more than a few rows.

Fixed point: ``code = round(-log p * 1600)`` in uint16, two bytes per vocabulary entry. The step of
1/1600 nat is the same everywhere, so the noise that rounding adds to a KL divergence has a bound:
``step² / 24 = 1.6e-8`` nats (half the variance of a uniform rounding error: the second-order term
of KL in the log-probabilities), below the 1e-4 of a runtime's own noise by four orders. float16
log-probabilities take as many bytes and are 150 times worse (their step from -8 to -16 is 2⁻⁷).
The first-order term has random signs: about 1e-4 at worst at one position, nothing in the mean over
thousands (tested). The largest code stands for ``p < 1.7e-18`` and is read as exactly zero.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from compress.errors import ArtifactError, CheckpointError, DiskFullError, is_disk_full
from compress.files import file_lock
from compress.verify.resources import Speed

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

STEPS_PER_NAT = 1600
FILES = ("baseline.npz", "logprobs.u16")
ZERO = 65535  # the code of "never": p < exp(-65534.5 / 1600) = 1.63e-18
CHUNK = 1 << 18  # elements of a vocabulary-wide float32 array worked on at once: 1 MiB, in cache
# p of every code.
PROBABILITIES = np.exp(np.arange(ZERO + 1) * (-1.0 / STEPS_PER_NAT)).astype(np.float32)
PROBABILITIES[ZERO] = 0.0


class BaselineStore:
    """The float model's log-probabilities over the windows that every artifact is scored on.

    A window of ``n`` tokens has ``n - 1`` scored positions: position ``i`` predicts token
    ``i + 1``.

    Attributes:
        folder: where the two files are.
        windows: int32 arrays of tokens, in the order in which they are scored.
        ready: the number of windows whose log-probabilities are there.
        vocab_size: columns of the logits.
        nll: float64 ``[scored]``, -log p of the token that follows, from the float32 logits.
        top: int32 ``[scored]``, the most likely token, from the float32 logits.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder written by ``write``.

        Raises:
            ArtifactError: missing, incomplete or damaged.
        """
        self.folder = folder
        try:
            with np.load(folder / "baseline.npz") as saved:
                tokens, lengths = saved["tokens"], saved["lengths"]
                self.nll: Float64 = saved["nll"]
                self.top: NDArray[np.int32] = saved["top"]
                self.vocab_size = int(saved["vocab_size"])
            self._starts = np.concatenate([[0], np.cumsum(lengths - 1)])
            self.ready = int(np.searchsorted(self._starts, len(self.nll)))
            self._codes: NDArray[np.uint16] = np.empty((0, self.vocab_size), np.uint16)
            if self.ready:
                shape = (len(self.nll), self.vocab_size)
                self._codes = np.memmap(folder / "logprobs.u16", np.uint16, "r", shape=shape)
        except (OSError, KeyError, ValueError) as error:
            raise ArtifactError(
                f"{folder}: the float baseline is missing or damaged: {error}",
                hint="build again; it is computed from the checkpoint",
            ) from error
        self.windows: list[NDArray[np.int32]] = np.split(tokens, np.cumsum(lengths)[:-1])

    @classmethod
    def begin(cls, folder: Path, windows: Sequence[Sequence[int]]) -> BaselineStore:
        """Store windows whose logits will be added (``extend``).

        Args:
            folder: created if missing.
            windows: token ids, each window at least two long.
        """
        tokens = [np.asarray(window, np.int32) for window in windows]
        if not tokens or min(map(len, tokens)) < 2:
            raise ValueError("a baseline needs windows of two tokens or more")
        folder.mkdir(parents=True, exist_ok=True)
        with disk_full(folder):
            (folder / "logprobs.u16").unlink(missing_ok=True)  # it may have other links
            (folder / "logprobs.u16").touch()
            save(folder, tokens, np.empty(0), np.empty(0, np.int32), 0)
        return cls(folder)

    @classmethod
    def write(
        cls,
        folder: Path,
        windows: Sequence[Sequence[int]],
        logits: Iterable[Float32],
        progress: Callable[[int, int], None] | None = None,
    ) -> BaselineStore:
        """Store windows and the logits of all of them; see ``begin`` and ``extend``."""
        store = cls.begin(folder, windows)
        (folder / "baseline.npz").unlink()  # its presence means: complete
        return store.extend(logits, len(windows), progress)

    def extend(
        self,
        logits: Iterable[Float32],
        ready: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> BaselineStore:
        """Add the logits of a float model, window by window.

        Args:
            logits: one float32 ``[len(window), vocab]`` for each window from ``self.ready`` on.
            ready: the number of windows that will be there.
            progress: ``progress(done, total)`` in windows.

        Returns:
            The store with them; this one stays as it is.

        Raises:
            CheckpointError: the float model's logits are not finite.
            DiskFullError: no room.
        """
        folder, vocab = self.folder, self.vocab_size
        nll, top = [self.nll], [self.top]
        added = self.windows[self.ready : ready]
        with disk_full(folder):
            own_copy(folder / "logprobs.u16")
            # Plain writes, not a writable memmap: a full disk then is an OSError, not a SIGBUS.
            with open(folder / "logprobs.u16", "r+b") as file:
                file.seek(self.nbytes)  # what an interrupted call wrote behind is overwritten
                for done, (window, rows) in enumerate(zip(added, logits, strict=True), start=1):
                    vocab = rows.shape[1]
                    for part in chunks(len(window) - 1, vocab):
                        codes, found = encode(rows[part], window[1:][part])
                        file.write(codes.data)
                        nll.append(found)
                        top.append(rows[part].argmax(axis=1).astype(np.int32))
                    if progress:
                        progress(done, len(added))
            save(folder, self.windows, np.concatenate(nll), np.concatenate(top), vocab)
        return BaselineStore(folder)

    @property
    def nbytes(self) -> int:
        """Bytes on disk of the log-probabilities."""
        return int(self._codes.nbytes)

    def scored(self, window: int) -> slice:
        """The slice of a window's positions in ``nll`` and ``top``."""
        return slice(int(self._starts[window]), int(self._starts[window + 1]))

    def probs(self, window: int, rows: slice) -> tuple[Float32, Float32]:
        """Probabilities of some scored positions of a window, and their logarithms, float32
        ``[rows, vocab]``, up to a factor near one for each row: p does not quite sum to one. Where
        the store has "never", p is 0 and log p is finite, so that their product is 0.
        """
        start = int(self._starts[window])
        codes = self._codes[start + rows.start : start + rows.stop]
        # Divided: 1/1600 as a float32 has an error of its own, the same in every sum.
        logarithms = np.divide(codes, np.float32(-STEPS_PER_NAT), dtype=np.float32)
        return PROBABILITIES.take(codes), logarithms


@contextmanager
def disk_full(folder: Path) -> Iterator[None]:
    """Raise ``DiskFullError`` where the disk of a baseline's folder runs full."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise DiskFullError(
            f"the disk ran full in {folder.parent}, where the float model's answers are stored",
            hint="free some space, or score less text (verify.windows)",
        ) from error


def encode(logits: Float32, targets: NDArray[np.int32]) -> tuple[NDArray[np.uint16], Float64]:
    """The codes of some positions, uint16 ``[rows, vocab]``, and -log p of the tokens that follow.

    Raises:
        CheckpointError: logits that are not finite.
    """
    shifted, total = exponentials(logits)
    if not np.isfinite(total).all():
        raise CheckpointError("the float model's logits are not finite")
    logs = np.log(total)
    nll = logs - shifted[np.arange(len(targets)), targets].astype(np.float64)
    shifted -= logs[:, None].astype(np.float32)
    shifted *= -STEPS_PER_NAT
    np.minimum(np.rint(shifted, out=shifted), ZERO, out=shifted)
    return shifted.astype(np.uint16), nll


def exponentials(logits: Float32) -> tuple[Float32, Float64]:
    """Logits less their row's largest, float32 ``[rows, vocab]``, and the sums of their
    exponentials, float64 ``[rows]``, NaN where a row holds NaN or +Inf.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        shifted = logits - logits.max(axis=1, keepdims=True)
        return shifted, np.exp(shifted).sum(axis=1, dtype=np.float64)


def save(
    folder: Path,
    windows: Sequence[NDArray[np.int32]],
    nll: Float64,
    top: NDArray[np.int32],
    vocab: int,
) -> None:
    """Write ``baseline.npz`` atomically."""
    partial = folder / "baseline.partial.npz"
    np.savez(
        partial,
        tokens=np.concatenate(windows),
        lengths=np.array([len(window) for window in windows]),
        nll=nll,
        top=top,
        vocab_size=np.array(vocab),
    )
    os.replace(partial, folder / "baseline.npz")


def own_copy(path: Path) -> None:
    """Replace a file that has other hard links by a copy: what is added must not be in those."""
    if path.stat().st_nlink > 1:
        partial = path.with_suffix(".partial")
        shutil.copyfile(path, partial)
        os.replace(partial, path)


def log_softmax(logits: NDArray[np.floating]) -> Float64:
    """float64 log-probabilities ``[rows, vocab]``; NaN where a row holds NaN or +Inf."""
    with np.errstate(invalid="ignore"):
        shifted = logits.astype(np.float64)
        shifted -= shifted.max(axis=1, keepdims=True)
        shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def chunks(rows: int, vocab: int) -> list[slice]:
    """Slices of rows that keep a ``[rows, vocab]`` float32 array near 1 MiB."""
    step = max(1, CHUNK // vocab)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass(frozen=True)
class BaselineCache:
    """A cached baseline of one float model and one set of windows: the files of a
    ``BaselineStore``, and ``facts.json`` with the model's speed.

    A build that loads it hard-links the files, so that neither can delete the other's.

    Attributes:
        folder: of all cached baselines.
        key: hash of the model, the windows and the runtime.
        limit: bytes of all entries; ``save`` removes those that were used longest ago; 0: none.
    """

    folder: Path
    key: str
    limit: int = 0

    @classmethod
    def of(
        cls, folder: Path, fingerprint: str, windows: Sequence[Sequence[int]], runtime: str
    ) -> BaselineCache:
        """The cache entry of a model (``Source.fingerprint``), windows and the decoder's name."""
        facts = json.dumps([fingerprint, [list(map(int, window)) for window in windows], runtime])
        return cls(folder, hashlib.sha256(facts.encode()).hexdigest()[:16])

    @contextmanager
    def found(self, work: Path) -> Iterator[tuple[BaselineStore, Speed | None] | None]:
        """As ``load``, but waits for another process that computes the same baseline. Yields None
        where there is none then, and holds the lock while the caller computes and saves it.
        """
        if found := self.load(work):
            yield found
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with file_lock(self.folder / f"{self.key}.lock"):
            found = self.load(work)
            if found is None:  # missing or damaged
                shutil.rmtree(self.folder / self.key, ignore_errors=True)
            yield found

    def load(self, work: Path) -> tuple[BaselineStore, Speed | None] | None:
        """Link the baseline into ``work``; the baseline and the float model's speed, or None."""
        place = self.folder / self.key
        try:
            facts = json.loads((place / "facts.json").read_text(encoding="utf-8"))
            for name in FILES:
                link(place / name, work / name)
            speed = Speed(**facts["speed"]) if facts["speed"] else None
            os.utime(place)  # used now, see ``drop_oldest``
            return BaselineStore(work), speed
        except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile, ArtifactError):
            return None  # damaged: it will be computed again

    def save(self, store: BaselineStore, speed: Speed | None) -> None:
        """Save a baseline, atomically; an entry that has as many windows is kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / self.key
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=f"{self.key}.partial-") as partial:
            whole = Path(partial) / "whole"
            whole.mkdir()
            for name in FILES:
                link(store.folder / name, whole / name)
            facts = {"speed": asdict(speed) if speed else None}
            (whole / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
            try:
                if BaselineStore(place).ready >= store.ready:
                    return
                place.rename(Path(partial) / "before")
            except (ArtifactError, FileNotFoundError):
                shutil.rmtree(place, ignore_errors=True)
            with suppress(OSError):  # another build has just saved its own
                whole.rename(place)
        if self.limit:
            with suppress(FileNotFoundError):  # another process removes them, too
                drop_oldest(self.folder, self.limit)


def drop_oldest(folder: Path, limit: int) -> None:
    """Remove the entries of a cache that were used longest ago, until ``limit`` bytes are left."""
    entries = [place for place in folder.iterdir() if (place / "facts.json").is_file()]
    left = limit
    for place in sorted(entries, key=lambda place: place.stat().st_mtime, reverse=True):
        left -= sum(file.stat().st_size for file in place.iterdir())
        if left < 0:
            shutil.rmtree(place, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """Hard-link a file; copy it where the file system has no hard links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
