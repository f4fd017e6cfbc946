"""Runs the jobs of a batch as processes: takes ``Work``, returns ``Outcome``.

    Engine.run(works, watch) -> outcomes, each once, as jobs end

``run_work`` runs one job in a child process: the local engine calls it in threads, an engine on
many machines in a task on one of them. A job is killed when the process that called it ends; jobs
are independent.
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

PATIENCE = 20.0  # seconds that an interrupted job has to clean up


@dataclass(frozen=True)
class Work:
    """One job for an engine, as plain data that can be sent to another machine.

    Attributes:
        name: of the job, unique in its batch.
        arguments: of the command line: ``("build", MODEL, "-o", FOLDER, …)``.
        log: file for stdout and stderr, overwritten.
        memory: predicted peak in bytes, with child processes.
        threads: that it uses.
        seconds: predicted wall time.
        after: name of a job that must end first, successfully or not, because it caches work that
            this one reuses; empty for none.
        environment: variables in addition to the engine's.
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
    """The result of a job's process.

    Attributes:
        name: of the job.
        code: exit code of the command, or minus the signal that ended it.
        seconds: from start to end.
        cpu_seconds: user and system, with child processes.
        peak_memory: largest resident size of one of its processes, in bytes.
        error: its error message; empty where there was none.
        hint: of the error.
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
    """Callbacks of an engine, called in the thread that iterates over the outcomes."""

    def started(self, work: Work) -> None:
        """Called when a job was started (or restarted by the engine)."""
        ...

    def wanted(self) -> bool:
        """Whether more jobs should be started; if not, the engine waits for the running ones."""
        ...


class Engine(Protocol):
    """Runs jobs. Closing the generator ends the running ones."""

    def run(self, works: Sequence[Work], watch: Watch) -> Generator[Outcome, None, None]:
        """Run jobs and yield an outcome for each that was started, as they end.

        Args:
            works: with unique names; ``after`` names one of them.
            watch: its callbacks.
        """
        ...


class Process:
    """The process of one job, in a session of its own."""

    def __init__(self, work: Work) -> None:
        """Start the process.

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
                stdin=subprocess.PIPE,  # closed when this process ends, which ends the child
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment(work),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self) -> Outcome:
        """Wait for its end, and kill any remaining children."""
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
        """Interrupt it so that it cleans up; kill it after ``PATIENCE`` seconds."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        timer = threading.Timer(PATIENCE, self.kill)
        timer.daemon = True
        timer.start()

    def kill(self) -> None:
        """Kill it and its children."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


def run_work(work: Work) -> Outcome:
    """Run one job and wait for it."""
    return Process(work).wait()


def environment(work: Work) -> dict[str, str]:
    """This process's environment, with ``compress``'s folder on the path, the job's variables and
    its number of threads.
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
    """A process pool that runs as many jobs at once as fit.

    Args:
        memory: limit of the predicted bytes of all running jobs together.
        threads: limit of their threads; a job with more runs alone.
        jobs: most jobs at once; 0: as many as fit.
    """

    def __init__(self, memory: int, threads: int, jobs: int = 0) -> None:
        self._memory, self._threads, self._jobs = memory, threads, jobs

    def run(self, works: Sequence[Work], watch: Watch) -> Generator[Outcome, None, None]:
        """See ``Engine.run``; jobs that need more memory than there is run alone."""
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
                    except OSError as error:  # no more processes, or no room for the log
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
        """The first job that may start now: its ``after`` has ended, and it fits."""
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
    """Thread of the engine: wait for a process and report its outcome."""
    report(process.wait())


def longest_first(works: Sequence[Work]) -> list[Work]:
    """Sort jobs by time, longest first, so that no long job runs alone at the end; a job's time
    includes the jobs that wait for it.
    """
    weights = {work.name: work.seconds for work in works}
    for work in works:
        if work.after in weights:
            weights[work.after] += work.seconds
    return sorted(works, key=lambda work: -weights[work.name])
