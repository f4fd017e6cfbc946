"""Sends a signal at a step of a program, since a time would depend on the machine's load."""

from __future__ import annotations

import itertools
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

CHANGES = {
    "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link",
    "shutil.rmtree", "subprocess.Popen",
}  # fmt: skip
"""Audit events that are steps: changes of the file system (``open`` only for writing), and starts
of processes."""


def send_at(
    pattern: str,
    count: int,
    number: int,
    to: str,
    counted: Callable[[int], None] = lambda steps: None,
) -> None:
    """Send a signal before this process's ``count``-th step that matches; 0 for none.

    Args:
        pattern: searched in the audit event and its arguments,
            ``open ('/…/onnx.ledger', 'ab', 524289)``.
        number: of the signal.
        to: ``group`` (this process and its children, as from a terminal), ``itself``, or
            ``parent``, whose reaction is then waited for.
        counted: called with the number of each matching step.
    """
    numbers = itertools.count(1)
    matches = re.compile(pattern).search

    def look(event: str, details: tuple[Any, ...]) -> None:
        if event not in CHANGES:
            return
        if event == "open" and not (details[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if matches(f"{event} {details}"):
            this = next(numbers)
            counted(this)
            if this == count:
                send(number, to)

    sys.addaudithook(look)


def send(number: int, to: str) -> None:
    if to == "group":
        os.killpg(0, number)
    elif to == "itself":
        os.kill(os.getpid(), number)
    else:
        os.kill(os.getppid(), number)
        while True:
            time.sleep(1)
