"""The command line in processes that can be killed: this one runs a command line itself, so that
all libraries are loaded, and forks for every other one, which then starts at once.

Reads lines of JSON, ``[log, *arguments]``. To the first it answers with the exit code; to the
others with the child's pid and, after a line more, its exit status (-9: killed). What they say goes
to the log. Run it with ``OMP_NUM_THREADS=1``: a fork has none of its parent's threads.
"""

from __future__ import annotations

import json
import os
import sys

from compress import cli, machine


def run(log: str, arguments: list[str]) -> int:
    """A command line, stdout and stderr into a file."""
    kept = [os.dup(1), os.dup(2)]
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    try:
        return cli.run(arguments)
    finally:
        sys.stdout.flush()
        for place, handle in enumerate(kept, 1):
            os.dup2(handle, place)


def fork(log: str, arguments: list[str]) -> int:
    """The same in a child; its pid."""
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        machine.handle_signals()
        code = run(log, arguments)
    except SystemExit as ending:
        code = int(ending.code or 0)
    finally:
        os._exit(code)


def main() -> None:
    work = run
    while line := sys.stdin.readline():
        log, *arguments = json.loads(line)
        found = work(log, arguments)
        print(found, flush=True)
        if work is fork:
            sys.stdin.readline()  # until then the pid is the child's, even if it has ended
            print(os.waitstatus_to_exitcode(os.waitpid(found, 0)[1]), flush=True)
        work = fork


main()
