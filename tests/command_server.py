"""Runs `packlight` command lines in forks of this process, which has loaded the libraries once.

A command line that computes spends 2 to 4 CPU seconds on imports; a fork has them at once and is
still a process of its own, with an exit code, stdout and stderr, that signals can end.

Reads lines of JSON from stdin: ``{"arguments", "cwd", "env", "stdout", "stderr", "step"}``; the
files are appended to, the step is a ``commands.Step`` or null. Answers each, once the command has
ended, with ``[exit status, steps]``; a negative status is a signal. To be started with
``OMP_NUM_THREADS=1``: a fork has none of its parent's threads.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import itertools
import json
import mmap
import os
import re
import signal
import sys
from typing import Any, TextIO

from compress import machine

LOADED = (
    "torch", "transformers", "transformers.models.auto.tokenization_auto", "numba",
    "onnx", "onnx_ir", "gguf", "coremltools", "jsonschema", "jinja2",
    "compress.__main__", "compress.cli", "compress.build.pipeline",
    "exporters.gguf.writer", "exporters.onnx.writer", "exporters.coreml.writer",
)  # fmt: skip


CHANGES = {
    "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link",
    "shutil.rmtree", "subprocess.Popen",
}  # fmt: skip
"""Audit events that are steps, ``open`` only for writing."""


def main() -> None:
    """Serve until stdin ends."""
    machine.make_deterministic()  # before anything that computes, as the command does
    requests, answers = own_streams()
    for name in LOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # pages that are not written to stay shared
    steps = mmap.mmap(-1, 8)  # shared with the children
    while line := requests.readline():
        request = json.loads(line)
        steps[:] = bytes(8)
        child = os.fork()
        if not child:
            requests.close()
            answers.close()
            serve(request, steps)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([status, int.from_bytes(steps[:], "little")]), file=answers, flush=True)


def own_streams() -> tuple[TextIO, TextIO]:
    """Stdin and stdout under other numbers; nothing that a library prints gets between."""
    requests, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for place in (0, 1, 2):
        os.dup2(nothing, place)
    return requests, answers


def serve(request: dict[str, Any], steps: mmap.mmap) -> None:
    """Be the command: never returns. Its steps are counted in ``steps``."""
    code: int | str | None = 3
    try:
        os.setsid()  # a group of its own, as in a terminal: signals reach its children, too
        for place, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), place)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        # A suite in the background or under nohup ignores signals, and so would its children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if request["step"]:
            send_at(**request["step"], steps=steps)
        sys.argv = ["packlight", *request["arguments"]]
        from compress.__main__ import main as command

        command()
    except SystemExit as ending:
        code = ending.code
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def send_at(pattern: str, count: int, number: int, steps: mmap.mmap) -> None:
    """Send this process's group a signal before its ``count``-th change of the file system (or
    start of a process) that matches; 0 only counts them, in ``steps``."""
    numbers = itertools.count(1)
    matches = re.compile(pattern).search

    def look(event: str, details: tuple[Any, ...]) -> None:
        if event not in CHANGES:
            return
        if event == "open" and not (details[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if matches(f"{event} {details}"):
            this = next(numbers)
            steps[:] = this.to_bytes(8, "little")
            if this == count:
                os.killpg(0, number)

    sys.addaudithook(look)


if __name__ == "__main__":
    main()
