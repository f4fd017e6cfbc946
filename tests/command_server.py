"""Runs `packlight` command lines in forks of this process, which has loaded the libraries once.

A command line that computes spends 2 to 4 CPU seconds on imports; a fork has the imports already,
and is a separate process with an exit code, stdout and stderr, that signals can end.

Reads lines of JSON from stdin: ``{"arguments", "cwd", "env", "stdout", "stderr", "step"}``; the
files are appended to, the step is a ``commands.Step`` or null. Answers each, once the command has
ended, with ``[exit status, steps]``; a negative status is a signal. To be started with
``OMP_NUM_THREADS=1``: a fork has none of its parent's threads.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import mmap
import os
import signal
import sys
from pathlib import Path
from typing import Any, TextIO

from compress import machine

LOADED = (
    "torch", "transformers", "transformers.models.auto.tokenization_auto", "numba",
    "onnx", "onnx_ir", "gguf", "coremltools", "jsonschema", "jinja2",
    "compress.__main__", "compress.cli", "compress.build.pipeline",
    "exporters.gguf.writer", "exporters.onnx.writer", "exporters.coreml.writer",
)  # fmt: skip


def main() -> None:
    """Serve until stdin ends."""
    machine.make_deterministic()  # before anything that computes, as the command does
    sys.path.append(str(Path(__file__).with_name("hooks")))
    requests, answers = own_streams()
    for name in LOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # pages that are not written to stay shared
    counters: dict[int, mmap.mmap] = {}  # of each child: its steps, shared with it
    while line := requests.readline():
        request = json.loads(line)
        answer: object
        if child := request.get("wait"):
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            answer = [status, int.from_bytes(counters.pop(child)[:], "little")]
        else:
            steps = mmap.mmap(-1, 8)
            child = answer = os.fork()
            if not child:
                requests.close()
                answers.close()
                serve(request, steps)
            counters[child] = steps
        print(json.dumps(answer), file=answers, flush=True)


def own_streams() -> tuple[TextIO, TextIO]:
    """Move stdin and stdout to other descriptors, so that a library's output cannot interfere."""
    requests, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for place in (0, 1, 2):
        os.dup2(nothing, place)
    return requests, answers


def serve(request: dict[str, Any], steps: mmap.mmap) -> None:
    """Run the command in this process; never returns. Its steps are counted in ``steps``."""
    code: int | str | None = 3
    try:
        os.setsid()  # a separate process group, as in a terminal: signals reach its children, too
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
            from steps import send_at

            def counted(number: int) -> None:
                steps[:] = number.to_bytes(8, "little")

            send_at(**request["step"], counted=counted)
        sys.argv = ["packlight", *request["arguments"]]
        from compress.__main__ import main as command

        code = command()
    except SystemExit as ending:
        code = ending.code
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main()
