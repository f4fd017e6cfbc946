"""Writing the artifacts of a build: one loop over the parts of the model drives all writers.

The embedding goes to every target, then the first block, and so on, so that the checkpoint comes
from the disk once: what one target has read is still in the page cache when the next ones ask.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoint.sources import Source
from compress.console import Console, format_bytes
from compress.errors import GridError
from compress.formats import get_format
from compress.machine import reuse_memory, worker_threads
from compress.output.folder import state_folder
from compress.plan.job import Job, without
from compress.plan.shapes import Artifact, Plan, Writer, Written
from compress.plan.weights import Ledger, Weights
from compress.recipe import needs_of
from compress.solvers import get_solver

if TYPE_CHECKING:
    from compress.calibration.statistics import Statistics
    from compress.calibration.step import CalibrationStep

__all__ = ["put_tensors", "write_artifacts"]

MOST_SLABS = 7  # of a weight that are solved at a time


def write_artifacts(
    job: Job, calibration: CalibrationStep | None, folder: Path, console: Console
) -> list[Artifact]:
    """Write every target into ``folder/<format>/``, streaming from its source.

    All go together, unless each has to carry the hidden states of the calibration texts through
    its own quantized blocks: those are large, and so is the work beside that of reading.

    Args:
        job: its plans are written.
        calibration: of the job; None where nothing looks at inputs.
        folder: of the build.
        console: for progress.
    """
    reuse_memory()
    propagates = calibration is not None and calibration.propagates
    groups = [(plan,) for plan in job.plans] if propagates else [job.plans]
    artifacts: list[Artifact] = []
    for group in groups:
        label = f"write {', '.join(plan.format for plan in group)}"
        total, done = sum(plan.weights_bytes for plan in group), 0
        writers: list[Writer] = []
        with tempfile.TemporaryDirectory(prefix="packlight-", dir=folder) as work:
            made = []
            for plan in group:
                ledger = state_folder(folder) / f"{plan.format}.ledger"
                made.append(target_weights(plan, job, calibration, console, Path(work), ledger))

            with console.progress(label, "bytes") as update:

                def written(nbytes: int) -> None:
                    nonlocal done
                    done += nbytes
                    update(min(done, total), total)

                for plan, (weights, _) in zip(group, made, strict=True):
                    place = folder / plan.format
                    place.mkdir(exist_ok=True)
                    if found := len(weights.ledger):
                        console.detail(f"{plan.format}: {found} tensors were written before")
                    writers.append(get_format(plan.format).Writer(plan, weights, place, written))
                put_tensors(writers, written)
                for writer, (weights, changed) in zip(writers, made, strict=True):
                    artifact = writer.close()
                    notes = (*artifact.notes, *changed, *weights.notes())
                    artifacts.append(replace(artifact, notes=notes))
                    console.detail(f"{artifact.path.name}: {format_bytes(artifact.nbytes)}")
    return artifacts


def put_tensors(writers: Sequence[Writer], written: Written) -> None:
    """Every tensor of every writer's plan, part of the model by part: the embedding for all of
    them, then the first block, and so on. What a writer's ledger has is only counted."""
    parts = [writer.plan.by_part(writer.weights.config) for writer in writers]
    for part in sorted({number for numbers in parts for number in numbers}):
        for writer, entries in zip(writers, parts, strict=True):
            weights = writer.weights
            for entry in entries.get(part, ()):
                if entry.target_name in weights.ledger:
                    written(entry.nbytes)
                    continue
                try:
                    end = writer.put(entry)
                except GridError as error:
                    named = GridError(f"{entry.name}: {error.message}", error.hint)
                    formats = [other.plan.format for other in writers]
                    raise without(writer.plan.format, formats, named) from error
                facts = {"weight": entry.name, "fallen": weights.fallen.get(entry.name, 0)}
                weights.ledger.add(entry.target_name, writer.file, end, **facts)
            if weights.statistics is not None:
                weights.statistics.forget()  # those of a block die with it


def target_weights(
    plan: Plan,
    job: Job,
    calibration: CalibrationStep | None,
    console: Console,
    work: Path,
    ledger_file: Path,
) -> tuple[Weights, tuple[str, ...]]:
    """What the writer of a target asks for its tensors, with the ledger of what is written; and
    lines for the report.

    Where each block is solved with what the quantized blocks before it produce, the hidden states
    before the block that the walk is at are kept beside the ledger.

    Args:
        plan: of the target.
        job: that it is of.
        calibration: of the job; None where nothing looks at inputs.
        console: for progress.
        work: an empty folder that stays until the target is written.
        ledger_file: of the target.

    Raises:
        UsageError: calibration texts that are not there or too short.
        PacklightError: see ``CalibrationStep.gather``.
    """
    source, changes = job.source, job.transforms.get(plan.format, ())
    propagates = calibration is not None and calibration.propagates
    statistics = None
    if calibration and (changes or not propagates):
        statistics = calibration.gather(source, plan)
    notes = []
    for change in changes:
        windows = calibration.windows if calibration else list
        made = change.apply(plan, source, statistics, windows, console)
        source, statistics = made.source, made.statistics
        notes.append(made.note)
    solver = job.recipe.solver
    made_of = hashlib.sha256(f"{plan} {source.fingerprint()}".encode()).hexdigest()
    ledger = Ledger(ledger_file, made_of)
    if calibration and propagates:  # statistics come with the codes
        from compress.solvers.propagation import PropagatedWeights

        texts, states = calibration.windows(), ledger_file.with_suffix(".states")
        weights: Weights = PropagatedWeights(
            source, plan, solver, texts, work=work, ledger=ledger, states=states
        )
        return weights, tuple(notes)
    # GPTQ shares one slab out among all threads itself, for the memory that each takes. The others
    # take little, and work on a slab in steps of which each would wait for its slowest thread.
    at_once = 1 if needs_of(solver) == "hessian" else min(worker_threads(), MOST_SLABS)
    weights = Weights(source, get_solver(solver), ledger, at_once=at_once, statistics=statistics)
    return weights, tuple(notes)
