"""Ctrl-C inside an import that drops it, inside a finalizer, and twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
START = """
import atexit, os, signal, sys, time
from compress import machine
machine.handle_signals()
atexit.register(machine.ignore_signals)

def send(number):
    os.kill(os.getpid(), number)
"""


def hear_all() -> None:
    """A suite in the background or under nohup ignores signals, and so would its children."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def run(tmp_path: Path, body: str) -> tuple[int, list[str]]:
    """Exit code and stdout of a program that sends itself signals with ``send``."""
    done = subprocess.run(
        [sys.executable, "-u", "-c", START + textwrap.dedent(body)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, preexec_fn=hear_all,
    )  # fmt: skip
    assert "Exception ignored" not in done.stderr
    return done.returncode, done.stdout.split()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_import_is_finished_before_the_interruption(tmp_path, number):
    # As transformers and coremltools do: any exception of an optional import is dropped.
    slow = f"from __main__ import send\nimport time\nsend({number})\ntime.sleep(0.2)\nwhole = 1\n"
    (tmp_path / "slow.py").write_text(slow)
    body = """
        try:
            try:
                import slow
            except BaseException:
                print("broken")
            time.sleep(600)
            print("lost")
        finally:
            print("imported", sys.modules["slow"].whole)
    """
    code, said = run(tmp_path, body)
    assert said == ["imported", "1"]
    assert code == (-signal.SIGINT if number == signal.SIGINT else 128 + number)


def test_an_interruption_lost_in_a_finalizer_comes_again(tmp_path):
    body = """
        class Slow:
            def __del__(self):
                send(signal.SIGTERM)

        Slow()
        time.sleep(600)
        print("lost")
    """
    assert run(tmp_path, body) == (143, [])


def test_a_second_ctrl_c_does_not_disturb_the_cleaning_up(tmp_path):
    body = """
        try:
            send(signal.SIGINT)
            time.sleep(600)
        finally:
            send(signal.SIGINT)
            send(signal.SIGTERM)
            time.sleep(0.2)  # an interruption that is lost would come again meanwhile
            print("cleaned")
    """
    assert run(tmp_path, body) == (-signal.SIGINT, ["cleaned"])


def test_what_nohup_ignores_stays_ignored(tmp_path):
    body = """
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        machine.handle_signals()
        send(signal.SIGHUP)
        time.sleep(0.2)
        print("done")
    """
    assert run(tmp_path, body) == (0, ["done"])
