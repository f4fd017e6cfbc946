"""Files for a CI job beside the build's own: JUnit XML of the gates, a summary in Markdown."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import UsageError
from compress.output.folder import real_path
from compress.report.junit import junit_xml
from compress.report.summary import markdown_summary

__all__ = ["CiFiles"]


@dataclass(frozen=True)
class CiFiles:
    """Where ``--junit`` and ``--summary`` want their files; None for none.

    Attributes:
        junit: replaced.
        summary: appended to, as CI systems want it of ``$GITHUB_STEP_SUMMARY``.
    """

    junit: Path | None = None
    summary: Path | None = None

    def check(self, output: Path | None = None) -> None:
        """Refuse, before the hours of a build, places where nothing can be written after them.

        Raises:
            UsageError: a folder that is not there or not writable, a folder in place of a file, or
                a file inside the output, which holds what was checksummed and nothing else.
        """
        for option, path in (("--junit", self.junit), ("--summary", self.summary)):
            if path is None:
                continue
            place = real_path(path)
            if output is not None and place.is_relative_to(real_path(output)):
                raise UsageError(
                    f"{option} {path} is inside the output {output}",
                    hint=f"beside it, such as {option} {path.name}",
                )
            if place.is_dir():
                raise UsageError(f"{option} {path} is a folder, not a file")
            if not place.parent.is_dir():
                raise UsageError(f"{option} {path}: there is no folder {path.parent}")
            if not os.access(place if place.exists() else place.parent, os.W_OK):
                raise UsageError(f"{option} {path} is not writable")

    def write(self, report: Mapping[str, Any]) -> None:
        """Write what was asked for of one report, whatever the verdict."""
        self.write_all({report["model"]["name"]: report}, {}, markdown_summary(report))

    def write_all(
        self, reports: Mapping[str, Mapping[str, Any]], errors: Mapping[str, str], summary: str
    ) -> None:
        """The same for several builds.

        Args:
            reports, errors: see ``junit_xml``.
            summary: Markdown.
        """
        if self.junit is not None:
            self.junit.write_bytes(junit_xml(reports, errors))
        if self.summary is not None:
            with self.summary.open("a", encoding="utf-8") as stream:
                stream.write(f"{summary}\n")
