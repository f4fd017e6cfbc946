"""The pruning step of a build, before statistics and writing.

Results (blocks or channels, updated weights) are cached by the weights' fingerprint, the
calibration windows and the cut: the same pruning is not computed twice.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compress import __version__
from compress.calibration.texts import CalibrationSet
from compress.checkpoint.sources import Source
from compress.console import Console
from compress.decoder.config import DecoderConfig
from compress.decoder.config_json import read_json
from compress.errors import CheckpointError
from compress.files import cache_folder, check_unchanged, computed_once
from compress.machine import set_threads
from compress.plan.cut import Cut, Healing
from compress.plan.job import Job, choose_threads
from compress.pruning.pruned import Healed, Narrower, Shallower, retained_rows

__all__ = ["Pruned", "prune", "prune_source"]

FOUND = "found.json"  # the measurements, in a folder of the cache
LAYOUT = 1  # of the cache; part of its key
RECORD = "packlight"  # key of config.json with the record of pruning steps


@dataclass(frozen=True)
class Pruned:
    """The result of pruning.

    Attributes:
        source: the pruned weights; its config has the record, under ``RECORD``.
        notes: lines for the report.
    """

    source: Source
    notes: tuple[str, ...]


def prune(job: Job, cut: Cut, texts: CalibrationSet, console: Console, threads: int) -> Pruned:
    """Prune a job's weights to its cut, measured on ``texts``.

    Raises:
        CheckpointError: weights that cannot be read.
    """
    set_threads(choose_threads(threads, job.config))
    return prune_source(job.source, cut, texts, console)


def prune_source(source: Source, cut: Cut, texts: CalibrationSet, console: Console) -> Pruned:
    """Prune a source, from the cache or by a walk.

    Args:
        source: the whole model.
        cut: the pruned shape.
        texts: calibration texts.
        console: for progress.
    """
    key = cut_folder(source, cut, texts).name

    def compute(folder: Path, work: Path) -> None:
        measure(source, cut, texts, folder, work, console)

    def load(folder: Path) -> Pruned:
        return read_pruned(folder, source, cut, texts)

    pruned = folder_once(key, compute, load)
    if cut.healing is None:
        return pruned
    retained: Sequence[int] = range(source.config.num_hidden_layers // source.config.block_repeat)
    if isinstance(pruned.source, Shallower):
        retained = pruned.source.retained
    return healed(source, pruned, retained, cut.healing, texts, console)


def read_pruned(folder: Path, source: Source, cut: Cut, texts: CalibrationSet) -> Pruned:
    """A pruned source from its folder in the cache.

    Raises:
        CheckpointError: the folder is not there or damaged.
    """
    found = read_json(folder / FOUND)
    if cut.method != "depth" and len(list(folder.glob("*.safetensors"))) != len(found["kept"]):
        raise CheckpointError(f"changed weights are missing in {folder}")
    config = with_record(cut.config, record(source, cut, texts, found))
    notes = (size_note(source.config, cut), *measured_notes(cut, found))
    if cut.method == "depth":
        return Pruned(Shallower(source, config, found["kept"]), notes)
    retained = {
        int(block): retained_rows(source.config, cut.method, np.array(rows))
        for block, rows in found["kept"].items()
    }
    return Pruned(Narrower(source, config, folder, retained, folder.name), notes)


def healed(
    whole: Source,
    pruned: Pruned,
    retained: Sequence[int],
    healing: Healing,
    texts: CalibrationSet,
    console: Console,
) -> Pruned:
    """Heal a pruned source, from the cache or by training.

    Args:
        whole: the float model.
        pruned: the pruned model.
        retained: indices of the retained stored blocks, ascending.
        healing: minutes or steps.
        texts: to train and evaluate on.
        console: for progress.
    """
    source = pruned.source
    facts = f"{LAYOUT} heal {source.fingerprint()} {texts.digest()} {healing}"

    def compute(folder: Path, work: Path) -> None:
        from compress.pruning.heal import heal

        with console.progress("heal", "blocks") as update:
            found = heal(whole, source, retained, healing, texts.windows, folder, work, update)
        (folder / FOUND).write_text(json.dumps(found), encoding="utf-8")

    def load(folder: Path) -> Pruned:
        return healed_in(folder, pruned, healing, texts)

    return folder_once(hashlib.sha256(facts.encode()).hexdigest()[:16], compute, load)


def healed_in(folder: Path, pruned: Pruned, healing: Healing, texts: CalibrationSet) -> Pruned:
    """A healed source from its folder in the cache.

    Raises:
        CheckpointError: the folder is not there or damaged.
    """
    found = read_json(folder / FOUND)
    better = sum(a < b for a, b in zip(found["after"], found["before"], strict=True))
    if len(list(folder.glob("*.safetensors"))) != better:
        raise CheckpointError(f"healed weights are missing in {folder}")
    step: dict[str, Any] = {
        "step": "heal",
        **{key: value for key, value in asdict(healing).items() if value is not None},
        "steps_by_block": found["steps"],
        "held_back_error": {"before": found["before"], "after": found["after"]},
        "calibration": {"texts": list(texts.sources), "tokens": texts.tokens},
        "version": __version__,
    }
    config = with_record(pruned.source.config, step)
    source = Healed(pruned.source, config, folder, found["digest"])
    return Pruned(source, (*pruned.notes, heal_note(healing, found)))


def heal_note(healing: Healing, found: Mapping[str, Any]) -> str:
    """Number of training steps and the errors before and after, for the report."""
    steps = found["steps"]
    before, after = (np.mean(found[key]) * 100 for key in ("before", "after"))
    better = sum(a < b for a, b in zip(found["after"], found["before"], strict=True))
    done = f"{min(steps)} to {max(steps)}" if min(steps) < max(steps) else f"{steps[0]}"
    by_clock = "" if healing.minutes is None else " (another machine does more or fewer)"
    return (
        f"Healed for {healing.describe()} on calibration text: {done} steps a block{by_clock}. "
        "Error of a block's output, on text that trained nothing and inputs from the healed blocks "
        f"before it: {before:.2f} % of its energy before, {after:.2f} % after, on average; "
        f"{better} of {len(steps)} blocks got better, the others are as pruning left them"
    )


def folder_once(
    key: str, compute: Callable[[Path, Path], None], load: Callable[[Path], Pruned]
) -> Pruned:
    """Load a folder of the cache, computed at most once.

    Args:
        key: the folder's name.
        compute: ``compute(folder, work)`` fills it where it is missing or damaged.
        load: reads it; raises CheckpointError where it is missing or damaged.
    """
    final = cache_folder("pruning") / key

    def known() -> Pruned | None:
        try:
            return load(final)
        except CheckpointError:  # missing or damaged
            return None

    def anew() -> Pruned:
        shutil.rmtree(final, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=f"{key}.partial-") as work:
            folder = Path(work) / "pruned"
            folder.mkdir()
            compute(folder, Path(work))
            folder.rename(final)
        return load(final)

    return computed_once(final.with_suffix(".lock"), known, anew)


def cut_folder(source: Source, cut: Cut, texts: CalibrationSet) -> Path:
    """The cache folder of a cut's results."""
    facts = (
        f"{LAYOUT} {source.fingerprint()} {texts.digest()} {cut.method} {cut.retained} {cut.update}"
    )
    return cache_folder("pruning") / hashlib.sha256(facts.encode()).hexdigest()[:16]


