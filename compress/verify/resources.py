"""Measures what an artifact needs to run: process memory, tokens per second, seconds to load.

Runs inside the child process that holds nothing but the artifact (``compress.verify.child``).

Memory is read from ``/proc/self/status`` on Linux, from ``getrusage`` on macOS. ``ru_maxrss`` is
wrong on Linux: a child starts with its parent's figure, which survives ``exec``. Three numbers are
kept apart: the weights (bytes of the file), the KV cache (bytes per token × context), and the peak
of the whole process, which holds both, Python, the runtime's libraries and its buffers. Pages of a
memory-mapped file count in the resident size but can be dropped at any time, so the peak of
anonymous memory (which cannot be dropped) is given beside it.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from compress.plan.shapes import Runtime

Opened = TypeVar("Opened", bound=Runtime)
STATUS = Path("/proc/self/status")
PREFILL_TOKENS = 128  # of a prefill measurement, at most half the context
DECODE_TOKENS = 8  # of a decode measurement
WARM_UP_TOKENS = 4  # decoded before anything is timed
REPEATS = 2  # measurements of speed after the warm-up, at most
SECONDS = 10.0  # after which no further measurement starts, and decoding stops
COSTLY_PREFILL, COSTLY_DECODE = 16, 1  # tokens of the only measurement where each call is costly


@dataclass(frozen=True)
class Speed:
    """Tokens per second, medians of repeats after a warm-up.

    Attributes:
        prefill_tokens_per_second: one ``feed`` of ``prefill_tokens`` into an empty cache.
        decode_tokens_per_second: greedy, one token per ``feed``, after that prompt.
        decode_tokens: of the shortest measurement.
        repeats: number of measurements.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prefill_tokens: int
    decode_tokens: int
    repeats: int


@dataclass(frozen=True)
class Resources:
    """Memory, time and speed of a process that loads and runs an artifact.

    Attributes:
        runtime: name and version.
        load_seconds: from the path to a loaded runtime.
        startup_memory_bytes: resident size before loading (Python and imports).
        peak_memory_bytes: largest resident size, after loading, prefill and decode.
        peak_anonymous_bytes: largest size without file pages; None where it is not available.
        speed: tokens per second.
    """

    runtime: str
    load_seconds: float
    startup_memory_bytes: int | None
    peak_memory_bytes: int | None
    peak_anonymous_bytes: int | None
    speed: Speed


def measure(
    open_runtime: Callable[[], Opened],
    prompt: Sequence[int],
    decode_tokens: int,
    *,
    repeats: int = REPEATS,
    seconds: float = SECONDS,
) -> tuple[Opened, Resources]:
    """Load an artifact in this process, run it, and measure memory, time and speed.

    Args:
        open_runtime: loads it.
        prompt: tokens of the prefill.
        decode_tokens: tokens to decode after it.
        repeats: measurements after one warm-up.
        seconds: as for ``measure_speed``. A runtime that is ``costly`` gets fewer tokens, once.

    Returns:
        The loaded runtime, which the caller closes, and the figures.
    """
    startup = read_status("VmRSS")
    with AnonymousPeak() as anonymous:
        begin = time.perf_counter()
        runtime = open_runtime()
        load_seconds = time.perf_counter() - begin
        if getattr(runtime, "costly", False):
            prompt = prompt[:COSTLY_PREFILL]
            decode_tokens, repeats = min(decode_tokens, COSTLY_DECODE), 0
        speed = measure_speed(runtime, prompt, decode_tokens, repeats=repeats, seconds=seconds)
    return runtime, Resources(
        runtime=runtime.name,
        load_seconds=load_seconds,
        startup_memory_bytes=startup,
        peak_memory_bytes=peak_memory(),
        peak_anonymous_bytes=anonymous.peak,
        speed=speed,
    )


def measure_speed(
    runtime: Runtime,
    prompt: Sequence[int],
    decode_tokens: int,
    *,
    repeats: int = REPEATS,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Prefill and decode speed through ``feed``; a short warm-up first, which is not counted.

    Args:
        decode_tokens: most tokens to decode; at least ``WARM_UP_TOKENS`` are.
        repeats: most measurements; 0: one, without a warm-up.
        seconds: time after which no repeat starts, and decoding stops.
        clock: returns seconds.
    """
    deadline = clock() + seconds
    prefill: list[float] = []
    decode: list[float] = []
    decoded = decode_tokens
    for run in range(repeats + 1) if repeats else (1,):
        runtime.reset()
        begin = clock()
        last = runtime.feed(prompt)
        middle = end = clock()
        count = 0
        while count < (decode_tokens if run else min(decode_tokens, WARM_UP_TOKENS)):
            last = runtime.feed([int(last.argmax())])
            count += 1
            end = clock()
            if count >= min(WARM_UP_TOKENS, decode_tokens) and end > deadline:
                break
        if run:
            prefill.append(middle - begin)
            decode.append((end - middle) / count)
            decoded = min(decoded, count)
            if end > deadline:
                break
    return Speed(
        prefill_tokens_per_second=len(prompt) / statistics.median(prefill),
        decode_tokens_per_second=1 / statistics.median(decode),
        prefill_tokens=len(prompt),
        decode_tokens=decoded,
        repeats=len(prefill),
    )


class AnonymousPeak:
    """Largest ``RssAnon`` during a ``with`` block, sampled every few milliseconds.

    The kernel has no high-water mark of it. A spike shorter than the interval is missed.
    ``peak`` is None where there is no ``/proc``.
    """

    interval = 0.005  # seconds; one sample takes 0.03 ms

    def __init__(self) -> None:
        self.peak = read_status("RssAnon")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> AnonymousPeak:
        if self.peak is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.peak is not None:
            self._stop.set()
            self._thread.join()
            self._look()

    def _watch(self) -> None:
        while not self._stop.wait(self.interval):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak or 0, read_status("RssAnon") or 0)


def peak_memory() -> int | None:
    """Largest resident size of this process so far, in bytes."""
    peak = read_status("VmHWM")
    if peak is None and sys.platform == "darwin":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB on Linux
    return peak


def read_status(key: str) -> int | None:
    """A size from ``/proc/self/status`` in bytes; None where there is none."""
    try:
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
