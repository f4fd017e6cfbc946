"""Rates and the time left, on a clock that the test turns; the file for other programs."""

from __future__ import annotations

import io
import json

import pytest

from compress.console import Console, describe_progress
from compress.errors import UsageError
from compress.progress import Estimate, ProgressFile, Step, clock_time, leave_out


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(steps: list[Step], seconds: dict[str, float], until: float, startup: float = 0.0):
    """Work off a share of all units, one by one; the estimate, and what is really left."""
    clock = Clock()
    estimate = Estimate(steps, clock)
    clock.now += startup
    total, done = sum(step.units for step in steps), 0
    left = sum(step.units * seconds[step.kind] for step in steps)
    for step in steps:
        for _ in range(step.units):
            if done >= until * total:
                return estimate, left
            clock.now += seconds[step.kind]
            left -= seconds[step.kind]
            done += 1
            estimate.update(done, total)
    return estimate, left


def test_one_kind_of_work_is_a_rate():
    estimate, left = run([Step(1000)], {"": 0.5}, until=0.1)
    assert estimate.seconds_left == pytest.approx(left)
    estimate, _ = run([Step(1000)], {"": 0.5}, until=1.0)
    assert estimate.seconds_left == 0


def test_nothing_is_told_before_something_is_known():
    estimate = Estimate()
    assert estimate.seconds_left is None
    estimate.update(0, 10)
    assert estimate.seconds_left is None


def test_a_start_is_foretold_apart_from_the_units():
    clock = Clock()
    estimate = Estimate([Step(4, "window", 10.0)], clock, start=20)
    assert describe_progress(estimate, "windows") == "0:00  1:00 left"
    clock.now += 15
    assert estimate.seconds_left == 45
    clock.now += 15  # it takes longer than it should, which says nothing of the windows
    assert estimate.seconds_left == 40
    estimate.update(0, 4)  # loaded
    assert describe_progress(estimate, "windows") == "0/4 windows  0:40 left"
    clock.now += 20
    assert estimate.seconds_left == 20
    estimate.update(1, 4)  # twice as long as was expected: no start was in it
    assert estimate.seconds_left == pytest.approx(60)


def test_kinds_that_come_after_a_start_count_from_their_first_unit_on():
    clock = Clock()
    estimate = Estimate([Step(10, "read", 1.0), Step(90, "scored", 2.0)], clock, start=5)
    estimate.update(0, 100)
    clock.now += 30
    estimate.update(10, 100)
    assert estimate.seconds_left == pytest.approx(90 * 6, rel=0.3)  # by the pace of all ...
    clock.now += 10
    estimate.update(20, 100)
    assert estimate.seconds_left == pytest.approx(80 * 1, rel=0.2)  # ... and by their own


def test_steps_for_which_there_is_no_time():
    def steps(cost):
        return [Step(10, "read", cost), Step(40, "read", cost, until=20), Step(5, "scored", 10)]

    clock = Clock()
    assert Estimate(steps(0.1), clock, start=3).seconds_left == pytest.approx(3 + 5 + 50)
    estimate = Estimate(steps(1.0), clock, start=3)
    assert estimate.seconds_left == pytest.approx(3 + 20 + 50)  # 10 s, and 10 of 40
    estimate.update(0, 55)
    clock.now += 10
    estimate.update(10, 55)
    assert estimate.seconds_left == pytest.approx(10 + 50)
    clock.now += 10
    estimate.update(20, 25)  # the other 30 were left out
    assert (estimate.done, estimate.total) == (20, 25)
    assert estimate.seconds_left == pytest.approx(50)
    clock.now += 10
    estimate.update(21, 25)
    assert estimate.seconds_left == pytest.approx(40)


def test_what_must_be_done_is_not_left_out():
    steps = [Step(10, "a"), Step(20, "b", until=5.0), Step(30, "c")]
    assert leave_out(steps, 12, 18) == [steps[0], Step(2, "b", until=5.0), steps[2]]
    assert leave_out(steps, 10, 20) == [steps[0], steps[2]]
    assert leave_out(steps, 9, 3) is None
    assert leave_out(steps, 25, 6) is None
    assert leave_out(steps, 10, -5) is None  # more than was announced


def test_kinds_that_were_not_seen_go_by_what_was_expected():
    # The embedding first, on a grid that takes six times as long per byte, on a machine that is
    # four times as slow as when it was tried.
    steps = [Step(200, "Q6_K", 0.3), *(Step(60, "Q4_K", 0.05) for _ in range(30))]
    estimate, left = run(steps, {"Q6_K": 1.2, "Q4_K": 0.2}, until=0.1)
    assert estimate.seconds_left == pytest.approx(left, rel=0.3)
    plain, left = run([Step(2000)], {"": 1.2}, until=0.1)
    assert plain.seconds_left > 4 * (1800 * 0.2)  # which is what expectations are for


def test_wrong_expectations_are_corrected_by_what_is_seen():
    steps = [Step(50, kind, 1.0) for _ in range(20) for kind in ("a", "b")]
    estimate, left = run(steps, {"a": 1.0, "b": 9.0}, until=0.1)
    assert estimate.seconds_left == pytest.approx(left, rel=0.3)
    estimate, left = run(steps, {"a": 1.0, "b": 9.0}, until=0.5)
    assert estimate.seconds_left == pytest.approx(left, rel=0.1)


