"""Statistics of a source's inputs on a set of windows: from the cache, or from a walk (``walk.py``)
whose statistics then stand in the cache.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from compress.cache import cache_folder
from compress.calibration_set import CalibrationSet
from compress.sources import Source
from compress.statistics import Statistics, file_name, is_whole, save
from compress.walk import walk

__all__ = ["collect"]

LAYOUT = 2  # of the cache; part of its key


def collect(
    source: Source,
    calibration: CalibrationSet,
    *,
    hessian: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Statistics:
    """Statistics from the cache, or from a walk whose statistics then stand in the cache.

    Args:
        source: the weights; equal ones (``Source.fingerprint``) share their statistics.
        calibration: windows.
        hessian: whether Hessians are wanted; statistics that have them serve without, too.
        progress: of the walk.
    """
    place, config = cache_folder(), source.config
    facts = f"{LAYOUT} {source.fingerprint()} {calibration.digest()}"
    key = hashlib.sha256(facts.encode()).hexdigest()[:16]
    full, light = place / f"{key}-hessian", place / key
    for folder in (full,) if hessian else (light, full):
        if folder.is_dir() and not is_whole(config, folder):
            shutil.rmtree(folder)
        elif folder.is_dir():
            return Statistics.open(config, folder, hessian=hessian)
    final = full if hessian else light
    with tempfile.TemporaryDirectory(dir=place, prefix=f"{final.name}.partial-") as work:
        folder = Path(work) / "statistics"
        folder.mkdir()
        blocks = walk(
            config,
            source.read,
            calibration.windows,
            hessian=hessian,
            work=Path(work),
            progress=progress,
        )
        for stats in blocks:
            save(folder / file_name(next(iter(stats))), stats)
        try:
            folder.rename(final)
        except OSError:  # another build was faster, with the same
            if not final.is_dir():
                raise
    if hessian:  # they serve both, so the lesser ones may go
        shutil.rmtree(light, ignore_errors=True)
    return Statistics.open(config, final, hessian=hessian)
