"""Runs `packlight` as a user does: in its own process, from another folder."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """The step of a command at which it receives a signal: see ``hooks/steps.py``.

    Attributes:
        pattern: searched in each change of the file system and each start of a process.
        count: the signal is sent before the count-th that matches; 0 for none.
        number: of the signal.
        to: ``group``, ``itself``, ``parent``.
    """

    pattern: str
    count: int = 1
    number: int = signal.SIGKILL
    to: str = "group"

    def variables(self) -> dict[str, str]:
        """Environment for a program that starts others: the signal goes to the one at the step."""
        hooks = os.pathsep.join([str(ROOT / "tests" / "hooks"), paths()])
        return {"PYTHONPATH": hooks, "PACKLIGHT_TEST_STEP": json.dumps(asdict(self))}


class Server:
    """`command_server.py`: processes of the command line with the libraries already loaded."""

    def __init__(self, tree: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths(tree)}
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "command_server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        atexit.register(self.close)

    def start(
        self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str], stdout: Path,
        stderr: Path, step: Step | None = None,
    ) -> int:  # fmt: skip
        """Start a command line; the files are appended to. Returns its process id."""
        request: dict[str, Any] = {"arguments": arguments, "cwd": str(cwd), "env": dict(env)}
        request |= {"stdout": str(stdout), "stderr": str(stderr)}
        request |= {"step": asdict(step) if step else None}
        return int(self._ask(request))

    def wait(self, child: int) -> tuple[int, int]:
        """Its exit status (-9: killed), and how many changes matched the step's pattern."""
        status, steps = self._ask({"wait": child})
        return status, steps

    def run(self, *command: Any, **options: Any) -> tuple[int, int]:
        """Both."""
        return self.wait(self.start(*command, **options))

    def _ask(self, request: Mapping[str, Any]) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{json.dumps(request)}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the server, and a command that is not waited for."""
        self._process.kill()
        self._process.communicate()


@cache
def server(tree: Path = ROOT) -> Server:
    """One for each process of pytest, started by whoever needs it first; others for copies of this
    tree."""
    return Server(tree)


def paths(tree: Path = ROOT) -> str:
    """PYTHONPATH with a tree in front."""
    return os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])


def packlight(
    *arguments: object,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    new: bool = False,
    step: Step | None = None,
    tree: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """The finished command, with its exit code, stdout and stderr.

    Args:
        env: variables to change. Those that libraries read as they load ask for a new interpreter.
        new: in an interpreter of its own, not in a fork of one that has loaded the libraries.
        step: where it is sent a signal. (``Step.variables`` in ``env``: where what it starts is.)
        tree: a copy of this one, whose command it is.
    """
    words = [str(argument) for argument in arguments]
    changed = (env or {}).keys() - {"PACKLIGHT_CACHE"}
    if new or (changed and "PACKLIGHT_TEST_STEP" not in changed):
        return subprocess.run(
            [sys.executable, "-m", "compress", *words],
            cwd=cwd, env={**os.environ, "NO_COLOR": "1", **(env or {})},
            capture_output=True, text=True,
        )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="packlight-command-") as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        environment = {**os.environ, "PYTHONPATH": paths(tree), "NO_COLOR": "1", **(env or {})}
        code, _ = server(tree).run(words, cwd or Path.cwd(), environment, stdout, stderr, step)
        said = stdout.read_text("utf-8"), stderr.read_text("utf-8")
    return subprocess.CompletedProcess(["packlight", *words], code, *said)


def until(condition: Callable[[], T]) -> T:
    """Wait until a condition of other processes or threads is true; returns its value. The limit is
    far above the time on any loaded machine."""
    deadline = time.monotonic() + 600
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return found


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """stderr of a command that could not run: one `error:` line, perhaps one `hint:` line."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    errors = [line for line in lines if line.startswith(("error: ", "Error: "))]
    assert len(errors) == 1, done.stderr
    return done.stderr
