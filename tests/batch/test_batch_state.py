"""Records of jobs, and the table of them."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole

from compress.batch.document import exit_code
from compress.batch.engine import Outcome, Work
from compress.batch.state import Record, State, fingerprint
from compress.batch.table import Board, describe_phase, figures, last_line
from compress.console import Console
from compress.report.report import Report


def finish(
    state: State, name: str, verdict: str = "passed", stamp: int = 10**18, failure: str = ""
) -> None:
    """The files of a finished build that a batch reads."""
    folder = state.folder_of(name)
    folder.mkdir(parents=True, exist_ok=True)
    artifact = {"format": "gguf", "bytes": 2_000_000, "kl_divergence": {"mean": 0.03}}
    artifact |= {"type": "Q4_0", "failure": failure or None}
    document = {"schema_version": 1, "tool": {"version": "1"}, "model": {"source": "m"}}
    document |= {"baseline": {}, "verdict": verdict, "artifacts": [artifact]}
    (folder / "report.json").write_text(json.dumps(document))
    (folder / "SHA256SUMS").write_text("")
    os.utime(folder / "SHA256SUMS", ns=(stamp, stamp))


def test_a_job_from_start_to_end(tmp_path):
    state = State(tmp_path)
    assert state.read("m/r") is None
    state.begin("m/r", "f")
    begun = state.read("m/r")
    assert begun is not None
    assert (begun.status, begun.finished) == ("running", False)
    finish(state, "m/r", "failed")
    ended = state.end("m/r", "f", Outcome("m/r", 1, 3.0, 2.0, 500))
    assert ended == state.read("m/r")
    assert (ended.status, ended.fingerprint, ended.peak_memory) == ("failed", "f", 500)
    assert ended.finished


def test_exit_codes(tmp_path):
    state = State(tmp_path)
    found = {code: state.status_of(Outcome("m/r", code, 0.0)) for code in (2, -9, 130, 143, 0)}
    # Exit code 0 without a report counts as a failure.
    assert found == {2: "error", -9: "killed", 130: "interrupted", 143: "interrupted", 0: "error"}
    for verdict, status in (
        ("passed", "passed"),
        ("failed", "failed"),
        ("not verified", "written"),
    ):
        finish(state, "m/r", verdict)
        assert state.status_of(Outcome("m/r", 0, 0.0)) == status


def test_a_job_whose_end_nobody_noted(tmp_path):
    state = State(tmp_path)
    state.begin("m/r", "f")
    finish(state, "m/r")  # and then the batch was killed
    found = state.read("m/r")
    assert found is not None and found.status == "passed"
    state.begin("m/r", "g")  # done again, with other settings, over the old one
    found = state.read("m/r")
    assert found is not None and found.status == "running"
    finish(state, "m/r", stamp=10**18 + 1)
    found = state.read("m/r")
    assert found is not None and found.status == "passed"


REFUSED = "GGUF Q4_0 could not be run: too new"


def test_a_refused_artifact_has_a_report_and_a_reason(tmp_path):
    state = State(tmp_path)
    state.begin("m/r", "f")
    finish(state, "m/r", "failed", failure="too new")
    ended = state.end("m/r", "f", Outcome("m/r", 2, 3.0, error="the last line", hint="a hint"))
    assert ended == state.read("m/r")
    assert (ended.status, ended.error, ended.seconds) == ("error", REFUSED, 3.0)
    assert ended.reported and not ended.finished
    # Run again, and interrupted earlier: the existing output is of the first run.
    state.begin("m/r", "f")
    again = state.end("m/r", "f", Outcome("m/r", 2, 1.0, error="no room", hint="free some"))
    assert (again.status, again.error, again.hint) == ("error", "no room", "free some")
    assert not again.reported


def test_a_refused_artifact_whose_end_nobody_noted(tmp_path):
    state = State(tmp_path)
    state.begin("m/r", "f")
    finish(state, "m/r", "failed", failure="too new")  # and then the batch was killed
    found = state.read("m/r")
    assert found is not None and (found.status, found.error) == ("error", REFUSED)
    # Or its node was lost, and an engine that repeats the job finds it finished.
    state.begin("m/r", "f")
    ended = state.end("m/r", "f", Outcome("m/r", 1, 0.0))
    assert (ended.status, ended.error, ended.reported) == ("error", REFUSED, True)


def test_a_folder_that_was_taken_away_is_not_finished(tmp_path):
    state = State(tmp_path)
    state.write("m/r", Record("f", "passed"))
    assert state.read("m/r") is None


def test_a_record_that_cannot_be_read_is_none(tmp_path):
    state = State(tmp_path)
    path = state.file("m/r", "json")
    path.parent.mkdir(parents=True)
    for text in ("", "{", '{"other": 1}'):
        path.write_text(text)
        assert state.read("m/r") is None


def test_a_fingerprint_is_of_everything(tmp_path):
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


@dataclass
class Planned:
    name: str
    fingerprint: str = "f"
    error: str = ""
    hint: str = ""
    prediction: object = None


def test_the_table_shows_what_is_done_running_and_queued(tmp_path):
    state = State(tmp_path)
    jobs = [Planned("m/done"), Planned("m/bad", error="it is truncated"), Planned("m/runs"),
            Planned("m/waits")]  # fmt: skip
    board = Board(jobs, state, Console("quiet"), fail_fast=True)
    board.settle(jobs[1], None)
    assert board.wanted()  # a job that cannot be planned does not stop the batch
    for name in ("m/done", "m/runs"):
        board.started(Work(name, (), state.file(name, "log"), 1, 1, 1.0))
    finish(state, "m/done")
    board.settle(jobs[0], state.end("m/done", "f", Outcome("m/done", 0, 75.0)), fresh=True)
    line = {"phase": "write gguf", "done": 43, "total": 100, "unit": "bytes", "eta_s": 12.4}
    state.file("m/runs", "progress").write_text(f"{json.dumps(line)}\n{{half")
    console = RichConsole(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(board.table())
    text = console.export_text()
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert lines[0] == ["job", "result", "time", "size", "KL up to", "phase"]
    assert ["m/done", "passed", "1:15", "2.00 MB", "0.0300"] in lines
    assert ["m/bad", "could not run"] in lines and ["m/bad: it is truncated"] in lines
    (running,) = [line for line in lines if line[0] == "m/runs"]
    assert running[1] == "running" and running[3:] == ["write gguf", "43 %", "0:12 left"]
    assert ["m/waits", "queued"] in lines
    assert "2 of 4 done  1 passed  1 could not run  1 running  1 queued" in text
    board.settle(jobs[2], state.end("m/runs", "f", Outcome("m/runs", -9, 1.0)), fresh=True)
    assert not board.wanted()
    assert board.fresh == ["m/done", "m/runs"]


def test_a_batch_that_is_interrupted_is_not_one_that_passed(tmp_path):
    state = State(tmp_path)
    jobs = [Planned("m/fast"), Planned("m/slow"), Planned("m/waits")]
    board = Board(jobs, state, Console("quiet"), fail_fast=False)
    for name in ("m/fast", "m/slow"):
        board.started(Work(name, (), state.file(name, "log"), 1, 1, 1.0))
    finish(state, "m/fast")  # while the batch was ending
    board.interrupt()
    assert {name: record.status for name, record in board.records.items()} == {
        "m/fast": "passed",
        "m/slow": "interrupted",
    }
    assert exit_code({"passed": 1, "interrupted": 1, "not run": 1}) == 2
    assert exit_code({"not run": 3}) == 2
    assert exit_code({"passed": 1, "failed": 1, "not run": 1}) == 1  # --fail-fast
    assert exit_code({"passed": 1, "written": 1}) == 0


def test_the_last_whole_line_of_a_progress_file(tmp_path):
    path = tmp_path / "progress"
    assert describe_phase(last_line(path)) == "starting"
    path.write_text("")
    assert last_line(path) == {}
    path.write_text('{"phase": "plan", "total": null, "eta_s": null}\n')
    assert describe_phase(last_line(path)) == "plan"


def report_of(artifacts: list[dict[str, Any]]) -> Report:
    found = [{"type": "t", **artifact} for artifact in artifacts]
    parts: dict[str, Any] = {"tool": {"version": "1"}, "model": {"source": "m"}, "baseline": {}}
    return Report.from_dict({"schema_version": 1, **parts, "artifacts": found})


def test_size_and_worst_divergence_of_a_job():
    assert figures(None) == ("", "")
    artifacts: list[dict[str, Any]] = [
        {"format": "onnx", "bytes": 1000, "kl_divergence": None},
        {"format": "gguf", "bytes": 2000, "kl_divergence": {"mean": 0.5}},
    ]
    assert figures(report_of(artifacts)) == ("3.00 kB", "0.5000")


def test_paths(tmp_path):
    state = State(tmp_path)
    assert state.partial_of("m/r") == Path(tmp_path / "m" / "r.partial")
    assert state.file("m/r", "log") == tmp_path / ".batch" / "m" / "r.log"
