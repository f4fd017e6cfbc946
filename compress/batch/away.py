"""Output trees behind URLs: a job builds on a disk of its machine, and its folder is copied there.

The tree on the machine of the batch then holds records, reports and checksums, not the artifacts.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from compress.batch.engine import Engine, Outcome, Watch, Work, run_work
from compress.batch.state import stamp
from compress.checkpoint.remote import SUMS, fingerprint_text, publish, read_text
from compress.errors import PacklightError
from compress.output.cache import cache_folder

__all__ = ["Publishing", "bring_back", "run_away"]

# What a batch tells of a job, and what recognises it as finished: last, since it does.
TOLD = ("report.json", "report.html", "README.md", "plan.json", "recipe.yaml", SUMS)


class Publishing:
    """An engine of this machine whose finished jobs are copied to a URL.

    Args:
        engine: that runs them.
        tree: the output tree on this machine.
        url: that tree's place.
    """

    def __init__(self, engine: Engine, tree: Path, url: str) -> None:
        self._engine, self._tree, self._url = engine, tree, url

    def run(self, works: Sequence[Work], watch: Watch) -> Generator[Outcome, None, None]:
        """See ``Engine.run``. A job whose folder cannot be copied is one that could not run."""
        before = {work.name: stamp(self._tree / work.name) for work in works}
        with closing(self._engine.run(works, watch)) as outcomes:
            for outcome in outcomes:
                folder = self._tree / outcome.name
                if stamp(folder) not in (0, before[outcome.name]):
                    outcome = published(outcome, folder, self._url)
                if outcome.copied:
                    bring_back(self._url, outcome.name, self._tree)
                yield outcome


def published(outcome: Outcome, folder: Path, url: str) -> Outcome:
    """Copy the folder that a job has made to ``URL/NAME``; what went wrong becomes the outcome."""
    try:
        publish(folder, f"{url}/{outcome.name}")
    except PacklightError as error:
        return replace(outcome, code=2, error=error.message, hint=error.hint)
    return replace(outcome, copied=True)


def run_away(work: Work, url: str) -> Outcome:
    """One job on a machine that does not share the output tree.

    What a build leaves when it is cut off stays on this machine's disk, and the same job goes on
    from there if it comes here again.
    """
    place = cache_folder("batch") / "jobs" / fingerprint_text(f"{url}/{work.name}")[:16]
    arguments = list(work.arguments)
    arguments[arguments.index("-o") + 1] = str(place / "out")
    for option in ("--progress-file", "--keep-baseline"):  # places in the tree
        if option in arguments:
            start = arguments.index(option)
            del arguments[start : start + 2]
    shutil.rmtree(place / "out", ignore_errors=True)  # finished, but not copied before the end
    here = replace(work, arguments=tuple(arguments), log=place / "log")
    outcome = run_work(here)
    if stamp(place / "out"):
        outcome = published(outcome, place / "out", url)
    if outcome.copied:
        shutil.rmtree(place)
    return outcome


def bring_back(url: str, name: str, tree: Path) -> None:
    """The small files of a job that was copied to ``URL/NAME``, to ``TREE/NAME``."""
    folder = tree / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in TOLD:
        text = read_text(f"{url}/{name}", file)
        if text is not None:
            (folder / file).write_text(text, encoding="utf-8")
