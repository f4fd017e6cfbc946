"""Writing the artifacts of a build: one loop over the parts of the model drives all writers.

The embedding goes to every target, then the first block, and so on, so that the checkpoint comes
from the disk once: what one target has read is still in the page cache when the next ones ask.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from compress.build.target import TargetInputs, prepare_target, target_weights
from compress.calibration.step import CalibrationStep
from compress.console import Console, format_bytes
from compress.formats import get_format
from compress.machine import reuse_memory
from compress.output.folder import state_folder
from compress.plan.shapes import Artifact, Writer, Written

__all__ = ["put_all", "write_artifacts"]


def write_artifacts(
    calibration: CalibrationStep, folder: Path, console: Console
) -> list[Artifact]:
    """Write every target into ``folder/<format>/``, streaming from its source.

    All go together, unless each has to carry the hidden states of the calibration texts through
    its own quantized blocks: those are large, and so is the work beside that of reading.
    """
    reuse_memory()
    plans = calibration.job.plans
    groups = [(plan,) for plan in plans] if calibration.propagates else [plans]
    artifacts: list[Artifact] = []
    for group in groups:
        inputs = [prepare_target(plan, calibration) for plan in group]
        label = f"write {', '.join(plan.format for plan in group)}"
        total, done = sum(plan.weights_bytes for plan in group), 0
        with (
            tempfile.TemporaryDirectory(prefix="packlight-", dir=folder) as work,
            console.progress(label, "bytes") as update,
        ):

            def written(nbytes: int) -> None:
                nonlocal done
                done += nbytes
                update(min(done, total), total)

            writers: list[Writer] = []
            for plan, made_of in zip(group, inputs, strict=True):
                place = folder / plan.format
                place.mkdir(exist_ok=True)
                ledger = state_folder(folder) / f"{place.name}.ledger"
                weights = target_weights(plan, made_of, calibration, Path(work), ledger)
                if found := len(weights.ledger):
                    console.detail(f"{place.name}: {found} tensors were written before")
                writers.append(get_format(plan.format).Writer(plan, weights, place, written))
            put_all(writers, written)
            artifacts += [finished(*pair) for pair in zip(writers, inputs, strict=True)]
    for artifact in artifacts:
        console.detail(f"{artifact.path.name}: {format_bytes(artifact.nbytes)}")
    return artifacts


def put_all(writers: Sequence[Writer], written: Written = lambda nbytes: None) -> None:
    """Every tensor of every writer's plan, part of the model by part; those in its ledger are
    there.

    Args:
        writers: just begun.
        written: told the bytes of what is there.
    """
    parts = [writer.plan.by_part(writer.weights.config) for writer in writers]
    for part in sorted({number for numbers in parts for number in numbers}):
        for writer, entries in zip(writers, parts, strict=True):
            weights = writer.weights
            for entry in entries.get(part, ()):
                if entry.target_name in weights.ledger:
                    written(entry.nbytes)
                else:
                    weights.finish(entry, writer.file, writer.put(entry))
            if weights.statistics is not None:
                weights.statistics.forget()  # those of a block die with it


def finished(writer: Writer, made_of: TargetInputs) -> Artifact:
    """The artifact of a writer, with all that its report should say."""
    artifact = writer.close()
    return replace(artifact, notes=artifact.notes + made_of.notes + writer.weights.notes())
