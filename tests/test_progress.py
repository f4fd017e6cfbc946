"""Rates and the time left, on a simulated clock; the progress file."""

from __future__ import annotations

import io
import json
import os

import pytest

from compress import progress
from compress.console import Console
from compress.errors import UsageError
from compress.progress import Phase, ProgressFile, Rate, clock_time, describe_progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_steady_work_has_one_rate():
    clock = Clock()
    rate = Rate(clock)
    for done in range(1, 101):
        clock.now += 0.5
        rate.update(done, 1000)
    assert rate.per_second == pytest.approx(2)
    assert rate.seconds_left == pytest.approx(450)
    clock.now += 4  # no event, but time passes
    assert rate.seconds_left == pytest.approx(446)
    clock.now += 1000
    assert rate.seconds_left == 0


def test_no_rate_before_something_was_measured():
    clock = Clock()
    rate = Rate(clock)
    assert rate.per_second is None and rate.seconds_left is None
    clock.now += 5
    rate.update(0, 10)
    clock.now += 5
    assert rate.per_second is None and rate.seconds_left is None


def test_what_comes_before_the_first_unit_is_not_in_the_rate():
    clock = Clock()
    rate = Rate(clock)
    clock.now += 100  # loading
    rate.update(0, 2048)
    clock.now += 8
    rate.update(512, 2048)  # one window
    assert rate.per_second == 64
    assert rate.seconds_left == 24
    assert rate.seconds == 108


def test_what_was_written_before_leaves_the_rate():
    clock = Clock()
    rate = Rate(clock)
    for done in range(100, 600, 100):
        clock.now += 0.01
        rate.update(done, 1000)
    clock.now += 10
    rate.update(520, 1000)
    assert rate.seconds_left == pytest.approx(480 / 2, rel=0.01)


def test_bursts_even_out():
    """Blocks of 100 units that are solved for 100 seconds and then written in one."""
    clock = Clock()
    rate = Rate(clock)
    for block in range(1, 7):
        clock.now += 99
        for part in range(10):
            clock.now += 0.1
            rate.update(100 * (block - 1) + 10 * (part + 1), 1000)
        assert rate.seconds_left == pytest.approx(1000 - 100 * block, rel=0.01)


def test_a_slow_beginning_is_forgotten():
    clock = Clock()
    rate = Rate(clock)
    for done in range(1, 201):
        clock.now += 10.0 if done <= 10 else 1.0
        rate.update(done, 300)
    assert rate.seconds_left == pytest.approx(100)


def test_few_samples_are_kept():
    clock = Clock()
    rate = Rate(clock)
    for done in range(1, 100_001):
        clock.now += 0.001
        rate.update(done, 100_000)
    assert len(rate._samples) < 100 / progress.EVERY
    assert rate.per_second == pytest.approx(1000, rel=0.01)


@pytest.mark.parametrize(
    ("unit", "done", "total", "text"),
    [
        ("bytes", 50_000_000, 400_000_000, "50.00/400.00 MB  5.0 MB/s  1:10 left"),
        ("windows", 5, 10, "5/10 windows  0.50 windows/s  0:10 left"),
        ("tokens", 2048, 4096, "2048/4096 tokens  205 tokens/s  0:10 left"),
        ("tokens", 4096, 4096, "4096/4096 tokens  410 tokens/s"),
        ("tokens", 0, 4096, "0/4096 tokens"),
        ("steps", 0, 0, "0:10"),
    ],
)
def test_done_rate_and_time_left_in_words(unit, done, total, text):
    clock = Clock()
    rate = Rate(clock)
    clock.now += 10
    if total:
        rate.update(done, total)
    assert describe_progress(rate, unit) == text


def test_times_as_a_clock_shows_them():
    assert [clock_time(seconds) for seconds in (7, 760, 3725)] == ["0:07", "12:40", "1:02:05"]


def test_without_a_terminal_a_line_once_a_minute():
    clock, lines = Clock(), list[str]()
    phase = Phase("calibrate", "windows", None, lines.append, bar=False, clock=clock)
    for done in range(1, 13):
        clock.now += 12
        phase.update(done, 12)
    assert lines == [
        "calibrate: 5/12 windows  0.08 windows/s  1:24 left",
        "calibrate: 10/12 windows  0.08 windows/s  0:24 left",
    ]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_file_has_begin_progress_and_end(tmp_path):
    path = tmp_path / "progress.jsonl"
    console = Console("json", listener=ProgressFile(path))
    console.begin("load")
    with console.progress("write", "bytes") as update:
        for done in range(10_000):
            update(done + 1, 10_000)
    console.abandon()
    found = lines(path)
    assert found[0] == {"phase": "load", "done": 0, "total": None, "unit": "", "eta_s": None}
    assert found[1] == {"phase": "load", "done": 0, "total": None, "unit": "", "eta_s": 0.0}
    assert found[2] == {"phase": "write", "done": 0, "total": None, "unit": "bytes", "eta_s": None}
    end = {"phase": "write", "done": 10_000, "total": 10_000, "unit": "bytes", "eta_s": 0.0}
    assert found[-1] == end
    assert len(found) < 10  # a few per second


def test_a_phase_that_fails_has_no_end(tmp_path):
    path = tmp_path / "progress.jsonl"
    console = Console("quiet", listener=ProgressFile(path))
    with pytest.raises(KeyError), console.progress("write") as update:
        update(5, 10)
        raise KeyError
    console.abandon()
    assert {line["eta_s"] for line in lines(path)} == {None}


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(UsageError, match="--progress-file: cannot write"):
        ProgressFile(tmp_path / "nowhere" / "progress.jsonl")


def test_a_file_of_another_kind_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UsageError, match="is a file of another kind"):
        ProgressFile(tmp_path / "config.json")
    file = ProgressFile(tmp_path / "progress.jsonl")
    file.write("load", "bytes", Rate(), begun=True)
    file.close()
    ProgressFile(tmp_path / "progress.jsonl").close()  # appended to


def test_a_pipe_that_nobody_reads_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="--progress-file: cannot write"):
        ProgressFile(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    file = ProgressFile(tmp_path / "pipe")
    file.write("load", "bytes", Rate(), begun=True)
    assert json.loads(os.read(reader, 1000))["phase"] == "load"
    file.close()
    os.close(reader)


def test_phases_with_their_duration_in_verbose_talk(capsys):
    console = Console("human", verbose=True)
    console.begin("plan")
    with console.progress("write"):
        pass
    found = capsys.readouterr().err.splitlines()
    assert found == ["plan", "plan: 0:00", "write", "write: 0:00"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_phase_bytes_and_rate(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    console = Console("human")
    console.begin("load libraries")
    assert "load libraries" in terminal.getvalue()  # at once
    with console.progress("write gguf Q4_K_M", "bytes") as update:
        update(2_000_000, 4_000_000)
        update(4_000_000, 4_000_000)
    shown = terminal.getvalue()
    assert "write gguf Q4_K_M" in shown
    assert "4.00/4.00 MB" in shown
    assert "MB/s" in shown
