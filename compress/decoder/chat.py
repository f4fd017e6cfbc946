"""Renders chat templates as Hugging Face does, in a child process with resource limits.

A template is a program that comes with the checkpoint. jinja2's sandbox denies it files and Python
internals, but not endless loops or all of the memory; the process limits do.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from compress.decoder import chat_server
from compress.decoder.chat_server import CPU_SECONDS, MEMORY
from compress.errors import CheckpointError

__all__ = ["ChatTemplate"]

LONGEST_TEMPLATE = 1_000_000  # characters


class ChatTemplate:
    """A chat template and the special tokens that it may use.

    The process starts with the first chat and ends with the object.
    """

    def __init__(
        self, template: str, tokens: Mapping[str, Any], *, seconds: int = CPU_SECONDS
    ) -> None:
        """
        Raises:
            CheckpointError: the template is longer than ``LONGEST_TEMPLATE``.
        """
        if len(template) > LONGEST_TEMPLATE:
            raise CheckpointError(
                f"the chat template has {len(template):,} characters; up to {LONGEST_TEMPLATE:,} "
                "are rendered"
            )
        self._head = json.dumps([template, dict(tokens), seconds])
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """Render a chat to text.

        Raises:
            CheckpointError: the template fails on it, or exceeds a limit.
        """
        process, first = self._process, self._process is None
        if process is None:
            process = self._process = subprocess.Popen(
                [sys.executable, "-P", chat_server.__file__],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            weakref.finalize(self, end, process)
        assert process.stdin is not None and process.stdout is not None
        try:
            if first:
                process.stdin.write(f"{self._head}\n")
            process.stdin.write(json.dumps([list(map(dict, messages)), add_generation_prompt]))
            process.stdin.write("\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # read below: it has ended
        answer = process.stdout.readline()
        if not answer:
            self._process = None
            raise CheckpointError(
                f"the chat template failed: {why_it_died(process.wait(), self._seconds)}"
            )
        text, error = json.loads(answer)
        if error:
            raise CheckpointError(f"the chat template failed: {error}")
        return str(text)


def end(process: subprocess.Popen[str]) -> None:
    """End a process that waits for its next chat, and close its pipes."""
    process.kill()
    process.communicate()


def why_it_died(status: int, seconds: int) -> str:
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"one chat takes more than {seconds} CPU seconds"
    return f"it takes more than {MEMORY >> 20} MiB, or its process ended with {status}"
