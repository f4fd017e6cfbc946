"""Measures a command: CPU seconds, wall time, memory and disk of all its processes. Linux only.

CPU seconds are the kernel's (``wait4``), of the process and of all children it has waited for.
Memory, bytes read and disk usage are sampled: a peak shorter than ``INTERVAL`` can be missed,
except for the resident memory of the largest process, which the kernel records.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.05  # seconds between samples of memory
DISK_EVERY = 10  # samples of memory between samples of disk
BLOCK = 512  # bytes of a block in rusage and stat


@dataclass(frozen=True)
class Usage:
    """The resources of one command; sizes in bytes.

    Attributes:
        cpu_seconds: user and system, all processes.
        wall_seconds: from start to end.
        others_seconds: CPU seconds that everything else on the machine took meanwhile.
        peak_anonymous: RssAnon of all processes together.
        peak_resident: RSS of all processes together; pages that two of them share count twice.
        main_resident: RSS of the first process.
        child_resident: RSS of the largest other one; 0 where there is none.
        read: by system calls, from the page cache or not; without what is mapped.
        from_disk: read from the disk, mapped or not; what the page cache had is not in it.
        written: to files, whether it has reached the disk or not.
        peak_disk: room taken below the watched folder.
    """

    cpu_seconds: float
    wall_seconds: float
    others_seconds: float
    peak_anonymous: int
    peak_resident: int
    main_resident: int
    child_resident: int
    read: int
    from_disk: int
    written: int
    peak_disk: int


class CommandFailedError(Exception):
    """A measured command ended with another code than 0 (or 1, which is a verdict)."""


def measure(
    command: Sequence[str], *, watch: Path, log: Path, extra: Mapping[str, str] | None = None
) -> Usage:
    """Run a command and measure its resources.

    Args:
        command: and its arguments.
        watch: folder whose disk room is sampled.
        log: file that its output is appended to.
        extra: environment variables beside our own.

    Raises:
        CommandFailedError: with the last lines of the log.
    """
    environment = {**os.environ, **(extra or {})}
    with log.open("ab") as stream:
        begin, busy = time.perf_counter(), busy_seconds()
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
        sampler = Sampler(process.pid, watch)
        sampler.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        finally:
            sampler.stop()
        wall = time.perf_counter() - begin
    busy = busy_seconds() - busy
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise CommandFailedError(f"{' '.join(command)} ended with {process.returncode}:\n{tail}")
    cpu = usage.ru_utime + usage.ru_stime
    return Usage(
        cpu_seconds=round(cpu, 2),
        wall_seconds=round(wall, 2),
        others_seconds=round(max(busy - cpu, 0.0), 1),
        peak_anonymous=sampler.anonymous,
        peak_resident=max(sampler.resident, 1024 * usage.ru_maxrss),
        main_resident=sampler.main,
        child_resident=sampler.child,
        read=sum(sampler.read.values()),
        from_disk=BLOCK * usage.ru_inblock,
        written=BLOCK * usage.ru_oublock,
        peak_disk=sampler.disk,
    )


class Sampler(threading.Thread):
    """Samples a process and its children until stopped.

    Attributes:
        anonymous, resident, main, child, disk: the largest seen, in bytes; see ``Usage``.
        read: process → bytes read by the last time it was seen.
    """

    def __init__(self, pid: int, watch: Path) -> None:
        super().__init__(daemon=True)
        self.anonymous = self.resident = self.main = self.child = self.disk = 0
        self.read: dict[int, int] = {}
        self._pid, self._watch, self._ended = pid, watch, threading.Event()

    def run(self) -> None:
        """Sample."""
        count = 0
        while not self._ended.wait(INTERVAL):
            self._memory()
            if count % DISK_EVERY == 0:
                self.disk = max(self.disk, room(self._watch))
            count += 1

    def stop(self) -> None:
        """Stop, after a last sample of the disk."""
        self._ended.set()
        self.join()
        self.disk = max(self.disk, room(self._watch))

    def _memory(self) -> None:
        anonymous = resident = 0
        for pid in family(self._pid):
            lines = fields(Path(f"/proc/{pid}/status"))
            anonymous += 1024 * lines.get("RssAnon", 0)
            resident += 1024 * lines.get("VmRSS", 0)
            most = 1024 * lines.get("VmHWM", 0)
            if pid == self._pid:
                self.main = max(self.main, most)
            else:
                self.child = max(self.child, most)
            self.read[pid] = fields(Path(f"/proc/{pid}/io")).get("rchar", self.read.get(pid, 0))
        self.anonymous = max(self.anonymous, anonymous)
        self.resident = max(self.resident, resident)


def busy_seconds() -> float:
    """CPU seconds of all processes since the machine was started."""
    user, nice, system, _, _, irq, softirq = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def evict(folder: Path) -> None:
    """Drop the files of a folder from the page cache, so that a command reads them from disk."""
    for path in folder.iterdir():
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)  # what is not on disk yet cannot be forgotten
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def family(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # it has just ended
            continue
        for child in children:
            yield from family(int(child))


def fields(path: Path) -> dict[str, int]:
    """``name: number`` lines of a file in /proc; empty when the process has ended."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {
        words[0].rstrip(":"): int(words[1])
        for words in lines
        if len(words) > 1 and words[1].isdigit()
    }


def room(folder: Path) -> int:
    """Bytes on disk of all files below a folder."""
    total = 0
    for path, _, files in os.walk(folder):
        for name in files:
            try:
                total += BLOCK * os.lstat(os.path.join(path, name)).st_blocks
            except OSError:  # deleted meanwhile
                continue
    return total
