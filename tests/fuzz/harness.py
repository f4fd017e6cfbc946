"""Runs packlight's command line on hostile files and says how each ended; ``make fuzz``.

    python tests/fuzz/harness.py [ROW ...] [--count N] [--seed N] [--minutes M] [--work DIR]

Every input is a fork of a process that has loaded the libraries, with limits of its own: CPU
seconds, address space, a folder. An input is well met if the command succeeds or refuses with one
line (``error: …``, perhaps ``hint: …``), exit code 2, and leaves nothing behind. What is not, is
kept in DIR/finds. The exit code is 1 if there is any.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(TESTS), str(TESTS.parent)]

from inputs import GOOD, ROWS, Row, make_base, place_input  # noqa: E402

CPU_SECONDS = 20
MEMORY = 3 << 30  # bytes of address space beyond the parent's
LONGEST = 600  # characters of an error's line
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


LIGHT = ("inspect", "fit", "recipes", "batch", "push")  # commands that only read and tell
AT_ONCE = 40  # inputs of a light row in one process
Tried = tuple[int, str, list[str], "Ending"]
"""The number of an input, what it is, the command line, and how it ended."""


@dataclass
class Ending:
    """How a command ended.

    Attributes:
        kind: ``success``, ``refusal``, or what must not be: ``bug`` (the catch-all of the command
            line, or a traceback), ``hang``, ``died`` of a signal, ``unclean`` (characters that
            steer a terminal, a line without end, several errors, files left behind).
        detail: the error's line, or what is unclean.
    """

    kind: str
    detail: str = ""


def load_libraries() -> None:
    """What the commands load late, so that forks need not."""
    import importlib

    from command_server import LOADED

    from compress import machine

    machine.make_deterministic()
    for name in LOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # pages that are not written to stay shared


def make_base_in_fork(folder: Path) -> None:
    """In a process of its own: a fork of one whose libraries have started threads can hang."""
    child = os.fork()
    if not child:
        from compress import __main__ as cli

        code = 1
        try:
            make_base(folder, cli.main)
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    if os.waitpid(child, 0)[1]:
        sys.exit("the good files could not be made")


def run_in_fork(arguments: list[str], box: Path) -> Ending:
    """One command in ``box``/cwd, with a home, a cache and a folder for temporary files."""
    before = everything(box)
    child = os.fork()
    if not child:
        be_the_command(arguments, box)
    status = waited(child)
    if status is None:
        return Ending("hang", " ".join(arguments))
    code = os.waitstatus_to_exitcode(status)
    return judged(code, *streams(box), everything(box) - before)


def streams(box: Path) -> list[str]:
    """What a command wrote to stdout and stderr."""
    files = [box / name for name in ("out", "err")]
    return [file.read_text("utf-8", "replace") if file.exists() else "" for file in files]


def everything(box: Path) -> set[str]:
    return {
        str(path.relative_to(box))
        for folder in ("cwd", "home", "tmp")
        for path in (box / folder).rglob("*")
    }


def be_the_command(arguments: list[str], box: Path) -> None:
    """Never returns."""
    code = 70
    try:
        be_a_process(box)
        code = command(arguments, box)
    finally:
        os._exit(code)


def be_a_process(box: Path) -> None:
    """A session, an environment and limits of its own."""
    os.setsid()
    os.environ |= {
        "HOME": str(box / "home"), "TMPDIR": str(box / "tmp"), "HF_HUB_OFFLINE": "1",
        "PACKLIGHT_CACHE": str(box / "cache"), "HF_HOME": str(box / "home"),
        "OMP_NUM_THREADS": "1", "NO_COLOR": "1",
    }  # fmt: skip
    os.environ.pop("PACKLIGHT_DEBUG", None)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def command(arguments: list[str], box: Path) -> int:
    """Run a command line in ``box``/cwd, in this process; its exit code, or 70 for an exception."""
    from compress import __main__ as cli

    code = 70
    try:
        os.chdir(box / "cwd")
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(box / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
            os.dup2(file, number)
            os.close(file)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        code = cli.main(arguments)
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return code


# --- many commands in one process ----------------------------------------------------------------


def is_light(row: Row) -> bool:
    """Whether a row's commands only read and tell, so that one process can run many."""
    return all(words[0] in LIGHT or "--checksums" in words for words in row.commands)


