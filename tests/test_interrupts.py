"""Ctrl-C at the worst moments: inside an import that swallows it, inside a finalizer, twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
START = """
import atexit, time
from compress import machine
machine.handle_signals()
atexit.register(machine.ignore_signals)
"""


def hear_all() -> None:
    """A suite in the background or under nohup ignores signals, and so would its children."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def interrupted(tmp_path: Path, body: str, *signals: int) -> tuple[int, list[str]]:
    """Exit code and stdout of a program that says "ready" and is sent signals then."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", START + textwrap.dedent(body)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_all,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    for number in signals:
        process.send_signal(number)
        time.sleep(0.1)
    said, complaints = process.communicate(timeout=30)
    assert "Exception ignored" not in complaints
    return process.returncode, said.split()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_import_is_finished_before_the_interruption(tmp_path, number):
    # As transformers and coremltools do: whatever comes out of an optional import is dropped.
    (tmp_path / "slow.py").write_text("import time\nprint('ready')\ntime.sleep(0.5)\nwhole = 1\n")
    body = """
        try:
            import slow
        except BaseException:
            print("broken")
        print("imported", slow.whole)
        time.sleep(20)
        print("lost")
    """
    code, said = interrupted(tmp_path, body, number)
    assert said == ["imported", "1"]
    assert code == (-signal.SIGINT if number == signal.SIGINT else 128 + number)


def test_an_interruption_lost_in_a_finalizer_comes_again(tmp_path):
    body = """
        class Slow:
            def __del__(self):
                print("ready")
                time.sleep(0.5)

        Slow()
        time.sleep(20)
        print("lost")
    """
    code, said = interrupted(tmp_path, body, signal.SIGTERM)
    assert (code, said) == (143, [])


def test_a_second_ctrl_c_does_not_disturb_the_cleaning_up(tmp_path):
    body = """
        try:
            print("ready")
            time.sleep(20)
        finally:
            time.sleep(0.5)
            print("cleaned")
    """
    code, said = interrupted(tmp_path, body, signal.SIGINT, signal.SIGINT, signal.SIGTERM)
    assert (code, said) == (-signal.SIGINT, ["cleaned"])


def test_what_nohup_ignores_stays_ignored(tmp_path):
    body = """
        import signal
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        machine.handle_signals()
        print("ready")
        time.sleep(0.3)
        print("done")
    """
    assert interrupted(tmp_path, body, signal.SIGHUP) == (0, ["done"])
