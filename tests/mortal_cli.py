"""The command line in processes that can be killed: one loads its libraries and forks for each
command line that it reads (a JSON list), so that a build starts at once.

Says the child's pid, then its exit status (-9: killed). Its stderr goes to the file named first.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    import coremltools
    import gguf
    import numba
    import onnx_ir
    import onnxruntime
    import tokenizers
    import torch
    import transformers

    from compress import cli, interrupts, pipeline
    from compress.solvers import scale_search
    from exporters import SHIPYARD

    for line in sys.stdin:
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
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


main()
