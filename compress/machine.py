"""What this process may use of the machine: in a container less than there is.

Limits are those of the process's control groups and of all groups above them: cgroup v2
(``cpu.max``, ``memory.max``) and v1 (``cpu.cfs_quota_us``, ``memory.limit_in_bytes``), as the
kernel's Documentation/admin-guide describes them. Other systems than Linux have none.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

PROC = Path("/proc/self")
CGROUPS = Path("/sys/fs/cgroup")


def available_cpus() -> int:
    """CPUs that the process may run on at once, a cgroup's quota rounded up to whole ones."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    return max(1, min([count, *map(math.ceil, cpu_quotas())]))


@cache
def default_threads() -> int:
    """CPUs that the process may run on, or fewer where ``OMP_NUM_THREADS`` says so."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(available_cpus(), int(wanted) if wanted.isdigit() and int(wanted) else 1 << 30)


_wanted_threads = 0
_here = threading.local()  # ``share``: threads that this one may start, where not all are its own


def use_threads(count: int) -> None:
    """Have reading and packing take ``count`` threads from now on; 0 for the default."""
    global _wanted_threads
    _wanted_threads = min(count, available_cpus())


def worker_threads() -> int:
    """Threads that reading and packing take; within ``in_order`` a share of them."""
    share: int = getattr(_here, "share", 0)
    return share or _wanted_threads or default_threads()


def in_threads(work: Callable[[int, int], None], count: int, least: int) -> None:
    """``work(begin, end)`` over ``range(count)``, at least ``least`` of them to a thread."""
    threads = min(worker_threads(), count // least)
    if threads <= 1:
        work(0, count)
        return
    step = -(-count // threads)
    with ThreadPoolExecutor(threads) as pool:
        begins = range(0, count, step)
        list(pool.map(lambda begin: work(begin, min(begin + step, count)), begins))


def in_order(works: Iterable[Callable[[], T]], at_once: int, share: int = 0) -> Iterator[T]:
    """What each work returns, in the order of the works, ``at_once`` of them in threads.

    The caller does its own between two of them: it takes works from the iterable, one more than are
    done at once, and does what it likes with the results; all that with one thread, once the others
    are at work.

    Args:
        share: what ``worker_threads`` is to a work; 0 to part those of the caller among all.
    """
    share = share or max(worker_threads() // at_once, 1)
    own = getattr(_here, "share", 0)
    with ThreadPoolExecutor(at_once, initializer=setattr, initargs=(_here, "share", share)) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for work in works:
                waiting.append(pool.submit(work))
                _here.share = 1
                if len(waiting) > at_once:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            _here.share = own
            for future in waiting:
                future.cancel()


MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of mallopt(3)
KEPT = (
    64 << 20
)  # bytes that malloc keeps for what comes next; arrays of half of it and more go back


def reuse_memory() -> None:
    """Have malloc give one slab's memory to the next.

    Otherwise it goes back to the kernel each time, whose fresh pages are zeroed and mapped one by
    one: a twentieth of the time of packing. For glibc; elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, KEPT // 2)
        mallopt(TRIM_THRESHOLD, KEPT)


_memory_limit: int | None = None


def limit_memory(size: int | None) -> None:
    """Have this process choose to hold no more than so many bytes; None for no limit but the
    machine's."""
    global _memory_limit
    _memory_limit = size


def available_memory() -> int:
    """Bytes that may be taken without swapping: the machine's, what is left in the cgroup, or what
    is left under ``limit_memory``."""
    import psutil

    left = [int(psutil.virtual_memory().available), *memory_left()]
    if _memory_limit is not None:
        left.append(max(_memory_limit - resident_memory(), 0))
    return min(left)


def resident_memory() -> int:
    """Bytes of this process that are in memory."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def cpu_quotas(proc: Path = PROC, root: Path = CGROUPS) -> list[float]:
    """CPUs' worth of time under each quota that the process is under."""
    found = []
    for folder in cgroup_folders("cpu", proc, root):
        quota, *period = read(folder / "cpu.max").split() or [""]
        if not quota:
            quota, period = (
                read(folder / "cpu.cfs_quota_us"),
                [read(folder / "cpu.cfs_period_us")],
            )
        if quota.isdigit() and period and period[0].isdigit():  # not "max", not -1
            found.append(int(quota) / int(period[0]))
    return found


