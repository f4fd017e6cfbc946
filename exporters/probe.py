"""The child process of ``compress.verify``: opens one artifact in its runtime and measures it.

``python -m exporters.probe FORMAT PATH --baseline FOLDER --scores FILE --context N`` prints one
JSON object per line on stdout; output of libraries goes to stderr.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import exporters  # noqa: F401 -- fills the table of formats
from compress.errors import reading
from compress.formats import get_format
from compress.plan.shapes import Runtime
from compress.verify import BaselineStore, examine
from compress.verify.child import Ask, Emit, run_as_child


def main() -> int:
    """Parse the arguments, examine, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m exporters.probe", description=__doc__)
    parser.add_argument("format")
    parser.add_argument("path", type=Path)
    parser.add_argument("--baseline", type=Path, required=True)
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--scoring-threads", type=int, default=0)
    options = parser.parse_args()

    def opened() -> Runtime:
        open_runtime = get_format(options.format).open_runtime
        with reading(options.path.name):
            return open_runtime(options.path, context=options.context, threads=options.threads)

    def work(emit: Emit, ask: Ask) -> None:
        baseline = BaselineStore(options.baseline)
        examine(
            opened,
            baseline,
            options.scores,
            options.context,
            emit,
            ask,
            scoring_threads=options.scoring_threads,
            parity=get_format(options.format).app,
        )

    return run_as_child(work)


if __name__ == "__main__":
    sys.exit(main())