def test_a_small_tensor_that_takes_long_does_not_decide():
    steps = [*(Step(1, "float", 0.01) for _ in range(3)), Step(1000, "grid", 0.1)]
    clock = Clock()
    estimate = Estimate(steps, clock)
    for done in (1, 2, 3):
        clock.now += 0.5
        estimate.update(done, 1003)
    assert estimate.seconds_left == pytest.approx(100, rel=0.5)
    for done in (103, 203):
        clock.now += 10
        estimate.update(done, 1003)
    assert estimate.seconds_left == pytest.approx(80, rel=0.15)


def test_the_first_news_also_paid_for_the_start():
    estimate, left = run([Step(1000)], {"": 0.01}, until=0.1, startup=30)
    assert estimate.seconds_left == pytest.approx(left)


def test_what_was_written_before_says_nothing_of_the_rest():
    steps = [Step(500, "written", 0.0), Step(250, "a", 0.1), Step(250, "b", 0.1)]
    clock = Clock()
    estimate = Estimate(steps, clock)
    for done in range(1, 501):
        estimate.update(done, 1000)
    assert estimate.seconds_left == pytest.approx(50)
    for done in range(501, 601):
        clock.now += 0.2
        estimate.update(done, 1000)
    assert estimate.seconds_left == pytest.approx(80, rel=0.2)


def test_units_that_begin_after_a_start_of_their_own():
    clock = Clock()
    estimate = Estimate((), clock)
    clock.now += 100
    estimate.update(0, 8)
    assert estimate.seconds_left is None
    clock.now += 5
    estimate.update(1, 8)
    assert estimate.seconds_left == pytest.approx(35)


def test_work_that_is_paid_for_at_the_beginning_of_its_step():
    clock = Clock()
    steps = [Step(100, "block", paid_first=True) for _ in range(10)]
    estimate = Estimate(steps, clock)
    for block in range(3):
        clock.now += 10
        for part in (5, 60, 100):
            estimate.update(100 * block + part, 1000)
    assert estimate.seconds_left == pytest.approx(70)
    clock.now += 4  # no news, but time goes by
    assert estimate.seconds_left == pytest.approx(66)


def test_a_total_that_was_not_announced_counts_alike():
    clock = Clock()
    estimate = Estimate([Step(10, "a"), Step(10, "b", 9.0)], clock)
    for done in (10, 20, 30):
        clock.now += 10
        estimate.update(done, 100)
    assert estimate.seconds_left == pytest.approx(70)
    assert estimate.steps_done == (0, 1)


def test_what_a_person_is_told():
    estimate, _ = run([Step(50, "a"), Step(50, "a")], {"a": 2.0}, until=0.5)
    assert estimate.steps_done == (1, 2)
    assert (
        describe_progress(estimate, "bytes") == "50.00/100.00 B  1/2 tensors  0.0 MB/s  1:40 left"
    )
    assert describe_progress(estimate, "windows") == "50/100 windows  1:40 left"
    assert clock_time(3725) == "1:02:05"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_file_tells_begin_progress_and_end(tmp_path):
    path = tmp_path / "progress.jsonl"
    console = Console("json", progress_file=ProgressFile(path))
    console.begin("load")
    with console.progress("write", "bytes") as update:
        for done in range(10_000):
            update(done + 1, 10_000)
    console.abandon()
    told = lines(path)
    assert told[0] == {"phase": "load", "done": 0, "total": None, "unit": "", "eta_s": None}
    assert told[1] == {"phase": "load", "done": 0, "total": None, "unit": "", "eta_s": 0.0}
    assert told[2] == {"phase": "write", "done": 0, "total": None, "unit": "bytes", "eta_s": None}
    end = {"phase": "write", "done": 10_000, "total": 10_000, "unit": "bytes", "eta_s": 0.0}
    assert told[-1] == end
    assert len(told) < 10  # a few per second


def test_a_phase_that_fails_has_no_end(tmp_path):
    path = tmp_path / "progress.jsonl"
    console = Console("quiet", progress_file=ProgressFile(path))
    with pytest.raises(KeyError), console.progress("write") as update:
        update(5, 10)
        raise KeyError
    console.abandon()
    assert {line["eta_s"] for line in lines(path)} == {None}


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(UsageError, match="--progress-file: cannot write"):
        ProgressFile(tmp_path / "nowhere" / "progress.jsonl")


def test_phases_with_their_duration_in_verbose_talk(capsys):
    console = Console("human", verbose=True)
    console.begin("plan")
    with console.progress("write"):
        pass
    told = capsys.readouterr().err.splitlines()
    assert told == ["plan", "plan: 0:00", "write", "write: 0:00"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_phase_tensors_rate_and_time_left(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    console = Console("human")
    console.begin("load libraries")
    assert "load libraries" in terminal.getvalue()  # at once
    steps = [Step(2_000_000, "a"), Step(2_000_000, "b")]
    with console.progress("write gguf Q4_K_M", "bytes", steps) as update:
        update(2_000_000, 4_000_000)
        update(4_000_000, 4_000_000)
    shown = terminal.getvalue()
    assert "write gguf Q4_K_M" in shown
    assert "4.00/4.00 MB  2/2 tensors" in shown
    assert "MB/s" in shown
