"""Writes the artifacts of a build: one loop over the parts of the model drives all writers.

The embedding goes to every target, then the first block, and so on, so that the checkpoint is
read from disk once: the other targets find it in the page cache.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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
    from compress.calibration.step import CalibrationStep
    from compress.solvers.shared import Solutions

__all__ = ["put_tensors", "write_artifacts"]

MOST_SLABS = 7  # of a weight that are solved at a time, at most


def write_artifacts(
    job: Job, calibration: CalibrationStep | None, folder: Path, console: Console
) -> list[Artifact]:
    """Write every target into ``folder/<format>/``, streaming from its source.

    All are written in one pass, except where each propagates the calibration texts' hidden states
    through its own quantized blocks: those are large, and take far longer than reading.

    Args:
        job: its plans are written.
        calibration: of the job; None where nothing uses calibration texts.
        folder: the build's work folder.
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
            made, solutions = [], None
            if len(group) > 1 and needs_of(job.recipe.solver) == "hessian":
                from compress.solvers.shared import Solutions

                alike = [p for p in group if not p.folded and not job.transforms.get(p.format)]
                solutions = Solutions(job.source.config, alike)
            for plan in group:
                ledger = state_folder(folder) / f"{plan.format}.ledger"
                made.append(
                    target_weights(
                        plan, job, calibration, console, Path(work), ledger, solutions=solutions
                    )
                )

            with console.progress(label, "bytes") as update:

                def written(nbytes: int, total: int = total) -> None:
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
    """Write every tensor of every plan, one part of the model after another: the embedding for all
    writers, then the first block, and so on. Tensors in a writer's ledger are skipped."""
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
                weights.statistics.forget()  # a block's are not needed after it


def fold_scalars(source: Source, plan: Plan, statistics: Any) -> tuple[Source, Any]:
    """The source and the statistics of its inputs, with the scalars of ``Plan.folded`` folded."""
    from compress.checkpoint.scalars import ScalarsFolded

    scale = source.config.logit_scale
    if statistics is not None and "logits" in plan.folded:
        from compress.solvers.folding import fold_statistics

        width = source.config.hidden_size
        wider = {"lm_head": np.full(width, 1 / scale, np.float32)}
        statistics = fold_statistics(source.config, statistics, wider)
    return ScalarsFolded(source, plan.folded), statistics


def target_weights(
    plan: Plan,
    job: Job,
    calibration: CalibrationStep | None,
    console: Console,
    work: Path,
    ledger_file: Path,
    solutions: Solutions | None = None,
) -> tuple[Weights, tuple[str, ...]]:
    """The ``Weights`` that a target's writer reads from, with its ledger; and lines for the report.

    Where each block is quantized on the outputs of the quantized blocks before it, the hidden
    states before the current block are kept beside the ledger, for ``--resume``.

    Args:
        plan: of the target.
        job: of the plan.
        calibration: of the job; None where nothing uses calibration texts.
        console: for progress.
        work: an empty folder that stays until the target is written.
        ledger_file: of the target.
        solutions: codes that targets of the same weights share; None where each solves its own.

    Raises:
        UsageError: calibration texts that are missing or too short.
        PacklightError: see ``CalibrationStep.gather``.
    """
    source, changes = job.source, job.transforms.get(plan.format, ())
    propagates = calibration is not None and calibration.propagates
    statistics = None
    if calibration and (changes or not propagates):
        statistics = calibration.gather(source, plan)
    notes = []
    if plan.folded:
        source, statistics = fold_scalars(source, plan, statistics)
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
    # GPTQ splits one slab among all threads itself, because each slab takes much memory. The other
    # solvers take little, and inside a slab each step would wait for its slowest thread.
    at_once = 1 if needs_of(solver) == "hessian" else min(worker_threads(), MOST_SLABS)
    if solutions and not plan.folded and not changes:
        from compress.solvers.shared import SharedWeights

        weights = SharedWeights(
            solutions, plan.format, source, get_solver(solver), ledger, statistics=statistics
        )
        return weights, tuple(notes)
    weights = Weights(source, get_solver(solver), ledger, at_once=at_once, statistics=statistics)
    return weights, tuple(notes)
