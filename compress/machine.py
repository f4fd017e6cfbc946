"""CPUs, memory, threads and signals of this process, within the limits of a container.

Limits are those of the process's control group and all its parents: cgroup v2 (``cpu.max``,
``memory.max``) and v1 (``cpu.cfs_quota_us``, ``memory.limit_in_bytes``), see the kernel's
Documentation/admin-guide. Other systems than Linux have none.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import stat
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

PROC = Path("/proc/self")
CGROUPS = Path("/sys/fs/cgroup")


def available_cpus(proc: Path = PROC, root: Path = CGROUPS) -> int:
    """CPUs that the process may use at once, with a cgroup's quota rounded up."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    files = ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")
    for both, quota, period in cgroup_files("cpu", files, proc, root):
        if both:
            quota, _, period = both.partition(" ")
        if quota.isdigit() and period.isdigit():  # not "max", not -1
            count = min(count, math.ceil(int(quota) / int(period)))
    return max(1, count)


@cache
def default_threads() -> int:
    """CPUs that the process may use, or fewer with ``OMP_NUM_THREADS``."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(available_cpus(), int(wanted) if wanted.isdigit() and int(wanted) else 1 << 30)


_threads: ContextVar[int] = ContextVar("threads", default=0)  # 0: default_threads()
_share: ContextVar[int] = ContextVar("share", default=0)  # of them, where not all are free; 0: all
_memory: ContextVar[int | None] = ContextVar("memory", default=None)


@contextmanager
def bounded(threads: int = 0, memory: int | None = None) -> Iterator[None]:
    """Limit threads and memory of the work inside; other threads of the process are not affected.

    Matrix products inside are deterministic (``make_deterministic``). Settings of
    ``change_setting`` are restored when the last such block of the process is left.

    Args:
        threads: for reading and packing; 0: the default.
        memory: limit of the process in bytes; None: only the machine's.
    """
    global _blocks
    with _settings_lock:
        _blocks += 1
    default_threads()  # reads the control groups' files once, before the work
    count = _threads.set(min(threads, available_cpus()))
    share = _share.set(0)
    limit = _memory.set(memory)
    try:
        if not _own or os.environ.get("OPENBLAS_NUM_THREADS") != "1":
            one_openblas_thread()
        for name, value in DETERMINISTIC.items():
            if name not in os.environ:
                get, put = partial(os.environ.get, name), partial(set_variable, name)
                change_setting(name, get, put, value)
        yield
    finally:
        _threads.reset(count)
        _share.reset(share)
        _memory.reset(limit)
        with _settings_lock:
            _blocks -= 1
            if not _blocks:
                while _before:
                    _before.popitem()[1]()


_settings_lock = threading.RLock()
_before: dict[str, Callable[[], None]] = {}  # setting → restores it
_blocks = 0  # ``bounded`` blocks that are active, in all threads


def change_setting(
    name: str, get: Callable[[], Any], put: Callable[[Any], Any], value: Any
) -> None:
    """Change a process-wide setting until the last ``bounded`` block is left; outside a block,
    permanently.

    Args:
        name: of the setting.
        get, put: read and write it.
        value: to set.
    """
    with _settings_lock:
        if _blocks and name not in _before:
            _before[name] = partial(put, get())
        put(value)


def worker_threads() -> int:
    """Threads for reading and packing; within ``in_order`` a share of them."""
    return _share.get() or _threads.get() or default_threads()


def in_threads(work: Callable[[int, int], None], count: int, least: int) -> None:
    """Call ``work(begin, end)`` over ``range(count)`` in threads, with at least ``least`` each."""
    threads = min(_share.get() or _threads.get() or default_threads(), count // least)
    if threads <= 1:
        work(0, count)
        return
    step = -(-count // threads)
    with ThreadPoolExecutor(threads) as pool:
        futures = [
            pool.submit(copy_context().run, work, begin, min(begin + step, count))
            for begin in range(0, count, step)
        ]
        for future in futures:
            future.result()


def in_order(works: Iterable[Callable[[], T]], at_once: int, share: int = 0) -> Iterator[T]:
    """Yield the results of works in order, running ``at_once`` of them in threads.

    The caller's thread takes works from the iterable, one more than run at once, and processes the
    results; ``worker_threads`` is 1 in it while the others run.

    Args:
        share: ``worker_threads`` within a work; 0: the caller's, divided among all.
    """
    share = share or max(worker_threads() // at_once, 1)
    own = _share.get()
    with ThreadPoolExecutor(at_once) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for work in works:
                _share.set(share)
                waiting.append(pool.submit(copy_context().run, work))
                _share.set(1)
                if len(waiting) > at_once:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            _share.set(own)
            for future in waiting:
                future.cancel()


MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of mallopt(3)
RETAINED = 64 << 20  # bytes that malloc retains for reuse; arrays of half of it or more are freed


def reuse_memory() -> None:
    """Make malloc reuse one slab's memory for the next.

    Otherwise it is returned to the kernel each time, and new pages are zeroed and mapped one by
    one: a twentieth of the time of packing. Only with glibc, and only in packlight's own process
    (``own_process``), because it cannot be undone.
    """
    posix = _own and os.name == "posix"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if posix else None
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, RETAINED // 2)
        mallopt(TRIM_THRESHOLD, RETAINED)


def available_memory(proc: Path = PROC, root: Path = CGROUPS) -> int:
    """Bytes that can be allocated without swapping: the machine's, the rest of the cgroup's limit
    (page cache that can be dropped counts as free), or the rest within ``bounded``."""
    import psutil

    left = [int(psutil.virtual_memory().available)]
    files = ("memory.max", "memory.current", "memory.stat")
    old = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for found in cgroup_files("memory", (*files, *old), proc, root):
        limit, used, stat = found[0] or found[3], found[1] or found[4], found[2].split()
        if limit.isdigit() and used.isdigit():
            cached = dict(zip(stat[::2], stat[1::2], strict=False)).get("inactive_file", 0)
            left.append(max(int(limit) - int(used) + int(cached), 0))
    if (bound := _memory.get()) is not None:
        left.append(max(bound - resident_memory(), 0))
    return min(left)


def resident_memory() -> int:
    """Resident bytes of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def cgroup_files(
    controller: str, names: Sequence[str], proc: Path, root: Path
) -> Iterator[list[str]]:
    """Yield the contents of files of the process's control group, then of each parent's.

    Args:
        controller: ``cpu`` or ``memory``.
        names: of files; a missing one is ``""``.
        proc: of the process.
        root: mount point of control groups.
    """
    own = proc / "cgroup"
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        group = top / path.lstrip("/")
        # In a container the path can be the host's, with only the root mounted here.
        group = group if group.is_dir() else top
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                found = []
                for name in names:
                    try:
                        found.append((folder / name).read_text().strip())
                    except OSError:
                        found.append("")
                yield found


