"""The process of one job: runs a ``packlight`` command, and ends when its parent does.

``python -m compress.batch.child build MODEL …`` in a session of its own, with a pipe for stdin that
nothing writes to. When the process at the other end is gone, however it went (``kill -9`` too), the
pipe ends, and the job with everything that it started is killed: nothing goes on writing into an
output tree that the next batch takes up. Works where Linux's parent-death signal does not exist,
and from any thread.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading


def die_with_parent() -> None:
    """Wait until stdin ends, then kill the session; never returns."""
    while os.read(0, 4096):
        pass
    if os.getpgrp() == os.getpid():  # not the shell's, when run by hand
        os.killpg(0, signal.SIGKILL)
    os._exit(128 + signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=die_with_parent, daemon=True).start()

    runpy.run_module("compress", run_name="__main__", alter_sys=True)
