"""Records of jobs: one small file for each, in ``.batch`` of the output tree.

A record is written atomically when a job starts and again when it ends. A record that is
``running`` when a batch starts is of a batch that was killed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compress.batch.engine import Outcome
from compress.decoder.config_json import json_or_empty
from compress.errors import ArtifactError
from compress.files import write_whole
from compress.report.report import Report
from compress.report.words import REFUSED_HINT, refusal

__all__ = ["Record", "State", "fingerprint", "stamp"]

FINISHED = ("passed", "failed", "written")
STATE = ".batch"


@dataclass(frozen=True)
class Record:
    """The status and figures of a job.

    Attributes:
        fingerprint: of checkpoint, recipe, options and version.
        status: ``running``; ``passed``, ``failed`` (a gate) or ``written`` (not verified);
            ``error`` (it could not run); ``killed``; ``interrupted``.
        error, hint: its messages.
        seconds, cpu_seconds, peak_memory: measured; 0 where unknown.
        replaces: time stamp of the finished folder that was there when it started; 0 for none.
        refused: whether it is an ``error`` only because a runtime refused an artifact: its folder
            and report exist, and ``error`` has the reason for each artifact.
    """

    fingerprint: str
    status: str
    error: str = ""
    hint: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_memory: int = 0
    replaces: int = 0
    refused: bool = False

    @property
    def finished(self) -> bool:
        """Whether its artifacts exist, and nothing is left to do."""
        return self.status in FINISHED

    @property
    def reported(self) -> bool:
        """Whether the folder and the report were made by this job."""
        return self.finished or self.refused


class State:
    """The records, logs and progress files of one output tree."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output / STATE

    def folder_of(self, name: str) -> Path:
        """The folder of a job's artifacts."""
        return self.output / name

    def partial_of(self, name: str) -> Path:
        """The work folder of a job's unfinished build."""
        folder = self.folder_of(name)
        return folder.with_name(f"{folder.name}.partial")

    def baselines(self, model: str) -> Path:
        """The folder of a model's baseline while it has jobs."""
        return self.folder / model / "baselines"

    def file(self, name: str, kind: str) -> Path:
        """Path of ``NAME.json``, ``NAME.log`` or ``NAME.progress``."""
        return self.folder / f"{name}.{kind}"

    def read(self, name: str) -> Record | None:
        """The record of a job; None where it is missing or unreadable.

        A job that finished before its end was recorded counts as finished: its folder is renamed
        atomically.
        """
        record = self.written(name)
        if record is None:
            return None
        if record.status == "running" and self.has_new(name, record):
            return self.ended(name, record.fingerprint)
        if record.finished and not self.stamp(name):  # its folder was removed since
            return None
        return record

    def written(self, name: str) -> Record | None:
        """The record of a job, unchanged from its file."""
        try:
            return Record(**json_or_empty(self.file(name, "json")))
        except TypeError:
            return None

    def has_new(self, name: str, begun: Record) -> bool:
        """Whether a job's folder was made after it started."""
        return self.stamp(name) not in (0, begun.replaces)

    def ended(self, name: str, fingerprint: str) -> Record:
        """The record of a job with a finished folder, from its report."""
        if refused := refusals(self.report(name)):
            return Record(fingerprint, "error", "; ".join(refused), REFUSED_HINT, refused=True)
        return Record(fingerprint, self.verdict(name))

    def write(self, name: str, record: Record) -> None:
        """Write the record of a job."""
        path = self.file(name, "json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(record), indent=1))

    def begin(self, name: str, fingerprint: str) -> None:
        """Record that a job starts, or is restarted by an engine."""
        begun, replaces = self.written(name), self.stamp(name)
        if begun and begun.status == "running" and begun.fingerprint == fingerprint:
            replaces = begun.replaces
        self.write(name, Record(fingerprint, "running", replaces=replaces))

    def end(self, name: str, fingerprint: str, outcome: Outcome) -> Record:
        """Record a job's outcome."""
        begun, status = self.written(name), self.status_of(outcome)
        record = Record(fingerprint, status, outcome.error, outcome.hint)
        if status == "error" and begun and self.has_new(name, begun):
            made = self.ended(name, fingerprint)
            record = made if made.refused else record
        record = replace(
            record,
            seconds=round(outcome.seconds, 2),
            cpu_seconds=round(outcome.cpu_seconds, 2),
            peak_memory=outcome.peak_memory,
        )
        self.write(name, record)
        return record

    def status_of(self, outcome: Outcome) -> str:
        """The status for an outcome's exit code."""
        if outcome.code in (0, 1):
            return self.verdict(outcome.name)
        if outcome.code in (129, 130, 143):  # SIGHUP, SIGINT, SIGTERM, after cleaning up
            return "interrupted"
        return "killed" if outcome.code < 0 else "error"

    def verdict(self, name: str) -> str:
        """The status of a finished job, from its report's verdict."""
        if refusals(self.report(name)):
            return "error"
        report = self.report(name)
        words = {"passed": "passed", "failed": "failed", "not verified": "written"}
        return words[report.verdict] if report else "error"

    def report(self, name: str) -> Report | None:
        """``report.json`` of a finished job; None where there is none."""
        try:
            return Report.load(self.folder_of(name) / "report.json")
        except ArtifactError:
            return None

    def stamp(self, name: str) -> int:
        """``stamp`` of a job's folder."""
        return stamp(self.folder_of(name))


def stamp(folder: Path) -> int:
    """Modification time of a finished folder in nanoseconds; 0 where there is none."""
    try:
        return (folder / "SHA256SUMS").stat().st_mtime_ns
    except OSError:
        return 0


def refusals(report: Report | None) -> list[str]:
    """The failures of a report's artifacts that could not be run."""
    artifacts = report.artifacts if report else ()
    return [refusal(artifact) for artifact in artifacts if artifact.failure]


def fingerprint(document: Mapping[str, Any]) -> str:
    """A short hash of everything that determines a job's result."""
    text = json.dumps(document, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
