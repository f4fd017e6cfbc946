"""The float model's answers, kept for other builds of the same model on the same text.

What is kept are the two files of a ``BaselineStore``, and ``facts.json``: what computed them and
how fast. A build that borrows them has links of its own, so that neither can harm the other.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from zipfile import BadZipFile

from compress.errors import ArtifactError
from compress.output.cache import taking_turns
from compress.verify.baseline import BaselineStore
from compress.verify.resources import Speed

__all__ = ["KeptBaseline"]

FILES = ("baseline.npz", "logprobs.u16")


@dataclass(frozen=True)
class KeptBaseline:
    """A place for the answers of one float model to one set of windows.

    Attributes:
        folder: of all that is kept.
        key: names this model, these windows and what computes them.
    """

    folder: Path
    key: str

    @classmethod
    def of(
        cls, folder: Path, fingerprint: str, windows: Sequence[Sequence[int]], runtime: str
    ) -> KeptBaseline:
        """The place for a model (``Source.fingerprint``), windows and the decoder's name."""
        facts = json.dumps([fingerprint, [list(map(int, window)) for window in windows], runtime])
        return cls(folder, hashlib.sha256(facts.encode()).hexdigest()[:16])

    @contextmanager
    def in_turn(self, work: Path) -> Iterator[tuple[BaselineStore, Speed | None] | None]:
        """As ``borrow``, after those who compute these answers now; where there are none then, no
        other build of this machine computes them while the caller does, and keeps them.
        """
        if found := self.borrow(work):
            yield found
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with taking_turns(self.folder / f"{self.key}.lock"):
            found = self.borrow(work)
            if found is None:  # damaged, if it is there
                shutil.rmtree(self.folder / self.key, ignore_errors=True)
            yield found

    def borrow(self, work: Path) -> tuple[BaselineStore, Speed | None] | None:
        """The answers as files in ``work``, and the float model's speed; None if none are kept."""
        place = self.folder / self.key
        try:
            facts = json.loads((place / "facts.json").read_text(encoding="utf-8"))
            for name in FILES:
                link(place / name, work / name)
            speed = Speed(**facts["speed"]) if facts["speed"] else None
            return BaselineStore(work), speed
        except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile, ArtifactError):
            return None  # damaged: it will be computed again

    def keep(self, work: Path, speed: Speed | None) -> None:
        """Keep the answers that lie in ``work``: whole or not at all, and the first ones stay."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=f"{self.key}.partial-") as partial:
            whole = Path(partial) / "whole"
            whole.mkdir()
            for name in FILES:
                link(work / name, whole / name)
            facts = {"speed": asdict(speed) if speed else None}
            (whole / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
            if not (self.folder / self.key).exists():
                whole.rename(self.folder / self.key)


def link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no such thing."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
