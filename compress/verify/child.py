"""A child process that reports to its parent, one JSON object per line.

An artifact runs in a process of its own for two reasons: llama.cpp and other native code end the
whole process (``abort``) on an invalid file, and only in a process that holds nothing else is the
peak memory that of the artifact.

The child writes to a copy of its stdout and redirects stdout itself to stderr, so that output of
native libraries is not mistaken for an event.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from compress import errors
from compress.errors import ArtifactError, PacklightError
from compress.machine import die_with_parent

Event = dict[str, Any]
Emit = Callable[[Event], None]
Ask = Callable[[Event], int]
"""``ask(event)``: emits an event and returns the number that the parent answers."""
POLL = 0.2  # seconds between two looks at ``stop``
SILENCE = 1800.0  # seconds without an event after which a child counts as hung


def run_child(
    command: Sequence[str],
    what: str,
    *,
    silence: float = SILENCE,
    stop: threading.Event | None = None,
) -> Generator[Event, int | None, None]:
    """Run a command and yield its events; the child is ended with the iterator.

    A number that is sent into the generator is the answer to the event before it.

    Args:
        command: program and arguments.
        what: names the artifact in error messages.
        silence: seconds without an event after which the child is ended.
        stop: ends the child when it is set, within ``POLL`` seconds.

    Raises:
        ArtifactError: it crashed, was killed, hung, or ended without a result; with its stage and
            the last line of its stderr. An error of ``compress.errors`` in the child is raised
            with its own class.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # closed when this process ends, which ends the child
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment(),
    )
    assert process.stdin and process.stdout and process.stderr
    lines: queue.Queue[str | None] = queue.Queue()
    messages: deque[str] = deque(maxlen=20)
    stdout_reader = threading.Thread(target=pump, args=(process.stdout, lines.put), daemon=True)
    stderr_reader = threading.Thread(
        target=pump, args=(process.stderr, messages.append), daemon=True
    )
    stage = "starting"
    try:
        stdout_reader.start()
        stderr_reader.start()
        last = time.monotonic()
        while True:
            try:
                line = lines.get(timeout=min(POLL, silence))
            except queue.Empty:
                if stop is not None and stop.is_set():
                    raise ArtifactError(f"{what}: ended with the others") from None
                if time.monotonic() < last + silence:
                    continue
                raise ArtifactError(
                    f"{what}: no sign of life for {silence:g} s while {stage}"
                ) from None
            last = time.monotonic()
            if line is None:
                break
            event: Event = json.loads(line)
            if "error" in event:
                kind = getattr(errors, event["error"], ArtifactError)
                raise kind(event["message"], event["hint"])
            stage = event.get("stage", stage)
            answer = yield event
            if answer is not None:
                last = time.monotonic()
                with suppress(BrokenPipeError):  # how it ended is told below
                    process.stdin.write(f"{answer}\n")
                    process.stdin.flush()
        code = process.wait()
        if code:
            stderr_reader.join(timeout=5)
            raise ArtifactError(f"{what}: {how_it_ended(code)} while {stage}{last_of(messages)}")
    finally:
        process.kill()
        process.wait()
        stderr_reader.join(timeout=5)
        stdout_reader.join(timeout=5)
        process.stdin.close()
        process.stdout.close()
        process.stderr.close()


def pump(stream: IO[str], take: Callable[[str | None], None]) -> None:
    """Call ``take`` with each line until the stream ends, then with None."""
    for line in stream:
        take(line.rstrip("\n"))
    take(None)


def how_it_ended(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"its process ended with status {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    out_of_memory = " (out of memory?)" if name == "SIGKILL" else ""
    return f"its runtime crashed with {name}{out_of_memory}"


def last_of(messages: Sequence[str | None]) -> str:
    """The last line that is not blank, for an error message."""
    texts = [line.strip() for line in messages if line and line.strip()]
    return f": {texts[-1][:300]}" if texts else ""


def environment() -> Mapping[str, str]:
    """This process's environment, with ``compress``'s folder on the path (for a bare checkout)."""
    root = Path(__file__).resolve().parents[2]
    if root.name in ("site-packages", "dist-packages"):
        return os.environ
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run_as_child(main: Callable[[Emit, Ask], None]) -> int:
    """Run ``main(emit, ask)`` in the child process and end it with its parent; a
    ``PacklightError`` is sent as an event.

    Returns:
        The exit status; other exceptions pass, their traceback's last line is the message.
    """
    answers: queue.Queue[bytes] = queue.Queue()
    die_with_parent(answers.put)
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as events:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

        def emit(event: Event) -> None:
            events.write(json.dumps(event) + "\n")
            events.flush()

        def ask(event: Event) -> int:
            emit(event)
            return int(answers.get())

        try:
            main(emit, ask)
        except PacklightError as error:
            emit({"error": type(error).__name__, "message": error.message, "hint": error.hint})
            return error.exit_code
        return 0
