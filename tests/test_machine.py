"""The CPUs and memory that a process may use, from control groups as the kernel presents them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from compress import machine
from compress.machine import available_cpus, available_memory

ROOT = Path(__file__).resolve().parents[1]


def lay_out(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose own limits are above those of the test's control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64), raising=False)


@pytest.mark.usefixtures("plenty")
def test_cgroup_v2(tmp_path):
    lay_out(
        tmp_path,
        {
            "proc/cgroup": "0::/build/job\n",
            "sys/build/job/memory.max": "max\n",
            "sys/build/job/memory.current": "1000\n",
            "sys/build/memory.max": "5000\n",
            "sys/build/memory.current": "4000\n",
            "sys/build/memory.stat": "anon 3000\ninactive_file 700\n",
            "sys/build/job/cpu.max": "150000 100000\n",
            "sys/build/cpu.max": "max 100000\n",
        },
    )
    assert available_memory(tmp_path / "proc", tmp_path / "sys") == 1700
    assert available_cpus(tmp_path / "proc", tmp_path / "sys") == 2  # of 1.5


@pytest.mark.usefixtures("plenty")
def test_cgroup_v1(tmp_path):
    """Controllers have hierarchies of their own; a path of the host's is the mounted top."""
    lay_out(
        tmp_path,
        {
            "proc/cgroup": "4:memory:/docker/abc\n1:cpu,cpuacct:/jobs\n0::/\n",
            "sys/memory/memory.limit_in_bytes": "3000\n",
            "sys/memory/memory.usage_in_bytes": "3500\n",
            "sys/memory/memory.stat": "inactive_file 100\n",
            "sys/cpu/jobs/cpu.cfs_quota_us": "400000\n",
            "sys/cpu/jobs/cpu.cfs_period_us": "100000\n",
            "sys/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert available_memory(tmp_path / "proc", tmp_path / "sys") == 0
    assert available_cpus(tmp_path / "proc", tmp_path / "sys") == 4


@pytest.mark.usefixtures("plenty")
def test_no_cgroups(tmp_path):
    assert available_memory(tmp_path, tmp_path) > 1 << 20
    assert available_cpus(tmp_path, tmp_path) == 64


@pytest.mark.usefixtures("plenty")
@pytest.mark.parametrize(("quota", "cpus"), [("50000", 1), ("6400000", 64), ("9900000", 64)])
def test_quotas_limit_threads(tmp_path, quota, cpus):
    lay_out(tmp_path, {"cgroup": "0::/\n", "cpu.max": f"{quota} 100000\n"})
    assert available_cpus(tmp_path, tmp_path) == cpus


def test_here():
    assert available_cpus() >= 1
    assert available_memory() > 0


@pytest.mark.parametrize(("wanted", "omp", "threads"), [(0, "", 8), (3, "1", 3), (0, "2", 2),
                                                        (99, "", 8), (0, "none", 8)])  # fmt: skip
def test_threads_are_the_users_then_the_environments_then_all(
    monkeypatch: pytest.MonkeyPatch, wanted: int, omp: str, threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setattr(machine, "available_cpus", lambda: 8)
    machine.default_threads.cache_clear()
    try:
        with machine.bounded(threads=wanted):
            assert machine.worker_threads() == threads
    finally:
        machine.default_threads.cache_clear()


def test_in_threads_covers_the_range_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(machine, "default_threads", lambda count=threads: count)
        for count in (0, 1, 9, 10, 100):
            parts: list[tuple[int, int]] = []
            machine.in_threads(lambda *part: parts.append(part), count, 10)  # noqa: B023
            covered = [i for begin, end in sorted(parts) for i in range(begin, end)]
            assert covered == list(range(count))
            assert len(parts) == max(1, min(threads, count // 10))


def test_in_order_keeps_the_order_and_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "default_threads", lambda: 6)
    lock, working, most, shares = threading.Lock(), [0], [0], set()
    together = threading.Barrier(3, timeout=600)
    taken = [0]

    def work(index: int) -> int:
        with lock:
            working[0] += 1
            most[0] = max(most[0], working[0])
        shares.add(machine.worker_threads())
        if index < 3:
            together.wait()  # whenever the machine comes to start them
        time.sleep(0.002 * (-index % 3))  # later ones are done first
        with lock:
            working[0] -= 1
        return index

    def works() -> Iterator[Callable[[], int]]:
        for index in range(12):
            taken[0] += 1
            yield partial(work, index)

    seen = []
    for index in machine.in_order(works(), 3):
        seen.append(index)
        assert machine.worker_threads() == 1  # the others are taken
        assert taken[0] <= len(seen) + 3  # what is read ahead is memory
    assert seen == list(range(12))
    assert most[0] == 3
    assert shares == {2}
    assert machine.worker_threads() == 6


def test_in_order_begins_nothing_after_a_failure() -> None:
    begun = []

    def work(index: int) -> int:
        begun.append(index)
        if index == 1:
            raise ValueError("one")
        return index

    seen = []
    with pytest.raises(ValueError, match="one"):
        for index in machine.in_order((partial(work, index) for index in range(100)), 2):
            seen.append(index)
    assert seen == [0]
    assert max(begun) <= 4


FAULTS = """
import ctypes, resource, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # pages of 4 KiB: no huge ones, which come and go
import numpy as np
from compress import machine
if sys.argv[1] != "plain":
    machine.own_process()
machine.reuse_memory()
begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    slabs = [np.empty(8 << 20, np.uint8) for _ in range(4)]
    for slab in slabs:
        slab[::4096] = 1
    del slab, slabs
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_reused_memory_is_not_fetched_again() -> None:
    found = {}
    for how in ("plain", "reused"):
        command = [sys.executable, "-c", FAULTS, how]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found[how] = int(done.stdout)
    assert found["reused"] < found["plain"] / 4
