"""The command line in processes that can be killed: one loads its libraries and forks for each
command line that it reads (a JSON list), so that a build starts at once.

Says the child's pid and, after another line, its exit status (-9: killed). What the child says goes
to the file named first.
"""

from __future__ import annotations

import json
import os
import sys

LIBRARIES = (
    "coremltools", "gguf", "numba", "onnx_ir", "onnxruntime", "tokenizers", "torch",
    "compress.pipeline", "compress.solvers.scale_search", "exporters.coreml.writer",
    "exporters.gguf.writer", "exporters.onnx.writer", "exporters.onnx.graph",
)  # fmt: skip


def main() -> None:

    from compress import cli, interrupts

    while line := sys.stdin.readline():
        log, *arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            os.dup2(2, 1)
            interrupts.install()
            code = 3
            try:
                code = cli.run(arguments)
            finally:
                os._exit(code)
        print(child, flush=True)
        sys.stdin.readline()  # until then the pid is the child's own, even if it has ended
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


main()
