"""Scratch folders: gone at the end, and after kill -9 at the next start."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from compress.output.scratch import scratch_folder

HOLD = """
import sys, time
from pathlib import Path
from compress.output.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "logits").write_text("many")
    print("ready", flush=True)
    time.sleep(100)
"""


def test_it_is_empty_and_gone_at_the_end(tmp_path):
    with scratch_folder(tmp_path) as folder:
        assert list(folder.iterdir()) == []
        (folder / "logits").write_text("many")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), scratch_folder(tmp_path):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_what_the_next_one_clears(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as living:
        assert living.stdout is not None
        assert living.stdout.readline() == "ready\n"
        with scratch_folder(tmp_path):
            held = [path for path in tmp_path.rglob("logits")]
            assert len(held) == 1  # a living process keeps its own
        living.send_signal(signal.SIGKILL)
        living.wait()
    assert held[0].exists()
    with scratch_folder(tmp_path):
        assert not held[0].exists()
    assert list(tmp_path.iterdir()) == []
