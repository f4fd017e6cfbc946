"""The output tree: a folder, or a URL. With a URL a job builds on a local disk and its folder is
copied there.

The batch's machine then has records, reports and checksums, not the artifacts. Object stores have
no rename: ``SHA256SUMS`` is copied last, and a folder without it is not finished.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from compress.batch.engine import Engine, Outcome, Watch, Work, run_work
from compress.batch.state import stamp
from compress.checkpoint.remote import at_store, fingerprint_text, open_url, read_text
from compress.errors import ArtifactError, PacklightError, UsageError
from compress.files import cache_folder, is_url
from compress.output.checksums import NAME as SUMS
from compress.output.checksums import parse_checksums, read_checksums, refuse_links
from compress.plan.job import model_name

__all__ = ["CopyingEngine", "OutputTree", "fetch_records", "publish", "read_sums", "run_and_copy"]

# Files of a finished job that a batch reads; the last one marks it as finished.
RECORDS = ("report.json", "report.html", "README.md", "plan.json", "recipe.yaml", SUMS)


@dataclass(frozen=True)
class OutputTree:
    """The location of the output tree.

    Attributes:
        folder: on this machine, or on shared storage.
        url: that finished jobs are copied to; ``folder`` then has only their reports and
            checksums. Empty for a tree that is a folder.
    """

    folder: Path
    url: str = ""

    @classmethod
    def at(cls, place: str) -> OutputTree:
        """The tree at a folder or a URL."""
        if not is_url(place):
            return cls(Path(place).resolve())
        name = f"{model_name(place)}-{fingerprint_text(place)[:12]}"
        return cls(cache_folder("batch") / "trees" / name, place.rstrip("/"))


class CopyingEngine:
    """A local engine that copies finished jobs to a URL.

    Args:
        engine: that runs them.
        tree: the output tree on this machine.
        url: of the output tree.
    """

    def __init__(self, engine: Engine, tree: Path, url: str) -> None:
        self._engine, self._tree, self._url = engine, tree, url

    def run(self, works: Sequence[Work], watch: Watch) -> Generator[Outcome, None, None]:
        """See ``Engine.run``. A job whose folder cannot be copied counts as not run."""
        before = {work.name: stamp(self._tree / work.name) for work in works}
        with closing(self._engine.run(works, watch)) as outcomes:
            for outcome in outcomes:
                folder = self._tree / outcome.name
                if stamp(folder) not in (0, before[outcome.name]):
                    outcome = copied(outcome, folder, self._url)
                if outcome.copied:
                    fetch_records(self._url, outcome.name, self._tree)
                yield outcome


def copied(outcome: Outcome, folder: Path, url: str) -> Outcome:
    """Copy a job's folder to ``URL/NAME``; an error becomes part of the returned outcome."""
    try:
        publish(folder, f"{url}/{outcome.name}")
    except PacklightError as error:
        return replace(outcome, code=2, error=error.message, hint=error.hint)
    return replace(outcome, copied=True)


def run_and_copy(work: Work, url: str) -> Outcome:
    """Run one job on a machine that does not share the output tree, and copy its folder.

    The state of an interrupted build stays on this machine's disk, and the same job resumes it if
    it is started here again.
    """
    place = cache_folder("batch") / "jobs" / fingerprint_text(f"{url}/{work.name}")[:16]
    arguments = list(work.arguments)
    arguments[arguments.index("-o") + 1] = str(place / "out")
    for option in ("--progress-file", "--keep-baseline"):  # paths in the tree
        if option in arguments:
            start = arguments.index(option)
            del arguments[start : start + 2]
    shutil.rmtree(place / "out", ignore_errors=True)  # finished, but not yet copied
    here = replace(work, arguments=tuple(arguments), log=place / "log")
    outcome = run_work(here)
    if stamp(place / "out"):
        outcome = copied(outcome, place / "out", url)
    if outcome.copied:
        shutil.rmtree(place)
    return outcome


def fetch_records(url: str, name: str, tree: Path) -> None:
    """Copy the small files of a job from ``URL/NAME`` to ``TREE/NAME``."""
    folder = tree / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in RECORDS:
        text = read_text(f"{url}/{name}", file)
        if text is not None:
            (folder / file).write_text(text, encoding="utf-8")


def publish(folder: Path, url: str) -> None:
    """Copy a finished output folder to a URL; it is complete once its ``SHA256SUMS`` is there.

    An existing output is replaced: files that it listed and the new one lacks are deleted; files
    that packlight did not make are kept.

    Raises:
        UsageError: it cannot be written; the reason in one line.
    """
    fs, root = open_url(url)
    sums = read_checksums(folder / SUMS)
    refuse_links(folder, [*sums, SUMS])
    with at_store(f"write to {url}", UsageError):
        old = read_sums(url)
        if old == sums:
            return
        if old is not None:
            fs.rm_file(f"{root}/{SUMS}")
        for name in sums:
            target = f"{root}/{name}"
            fs.makedirs(str(PurePosixPath(target).parent), exist_ok=True)
            fs.put_file(str(folder / name), target)
        fs.put_file(str(folder / SUMS), f"{root}/{SUMS}")
        for name in set(old or ()) - set(sums):
            with suppress(FileNotFoundError):
                fs.rm_file(f"{root}/{name}")


def read_sums(url: str) -> dict[str, str] | None:
    """Name → digest from ``SHA256SUMS`` of the finished output at a URL; None where there is none,
    empty where it is damaged.

    Raises:
        UsageError: see ``open_url``.
    """
    text = read_text(url, SUMS)
    try:
        return None if text is None else parse_checksums(text.encode(), f"{url}/{SUMS}")
    except ArtifactError:
        return {}