def run_many(name: str, numbers: list[int], seed: int, work: Path, box: Path) -> list[Tried]:
    """Try inputs of a light row in one fork, up to the first that ends the process.

    Returns:
        One row for each, at least for the first.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            be_a_process(box)
            with os.fdopen(writing, "w") as answers:
                fresh = True
                for number in numbers:
                    label, arguments = lay_out(name, number, seed, work, box, fresh=fresh)
                    print(json.dumps([number, label, arguments]), file=answers, flush=True)
                    before = everything(box)
                    code = command(arguments, box)
                    made = everything(box) - before
                    ending = judged(code, *streams(box), made)
                    keep(name, number, seed, work, box, ending)
                    fresh = bool(made)
                    print(json.dumps([ending.kind, ending.detail]), file=answers, flush=True)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answers:
        status = waited(child)
        lines = [json.loads(line) for line in answers.read().splitlines()]
    if len(lines) % 2:  # the last one ended the process
        lines.append(["hang" if status is None else "died", "of what one process ran"])
    return [
        (number, label, arguments, Ending(*ended))
        for (number, label, arguments), ended in zip(lines[::2], lines[1::2], strict=True)
    ]


def lay_out(
    name: str, number: int, seed: int, work: Path, box: Path, *, fresh: bool = True
) -> tuple[str, list[str]]:
    """``place_input`` in an empty box, or in that of another input."""
    if fresh:
        shutil.rmtree(box, ignore_errors=True)
        for folder in ("cwd", "home", "tmp", "cache"):
            (box / folder).mkdir(parents=True)
    return place_input(name, number, seed, work / "base", box / "cwd", fresh=fresh)


def keep(name: str, number: int, seed: int, work: Path, box: Path, ending: Ending) -> None:
    """Keep what was found."""
    if (box / "cwd" / "PWNED").exists():
        ending.kind = "code was executed"
    if ending.kind not in ("success", "refusal"):
        kept = work / "finds" / f"{name}-{seed}-{number}".replace(" ", "_")
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(box, kept, symlinks=True)


def waited(child: int) -> int | None:
    """The status of a process; None if it took too long and was killed, with its children."""
    idle_since, seen = time.monotonic(), 0.0
    ended = os.pidfd_open(child)
    try:
        while not select.select([ended], [], [], 0.2)[0]:
            cpu = cpu_seconds(child)
            if cpu > seen or others_in(child):
                idle_since, seen = time.monotonic(), cpu
            if cpu > CPU_SECONDS or time.monotonic() - idle_since > 60:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None
    finally:
        os.close(ended)
    status = os.waitpid(child, 0)[1]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # remaining processes of its session
    return status


def cpu_seconds(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def others_in(session: int) -> bool:
    """Whether a session has a process besides its leader: a runtime at work."""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != session:
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session:
                return True
    return False


def judged(code: int, out: str, err: str, made: set[str]) -> Ending:
    """The verdict on one command."""
    errors = [line for line in err.splitlines() if line.startswith(("error:", "Error:"))]
    line = (errors or err.strip().splitlines() or [""])[-1][:300]
    if code < 0:
        return Ending("died", f"of signal {-code}: {line}")
    if "Traceback" in err or "this is a bug in packlight" in err or code not in (0, 1, 2):
        return Ending("bug", f"exit {code}: {line}")
    if CONTROL.search(out + err):
        return Ending("unclean", f"control characters: {line!r}")
    if code != 2:
        return Ending("success")
    if len(errors) > 1 or not err.strip():
        return Ending("unclean", f"{len(errors)} error lines: {line}")
    if max(map(len, err.splitlines())) > LONGEST:
        return Ending("unclean", f"a line of {max(map(len, err.splitlines()))} characters: {line}")
    if made:
        return Ending("unclean", f"left behind: {sorted(made)[:3]}")
    return Ending("refusal", line)


def fuzz(name: str, counts: range, seed: int, work: Path, minutes: float) -> dict[str, object]:
    """All inputs of a row; its counts and what was found, for each kind of it the first input."""
    began, box = time.monotonic(), work / f"box-{os.getpid()}"
    kinds: collections.Counter[str] = collections.Counter()
    found: dict[str, str] = {}
    waiting = [GOOD, *counts]
    while waiting and time.monotonic() - began < 60 * minutes:
        if is_light(ROWS[name]):
            tried = run_many(name, waiting[:AT_ONCE], seed, work, box)
        else:
            label, arguments = lay_out(name, waiting[0], seed, work, box)
            ending = run_in_fork(arguments, box)
            keep(name, waiting[0], seed, work, box, ending)
            tried = [(waiting[0], label, arguments, ending)]
        waiting = waiting[len(tried) :]
        for number, label, arguments, ending in tried:
            kinds[ending.kind] += 1
            if number == GOOD and ending.kind != "success":
                found["good"] = f"the good files: {ending.kind}: {ending.detail}"
            if ending.kind not in ("success", "refusal"):
                key = re.sub(r"\d+", "N", f"{ending.kind} {ending.detail[:80]}")
                line = f"input {number} ({label}), {' '.join(arguments)}: {ending.detail}"
                found.setdefault(key, line)
    shutil.rmtree(box, ignore_errors=True)
    return {"row": name, "seed": seed, "inputs": sum(kinds.values()), **kinds, "found": found}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    options.add_argument("--count", type=int, default=200, help="inputs of each row")
    options.add_argument("--start", type=int, default=0, help="number of the first")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--minutes", type=float, default=10, help="of each row at most")
    options.add_argument("--work", type=Path, default=Path("build/fuzz"))
    given = options.parse_args()
    work = given.work.resolve()
    load_libraries()
    if not (work / "base").exists():
        make_base_in_fork(work / "base")
    bad = 0
    for name in given.rows or ROWS:
        result = fuzz(
            name, range(given.start, given.start + given.count), given.seed, work, given.minutes
        )
        found = result.pop("found")
        print(json.dumps(result), flush=True)
        assert isinstance(found, dict)
        for line in found.values():
            print(f"  {line}", flush=True)
        bad += len(found)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
