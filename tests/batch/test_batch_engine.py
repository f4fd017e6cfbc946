"""The local engine: real processes of the command line, packed, killed, ended and orphaned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import psutil
from commands import until

from compress.batch.engine import LocalEngine, Outcome, Process, Work, last_error, longest_first
from compress.demo import model_path

GIB = 2**30


class Seen:
    """Counts how many jobs run at once."""

    def __init__(self, limit: int = 99) -> None:
        self.names: list[str] = []
        self.limit = limit
        self.ended: list[Outcome] = []
        self.most = 0

    def started(self, work: Work) -> None:
        self.names.append(work.name)
        self.most = max(self.most, len(self.names) - len(self.ended))

    def wanted(self) -> bool:
        return len(self.names) < self.limit

    def of(self, engine: LocalEngine, works: list[Work]) -> Seen:
        with closing(engine.run(works, self)) as outcomes:
            for outcome in outcomes:
                self.ended.append(outcome)
        return self


def work(folder: Path, name: str, *arguments: str, memory: int = GIB, **more: object) -> Work:
    told = {"threads": 1, "seconds": 1.0} | more
    return Work(name, arguments or ("--version",), folder / f"{name}.log", memory, **told)  # type: ignore[arg-type]


def demo(folder: Path, name: str) -> Work:
    """A job of many seconds."""
    return work(folder, name, "build", str(model_path()), "-r", "int4-fast", "-f", "gguf",
                "-o", str(folder / name))  # fmt: skip


def gone(pid: int) -> bool:
    """Waits until a process has ended, or is a zombie that its reaper has not seen."""

    def ended() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return until(ended)


def test_every_job_ends_once_and_no_more_run_than_fit(tmp_path):
    works = [work(tmp_path, f"job{n}") for n in range(4)]
    by_memory = Seen().of(LocalEngine(2 * GIB, 8), works)
    assert sorted(outcome.name for outcome in by_memory.ended) == [w.name for w in works]
    assert all(outcome.code == 0 and outcome.cpu_seconds > 0 for outcome in by_memory.ended)
    assert by_memory.most == 2
    assert (tmp_path / "job3.log").read_text().startswith("packlight ")
    assert Seen().of(LocalEngine(9 * GIB, 8, jobs=3), works).most == 3
    assert Seen().of(LocalEngine(9 * GIB, 1), works[:2]).most == 1


def test_a_job_waits_for_the_one_that_it_builds_on(tmp_path):
    first, second = work(tmp_path, "first"), work(tmp_path, "second", after="first")
    other = work(tmp_path, "other", seconds=0.1)
    seen = Seen().of(LocalEngine(9 * GIB, 2), [second, other, first])
    assert seen.names.index("first") < seen.names.index("second")
    assert seen.most == 2  # `other` ran concurrently with `first`
    # A job outside this run (finished before) is not waited for.
    assert Seen().of(LocalEngine(9 * GIB, 2), [second]).names == ["second"]


def test_a_job_counts_for_those_that_wait_for_it(tmp_path):
    works = [
        work(tmp_path, "long", seconds=3),
        work(tmp_path, "leader", seconds=2),
        work(tmp_path, "follower", seconds=2, after="leader"),
    ]
    assert [w.name for w in longest_first(works)] == ["leader", "long", "follower"]


def test_what_is_refused_says_why_and_nothing_starts_after_it_is_not_wanted(tmp_path):
    bad = work(tmp_path, "bad", "build", str(tmp_path / "nothing"), seconds=9)
    seen = Seen(limit=1).of(LocalEngine(9 * GIB, 2), [work(tmp_path, "good"), bad])
    assert seen.names == ["bad"]
    (outcome,) = seen.ended
    assert outcome.code == 2
    assert outcome.error.endswith("nothing is not a folder with a checkpoint")
    assert outcome.hint.startswith("give a folder")


def test_a_killed_job_takes_its_children_with_it(tmp_path):
    process = Process(demo(tmp_path, "killed"))

    def probes() -> list[psutil.Process]:
        return psutil.Process(process.pid).children()

    probe = until(probes)[0]  # the process in which an artifact is verified
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait().code == -signal.SIGKILL
    assert gone(probe.pid)


def test_closing_the_iterator_ends_the_jobs(tmp_path):
    class Stop(Exception):
        pass

    class Watch(Seen):
        def wanted(self) -> bool:
            if self.names:
                raise Stop
            return True

    seen = Watch()
    before = set(psutil.Process().children())  # the tests' own: commands run in forks of one
    with suppress(Stop):
        seen.of(LocalEngine(9 * GIB, 2), [demo(tmp_path, "a"), demo(tmp_path, "b")])
    assert len(seen.names) == 1
    assert set(psutil.Process().children()) == before
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".log"]


PARENT = """
import sys
from pathlib import Path
from compress.batch.engine import Process, Work
folder = Path(sys.argv[1])
job = Work("job", ("build", sys.argv[2], "-o", str(folder / "out")), folder / "log", 1, 1, 1.0)
print(Process(job).pid, flush=True)
sys.stdin.read()
"""


def test_a_job_dies_with_the_process_that_started_it(tmp_path):
    root = str(Path(__file__).resolve().parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), str(model_path())],
        cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    pid = int(parent.stdout.readline())
    until((tmp_path / "out.partial").exists)  # it is running
    parent.kill()
    parent.wait()
    assert gone(pid)
    parent.stdin.close()
    parent.stdout.close()


def test_last_error(tmp_path):
    log = tmp_path / "log"
    log.write_text("warning: x\nerror: first\nhint: a\nError: second: part\n")
    assert last_error(log) == ("second: part", "")
    log.write_text("Traceback\nSegmentation fault\n")
    assert last_error(log) == ("Segmentation fault", "")
    assert last_error(tmp_path / "none") == ("", "")
