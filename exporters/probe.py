"""The child process of ``compress.verify``: opens one artifact in its runtime and measures it.

``python -m exporters.probe FORMAT PATH --baseline FOLDER --scores FILE --context N`` prints one
JSON object per line on stdout; whatever libraries say goes to stderr.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from compress.plan.shapes import Runtime
from compress.verify import BaselineStore, examine
from compress.verify.child import Emit, speak
from exporters import get_exporter


def main() -> int:
    """Parse the arguments, examine, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m exporters.probe", description=__doc__)
    parser.add_argument("format")
    parser.add_argument("path", type=Path)
    parser.add_argument("--baseline", type=Path, required=True)
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()

    def open_runtime() -> Runtime:
        exporter = get_exporter(options.format)
        return exporter.open_runtime(options.path, context=options.context, threads=options.threads)

    def work(emit: Emit) -> None:
        baseline = BaselineStore(options.baseline)
        examine(open_runtime, baseline, options.scores, options.context, emit)

    return speak(work)


if __name__ == "__main__":
    sys.exit(main())
