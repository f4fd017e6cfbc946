"""Statistics of a source's inputs on a set of windows: from the cache, or from a walk (``walk.py``)
that is then cached.

A walk that is killed leaves there what it has found, and the next one with the same weights and
windows goes on with the block that it was at. Of two builds that want the same, one walks and the
other waits for it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import is_zipfile

from compress.calibration.statistics import Statistics, file_name, input_names, save
from compress.calibration.texts import CalibrationSet
from compress.calibration.walk import Boundary, walk
from compress.checkpoint.sources import Source
from compress.files import cache_folder, check_unchanged, computed_once, sync

__all__ = ["collect"]

LAYOUT = 2  # of the cache; part of its key


def collect(
    source: Source,
    calibration: CalibrationSet,
    *,
    hessian: bool,
    keep: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Statistics:
    """Statistics from the cache, or from a walk that is then cached.

    Args:
        source: the weights; equal ones (``Source.fingerprint``) share their statistics.
        calibration: windows.
        hessian: whether Hessians are wanted; statistics that have them serve without, too.
        keep: leave what was found, too, where the walk ends by an exception.
        progress: of the walk.
    """
    place, config = cache_folder(), source.config
    facts = f"{LAYOUT} {source.fingerprint()} {calibration.digest()}"
    key = hashlib.sha256(facts.encode()).hexdigest()[:16]
    full, light = place / f"{key}-hessian", place / key

    names = {file_name(key) for key in input_names(config)}

    def known() -> Statistics | None:
        for folder in (full,) if hessian else (light, full):
            if folder.is_dir() and all(is_zipfile(folder / name) for name in names):
                return Statistics.open(config, folder, hessian=hessian)
        return None

    def walked() -> Statistics:
        final = full if hessian else light
        shutil.rmtree(final, ignore_errors=True)  # damaged
        collect_anew(source, calibration, final, hessian, keep, progress)
        if hessian:  # they serve both, so the lesser ones may go
            shutil.rmtree(light, ignore_errors=True)
        return Statistics.open(config, final, hessian=hessian)

    return computed_once(place / f"{key}.lock", known, walked)


def collect_anew(
    source: Source,
    calibration: CalibrationSet,
    final: Path,
    hessian: bool,
    keep: bool,
    progress: Callable[[int, int], None],
) -> None:
    """Walk, and put the statistics into the folder ``final``; arguments as of ``collect``."""
    with walk_folder(final, keep=keep) as work:
        folder = work / "statistics"
        folder.mkdir(exist_ok=True)
        blocks = walk(
            source.config,
            source.read,
            calibration.windows,
            hessian=hessian,
            work=work,
            boundary=Boundary(work / "boundary"),
            progress=progress,
        )
        for stats in blocks:
            file = folder / file_name(next(iter(stats)))
            save(file, stats)
            sync(file)
        check_unchanged(source.checkpoint.opened)  # or the cache would answer for other weights
        folder.rename(final)


@contextmanager
def walk_folder(final: Path, *, keep: bool) -> Iterator[Path]:
    """Where a walk works: ``FINAL.partial``, or what another one left there; removed at the end.

    Args:
        final: where its statistics will be.
        keep: leave it where the walk ends by an exception.
    """
    partial = final.with_name(final.name + ".partial")
    partial.mkdir(exist_ok=True)
    try:
        yield partial
    except BaseException:
        if not keep:
            shutil.rmtree(partial)
        raise
    shutil.rmtree(partial)
