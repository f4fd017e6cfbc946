"""Running `packlight` as a person does: in a process of its own, from some other folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def packlight(
    *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """The finished command, with its exit code, stdout and stderr."""
    return subprocess.run(
        [sys.executable, "-m", "compress", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "NO_COLOR": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=240,
        **options,
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """stderr of a command that could not run: one `error:` line, perhaps one `hint:` line."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    errors = [line for line in lines if line.startswith(("error: ", "Error: "))]
    assert len(errors) == 1, done.stderr
    return done.stderr
