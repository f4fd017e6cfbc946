"""The child process of ``compress.harness``: one artifact in its runtime answers requests.

``python -m exporters.answer FORMAT PATH --requests FILE --context N --tokenizer FOLDER`` prints one
JSON object per line on stdout: ``runtime``, ``done`` (requests), and last ``answers``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import exporters  # noqa: F401 -- fills the table of formats
from compress.errors import ArtifactError, reading
from compress.formats import get_format
from compress.harness.answers import Cursor, Prompt, generate, score
from compress.verify import EVERY, Throttled
from compress.verify.child import Ask, Emit, run_as_child
from compress.verify.tasks import Request


def main() -> int:
    """Parse the arguments, answer, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m exporters.answer", description=__doc__)
    parser.add_argument("format")
    parser.add_argument("path", type=Path)
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()

    def work(emit: Emit, ask: Ask) -> None:  # it asks for nothing
        asked = json.loads(options.requests.read_text(encoding="utf-8"))
        events = Throttled(emit, EVERY)
        emit({"stage": "loading"})
        open_runtime = get_format(options.format).open_runtime
        with reading(options.path.name):
            runtime = open_runtime(options.path, context=options.context, threads=options.threads)
        try:
            if runtime.vocab_size != asked["vocab_size"]:
                rows = f"{runtime.vocab_size} tokens, the float model {asked['vocab_size']}"
                raise ArtifactError(f"the artifact has {rows}")
            emit({"runtime": runtime.name, "stage": "answering"})

            def progress(done: int, total: int) -> None:
                events.emit({"done": done, "total": total})

            if "ends" in asked:
                from compress.decoder.tokenizer import Tokenizer

                decode = Tokenizer(options.tokenizer, asked["vocab_size"]).decode
                prompts = [Prompt(*prompt) for prompt in asked["prompts"]]
                made = generate(prompts, runtime, set(asked["ends"]), decode, progress)
                emit({"answers": made})
            else:
                requests = [Request(*request) for request in asked["requests"]]
                emit({"answers": score(requests, Cursor(runtime).rows, progress)})
        finally:
            runtime.close()

    return run_as_child(work)


if __name__ == "__main__":
    sys.exit(main())
