"""The process of one job: runs a ``packlight`` command, and ends when its parent does.

``python -m compress.batch.child build MODEL …`` runs in a session of its own, with a pipe for stdin
that nothing writes to. When the process at the other end ends, even by ``kill -9``, the pipe is
closed, and the job and its children are killed: nothing keeps writing into an output tree that the
next batch uses.
"""

from __future__ import annotations

import runpy

from compress.machine import die_with_parent

if __name__ == "__main__":
    die_with_parent()

    runpy.run_module("compress", run_name="__main__", alter_sys=True)
