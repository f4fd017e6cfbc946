"""The process of one job: runs a ``packlight`` command, and ends when its parent does.

``python -m compress.batch.child build MODEL …`` in a session of its own, with a pipe for stdin that
nothing writes to. When the process at the other end is gone, however it went (``kill -9`` too), the
pipe ends, and the job with everything that it started is killed: nothing goes on writing into an
output tree that the next batch takes up.
"""

from __future__ import annotations

import runpy

from compress.machine import die_with_parent

if __name__ == "__main__":
    die_with_parent()

    runpy.run_module("compress", run_name="__main__", alter_sys=True)