def memory_left(proc: Path = PROC, root: Path = CGROUPS) -> list[int]:
    """Bytes left under each memory limit; page cache that can be dropped counts as free."""
    found = []
    for folder in cgroup_folders("memory", proc, root):
        limit = read(folder / "memory.max") or read(folder / "memory.limit_in_bytes")
        used = read(folder / "memory.current") or read(folder / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            stat = dict(line.split() for line in read(folder / "memory.stat").splitlines())
            found.append(max(int(limit) - int(used) + int(stat.get("inactive_file", 0)), 0))
    return found


def cgroup_folders(controller: str, proc: Path, root: Path) -> Iterator[Path]:
    """The folders of the process's control group, its own first, then those above it."""
    for line in read(proc / "cgroup").splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        top = root / controller if names else root
        own = top / path.lstrip("/")
        # In a container the path can be the host's, of which only the top is mounted here.
        own = own if own.is_dir() else top
        yield from (own, *(above for above in own.parents if above.is_relative_to(top)))


def read(path: Path) -> str:
    """What a small file says, stripped; empty where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


# --- the same sums with any number of threads -------------------------------------------------
#
# Floating-point sums depend on their order, and libraries choose it by the number of
# threads. Row by row work (grids, codes) is not touched by that; matrix products are. So:
#
# - Products in torch (MKL): Intel's strict reproducibility mode, at no measurable cost; its
#   products are the same bits for any number of threads on one kind of CPU. Where torch has another
#   library, or the mode came too late, products that feed bytes run on one thread.
# - LAPACK in torch has no such mode: factorisations and solves run on one thread (``one_thread``).
# - Products in NumPy (OpenBLAS): one thread each; the solvers work on several slabs of rows at
#   a time instead.
#
# MKL: Intel oneMKL Developer Guide, "Obtaining Numerically Reproducible Results".


def make_deterministic() -> None:
    """Tell the libraries; of effect only before they load.

    ``MKL_CBWR`` may be given, ``AVX2,STRICT`` for example, which gives the same bits on every CPU
    that has AVX2.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"


def set_threads(count: int) -> None:
    """Threads for torch's products, or one where their results would depend on it."""
    import torch

    torch.set_num_threads(count if count == 1 or same_products_with(count) else 1)


@cache
def same_products_with(count: int) -> bool:
    """Whether long narrow products, which are split along the sum, are the same on one thread and
    on ``count``; a few milliseconds.
    """
    import torch

    before = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    found = []
    try:
        for threads in (1, count):
            torch.set_num_threads(threads)
            generator.manual_seed(0)
            products = []
            for rows, long, columns in ((64, 4096, 64), (511, 8192, 96), (33, 5000, 7)):
                left = torch.randn(rows, long, generator=generator)
                right = torch.randn(long, columns, generator=generator)
                products.append(left @ right)
            found.append(products)
    finally:
        torch.set_num_threads(before)
    return all(torch.equal(one, many) for one, many in zip(*found, strict=True))


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread within."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- signals ----------------------------------------------------------------------------------
#
# Ctrl-C, SIGTERM and SIGHUP unwind a command, so that nothing half-written stays behind.
#
# Python's own way, an exception wherever the signal finds us, has two holes. Libraries catch
# whatever ends an import of theirs and go on with half a module, and then torch crashes the process
# before its folders are cleared: so an interruption waits until an import is over. And an exception
# inside a callback from C or a finalizer is lost: so it is raised again until it is under way.

LOOK_AGAIN = 0.05  # seconds until the next look at what has become of an interruption
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def handle_signals() -> None:
    """Handle the signals that end a command; those that are ignored (nohup) stay ignored.

    SIGINT becomes KeyboardInterrupt, the others ``SystemExit(128 + signal)``, as shells count. A
    second one does not disturb the cleaning up after the first.
    """
    ending: BaseException | None = None

    def arrive(number: int, frame: FrameType | None) -> None:
        nonlocal ending
        if ending is None:
            ending = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        signal.setitimer(signal.ITIMER_REAL, LOOK_AGAIN)
        if not is_importing(frame) and not is_unwinding(ending):
            raise ending

    def hush(lost: sys.UnraisableHookArgs) -> None:
        if ending is None or lost.exc_value is not ending:
            report_lost(lost)

    report_lost, sys.unraisablehook = sys.unraisablehook, hush
    for number in ENDINGS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, arrive)
    signal.signal(signal.SIGALRM, arrive)


def ignore_signals() -> None:
    """Deaf from here on: for the moments between the last word of a command and its end."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in (*ENDINGS, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


def is_importing(frame: FrameType | None) -> bool:
    """Whether a frame, or any that called it, belongs to Python's import machinery."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def is_unwinding(ending: BaseException) -> bool:
    """Whether ``finally`` and ``except`` clauses are at work on an exception right now."""
    error = sys.exc_info()[1]
    while error is not None:
        if error is ending:
            return True
        error = error.__context__
    return False