# --- the same sums with any number of threads -------------------------------------------------
#
# Floating-point sums depend on their order, which libraries choose by the number of threads. Work
# by rows (grids, codes) does not depend on it; matrix products do. So:
#
# - Products in torch (MKL): Intel's strict reproducibility mode, at no measurable cost; its
#   products are the same bits for any number of threads on one kind of CPU. Where torch has another
#   library, or the mode came too late, products that feed bytes run on one thread.
# - LAPACK in torch has no such mode: factorisations and solves run on one thread (``one_thread``).
# - Products in NumPy (OpenBLAS): one thread each; the solvers work on several slabs of rows at
#   a time instead.
#
# MKL: Intel oneMKL Developer Guide, "Obtaining Numerically Reproducible Results".


# OpenMP's threads sleep while they wait: on a machine that others use too, spinning threads hold up
# those they wait for, and short products take six times the CPU time.
DETERMINISTIC = {
    "MKL_CBWR": "AUTO,STRICT",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def make_deterministic() -> None:
    """Set the environment variables of the libraries; effective only before they are loaded.

    ``MKL_CBWR`` may be set already, for example ``AVX2,STRICT``, which gives the same bits on every
    CPU with AVX2.
    """
    for name in ("MKL_CBWR", "OMP_WAIT_POLICY"):
        os.environ.setdefault(name, DETERMINISTIC[name])
    os.environ["OPENBLAS_NUM_THREADS"] = DETERMINISTIC["OPENBLAS_NUM_THREADS"]


def set_variable(name: str, value: str | None) -> None:
    """Set an environment variable, or remove it."""
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def one_openblas_thread() -> None:
    """Run NumPy's products on one thread, even where NumPy is already loaded."""
    import numpy  # before the environment is changed, which cannot be undone

    package = Path(numpy.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):  # of Linux and of macOS
        for file in folder.glob("*openblas*"):
            library = ctypes.CDLL(str(file))  # the one that is loaded
            get = getattr(library, "scipy_openblas_get_num_threads64_", None)
            put = getattr(library, "scipy_openblas_set_num_threads64_", None)
            if get and put:
                change_setting("OpenBLAS threads", get, put, 1)


def set_threads(count: int) -> None:
    """Set torch's threads, to one where results of products would depend on the number."""
    set_torch_threads(count if count == 1 or same_products_with(count) else 1)


def set_torch_threads(count: int) -> None:
    """Set torch's threads, process-wide, even where results depend on the number."""
    import torch

    change_setting("torch threads", torch.get_num_threads, torch.set_num_threads, count)


@cache
def same_products_with(count: int) -> bool:
    """Whether long narrow products, which are split along the sum, are equal on one thread and on
    ``count``; takes a few milliseconds.
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
    """Run torch on one thread in this block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- signals ----------------------------------------------------------------------------------
#
# Ctrl-C, SIGTERM and SIGHUP unwind a command, so that no partial files remain.
#
# Python's default, an exception at the current instruction, fails in two cases. Libraries catch
# exceptions of their imports and continue with half a module, and then torch crashes the process
# before its folders are removed: so an interruption waits until an import is over. And an exception
# inside a callback from C or a finalizer is lost: so it is raised again until it is unwinding.

LOOK_AGAIN = 0.05  # seconds until the next check whether an interruption is unwinding
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


_own = False


def own_process() -> None:
    """Change process-wide settings that cannot be undone, in a process that runs only packlight."""
    global _own
    _own = True
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    # torch's import creates this folder, which is not used: set to one that exists.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.environ.get("TMPDIR") or "/tmp")
    handle_signals()  # before anything that takes time
    make_deterministic()  # before anything that computes


def die_with_parent(received: Callable[[bytes], object] = len) -> None:
    """End this process and its session when the process at the other end of its stdin ends, even by
    ``kill -9``. Does nothing where stdin is not a pipe.

    Works where Linux's parent-death signal does not exist, and from any thread.

    Args:
        received: called, in a thread, with what is read from stdin until then.
    """

    def wait() -> None:
        while data := os.read(0, 4096):
            received(data)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(128 + signal.SIGKILL)

    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=wait, daemon=True).start()


