"""Runs the jobs of a batch as processes: takes ``Work``, returns ``Outcome``.

    Engine.run(works, watch) -> outcomes, each once, as jobs end

``run_work`` does one job in a process of its own, wherever it is called: the local engine calls it
from threads of this process, an engine on many machines from a task on one of them. Jobs are killed
when the process that called it ends, and no job knows of another.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

from compress.verify import child

__all__ = ["Engine", "LocalEngine", "Outcome", "Process", "Watch", "Work", "run_work"]

PATIENCE = 20.0  # seconds that an interrupted job has for its own cleaning up


@dataclass(frozen=True)
class Work:
    """One job as an engine sees it; plain data that can travel to another machine.

    Attributes:
        name: of the job, one of a kind in its batch.
        arguments: of the command line: ``("build", MODEL, "-o", FOLDER, …)``.
        log: file for what it says on stdout and stderr; made anew.
        memory: bytes that it is predicted to take at its peak, its child processes included.
        threads: that it keeps busy.
        seconds: that it is predicted to take.
        after: name of a job that must have ended first, well or badly, since both would do the
            same work that the first keeps for the second; empty for none.
        environment: variables over those that the engine's processes have.
    """

    name: str
    arguments: tuple[str, ...]
    log: Path
    memory: int
    threads: int
    seconds: float
    after: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        name: of the job.
        code: exit code of the command, or minus the signal that ended it.
        seconds: from start to end.
        cpu_seconds: user and system, of it and its child processes.
        peak_memory: largest resident size of one of its processes, in bytes.
        error: the one line that it gave for not running; empty where it gave none.
        hint: the line after it.
        copied: whether its folder was copied to the URL of the output tree.
    """

    name: str
    code: int
    seconds: float
    cpu_seconds: float = 0.0
    peak_memory: int = 0
    error: str = ""
    hint: str = ""
    copied: bool = False


class Watch(Protocol):
    """Hears of starts, and decides about more, in the thread that iterates."""

    def started(self, work: Work) -> None:
        """A job has just been started (again, if an engine repeats it)."""
        ...

    def wanted(self) -> bool:
        """Whether more jobs should be started; when not, those that run are waited for."""
        ...


class Engine(Protocol):
    """Runs jobs. Closing the generator ends those that run."""

    def run(self, works: Sequence[Work], watch: Watch) -> Generator[Outcome, None, None]:
        """Outcomes as jobs end, one for each that was started.

        Args:
            works: with names of their own; ``after`` names one of them.
            watch: hears of every start.
        """
        ...


class Process:
    """The process of one job, in a session of its own."""

    def __init__(self, work: Work) -> None:
        """Start it.

        Raises:
            OSError: it cannot be started, or the log cannot be written.
        """
        self.work = work
        self._begin = time.monotonic()
        command = [sys.executable, "-P", "-m", "compress.batch.child", *work.arguments]
        work.log.parent.mkdir(parents=True, exist_ok=True)
        with work.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # whose end means that we are gone
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment(work),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self) -> Outcome:
        """Wait for its end, and sweep up what it may have left running."""
        assert self._process.stdin
        _, status, used = os.wait4(self.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - self._begin
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.stdin.close()
        error, hint = last_error(self.work.log)
        unit = 1 if sys.platform == "darwin" else 1024
        code = self._process.returncode
        return Outcome(
            name=self.work.name,
            code=code,
            seconds=seconds,
            cpu_seconds=used.ru_utime + used.ru_stime,
            peak_memory=used.ru_maxrss * unit,
            error=error if code not in (0, 1) else "",
            hint=hint if code not in (0, 1) else "",
        )

    def end(self) -> None:
        """Ask it to clean up and end; kill it if it does not within ``PATIENCE``."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        timer = threading.Timer(PATIENCE, self.kill)
        timer.daemon = True
        timer.start()

    def kill(self) -> None:
        """End it and its children now."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


def run_work(work: Work) -> Outcome:
    """One job from start to end, here and now."""
    return Process(work).wait()


def environment(work: Work) -> dict[str, str]:
    """Ours, with the folder that ``compress`` was imported from on the path, the job's own
    variables, and as many threads as it was given.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(work.threads))
    return {**child.environment(), **threads, "NO_COLOR": "1", **work.environment}


def last_error(log: Path) -> tuple[str, str]:
    """The last ``error:`` and ``hint:`` lines of a log; without an error its last line."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return "", ""
    found = {"error": "", "hint": ""}
    for line in lines:
        label, colon, text = line.partition(": ")
        if colon and label.lower() == "error":
            found = {"error": text, "hint": ""}
        elif colon and label == "hint":
            found["hint"] = text
    return found["error"] or (lines[-1][:300] if lines else ""), found["hint"]


class LocalEngine:
    """A plain process pool: as many jobs at once as fit.

    Args:
        memory: bytes that the predictions of jobs that run at once may add up to.
        threads: the same for their threads; a job with more of them runs alone.
        jobs: at most so many at once; 0 for as many as fit.
    """

    def __init__(self, memory: int, threads: int, jobs: int = 0) -> None:
        self._memory, self._threads, self._jobs = memory, threads, jobs

    def run(self, works: Sequence[Work], watch: Watch) -> Generator[Outcome, None, None]:
        """See ``Engine.run``; works of more memory than there is run alone."""
        waiting = longest_first(works)
        running: dict[str, Process] = {}
        threads: list[threading.Thread] = []
        ended: SimpleQueue[Outcome] = SimpleQueue()
        try:
            while True:
                while watch.wanted() and (work := self._next(waiting, running)):
                    waiting.remove(work)
                    watch.started(work)
                    try:
                        running[work.name] = process = Process(work)
                    except OSError as error:  # no more processes, no room for the log
                        yield Outcome(work.name, 2, 0.0, error=f"cannot be started: {error}")
                        continue
                    thread = threading.Thread(target=wait_for, args=(process, ended.put))
                    threads.append(thread)
                    thread.start()
                if not running:
                    return
                outcome = ended.get()
                del running[outcome.name]
                yield outcome
        finally:
            for process in running.values():
                process.end()
            for thread in threads:
                thread.join()

    def _next(self, waiting: Sequence[Work], running: Mapping[str, Process]) -> Work | None:
        """The first that may start now: nothing it builds on is to come, and it fits."""
        unfinished = {work.name for work in waiting} | set(running)
        works = [process.work for process in running.values()]
        if self._jobs and len(works) >= self._jobs:
            return None
        for work in waiting:
            memory = work.memory + sum(other.memory for other in works)
            threads = work.threads + sum(other.threads for other in works)
            fits = not works or (memory <= self._memory and threads <= self._threads)
            if fits and work.after not in unfinished:
                return work
        return None


def wait_for(process: Process, report: Callable[[Outcome], None]) -> None:
    """What a thread of the engine does."""
    report(process.wait())


def longest_first(works: Sequence[Work]) -> list[Work]:
    """Longest first, so that no long job is left alone at the end; a job counts for those that wait
    for it, too.
    """
    weights = {work.name: work.seconds for work in works}
    for work in works:
        if work.after in weights:
            weights[work.after] += work.seconds
    return sorted(works, key=lambda work: -weights[work.name])