def measure(
    source: Source, cut: Cut, texts: CalibrationSet, folder: Path, work: Path, console: Console
) -> None:
    """Select what to remove; writes ``found.json`` and changed weights into ``folder``."""
    from compress.pruning.depth import choose_blocks, measured_windows
    from compress.pruning.width import narrow

    if cut.method == "depth":
        with console.progress("try without blocks", "blocks") as update:
            gone = choose_blocks(source, texts.windows, cut.dropped, update)
        retained = sorted(set(range(cut.total)) - {departure.block for departure in gone})
        found: dict[str, Any] = {"kept": retained, "gone": [[d.block, d.kl] for d in gone]}
        found["tokens"] = sum(map(len, measured_windows(texts.windows)))
    else:
        with console.progress(f"prune {cut.method}", "windows") as update:
            found = narrow(source, cut, texts.windows, folder, work, update)
    check_unchanged(source.checkpoint.opened)
    (folder / FOUND).write_text(json.dumps(found), encoding="utf-8")


def record(
    source: Source, cut: Cut, texts: CalibrationSet, found: Mapping[str, Any]
) -> dict[str, Any]:
    """The record of one pruning step for ``config.json``."""
    step: dict[str, Any] = {
        "step": "prune",
        "model": source.checkpoint.source,
        "method": cut.method,
        "kept": cut.retained,
        "of": cut.total,
        "parameters": {
            "before": source.config.num_parameters,
            "after": cut.config.num_parameters,
        },
        "calibration": {
            "texts": list(texts.sources),
            "tokens": found.get("tokens", texts.tokens),
        },
        "version": __version__,
    }
    if cut.method == "depth":
        return step | {"dropped_blocks": sorted(block for block, _ in found["gone"])}
    return step | {"least_squares_update": cut.update}


def with_record(config: DecoderConfig, step: Mapping[str, Any]) -> DecoderConfig:
    """The config with one more step in its record."""
    before = config.raw.get(RECORD)
    steps = before.get("steps", []) if isinstance(before, dict) else []
    return replace(config, raw={**config.raw, RECORD: {"steps": [*steps, dict(step)]}})


def size_note(config: DecoderConfig, cut: Cut) -> str:
    """A report line: what was removed, and what is left."""
    before, after = config.num_parameters, cut.config.num_parameters
    return (
        f"Pruned {cut.describe()}: {after:,} of {before:,} parameters are left "
        f"({(after / before - 1) * 100:+.1f} %). Quality is compared with the unpruned float "
        "model, and bits per weight count its parameters"
    )


def measured_notes(cut: Cut, found: Mapping[str, Any]) -> list[str]:
    """Report lines: the error of pruning alone, on the calibration text."""
    if cut.method == "depth":
        steps = ", ".join(f"{block} (KL {kl:.4f})" for block, kl in found["gone"])
        return [
            f"Blocks dropped, counted from 0, and the divergence from the float model after each, "
            f"on {found['tokens']} tokens of calibration text, before quantization: {steps}"
        ]
    errors = [error for error in found["relative_errors"].values() if error is not None]
    if not errors:
        return []
    how = "kept columns updated by least squares" if cut.update else "kept columns left as they are"
    role = "down_proj" if cut.method == "ffn" else "o_proj"
    return [
        f"Error of {role}'s output on inputs that the update has not seen, {how}: "
        f"{np.mean(errors) * 100:.2f} % of its energy on average, {max(errors) * 100:.2f} % at most"
    ]