def is_own_process() -> bool:
    """Whether only packlight runs in this process."""
    return _own


def handle_signals() -> None:
    """Handle the signals that end a command; those that are ignored (nohup) stay ignored.

    SIGINT becomes KeyboardInterrupt, the others ``SystemExit(128 + signal)``, as in shells. A
    second one does not disturb the cleanup after the first.
    """
    ending: BaseException | None = None

    def arrive(number: int, frame: FrameType | None) -> None:
        nonlocal ending
        if ending is None:
            ending = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        signal.setitimer(signal.ITIMER_REAL, LOOK_AGAIN)
        if not is_importing(frame) and not is_unwinding(ending):
            raise ending

    def report_others(lost: sys.UnraisableHookArgs) -> None:
        if ending is None or lost.exc_value is not ending:
            report_lost(lost)

    report_lost, sys.unraisablehook = sys.unraisablehook, report_others
    for number in ENDINGS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, arrive)
    signal.signal(signal.SIGALRM, arrive)


def ignore_signals() -> None:
    """Ignore these signals from now on, between the last output of a command and its end."""
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
    """Whether ``finally`` and ``except`` clauses are currently handling an exception."""
    error = sys.exc_info()[1]
    while error is not None:
        if error is ending:
            return True
        error = error.__context__
    return False
