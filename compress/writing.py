"""Writing the artifacts of a build: what each is made of, and all of them together."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from compress.calibration_step import CalibrationStep
from compress.console import Console, format_bytes
from compress.job import Job
from compress.lockstep import in_lockstep
from compress.model import Artifact, Plan, Progress, Shipyard
from compress.sources import Source
from compress.target_step import TargetInputs, holds_moments, prepare_target, target_weights


def write_artifacts(
    calibration: CalibrationStep, shipyard: Shipyard, folder: Path, console: Console
) -> list[Artifact]:
    """Write every target into ``folder/<format>/``, streaming from its source; in lockstep
    (``compress.lockstep``) where none keeps anything large in memory.
    """
    plans = calibration.job.plans
    if len(plans) > 1 and not holds_moments(calibration):
        inputs = [prepare_target(plan, calibration) for plan in plans]
        formats = ", ".join(dict.fromkeys(plan.format for plan in plans))
        with console.progress(f"write {formats}") as update:
            updates = added_up(update, [plan.weights_bytes for plan in plans])

            def write(index: int, source: Source) -> Artifact:
                target = replace(inputs[index], source=source)
                args = plans[index], target, calibration, shipyard, folder
                return write_target(*args, updates[index])

            artifacts = in_lockstep([target.source for target in inputs], write)
    else:
        artifacts = []
        for plan in plans:
            target = prepare_target(plan, calibration)
            with console.progress(f"write {plan.format} {plan.type_name}") as update:
                args = plan, target, calibration, shipyard, folder
                artifacts.append(write_target(*args, update))
    for artifact in artifacts:
        console.detail(f"{artifact.path.name}: {format_bytes(artifact.nbytes)}")
    return artifacts


def write_target(
    plan: Plan,
    inputs: TargetInputs,
    calibration: CalibrationStep,
    shipyard: Shipyard,
    folder: Path,
    update: Progress,
) -> Artifact:
    """Write one target into ``folder/<format>/``."""
    target = folder / target_folder(plan, calibration.job)
    target.mkdir()
    with tempfile.TemporaryDirectory(prefix="packlight-", dir=folder) as work:
        weights = target_weights(plan, inputs, calibration, Path(work))
        artifact = shipyard.get_exporter(plan.format).write(plan, weights, target, update)
    return replace(artifact, notes=artifact.notes + inputs.notes + weights.notes())


def added_up(update: Progress, totals: Sequence[int]) -> list[Progress]:
    """For each of several works its own progress, which together are ``update``'s."""
    done = [0] * len(totals)

    def tell(index: int, count: int, total: int) -> None:
        done[index] = count
        update(sum(done), sum(totals))

    return [partial(tell, index) for index in range(len(totals))]


def target_folder(plan: Plan, job: Job) -> str:
    """Folder of a target; a sweep has several of one format."""
    alone = sum(other.format == plan.format for other in job.plans) == 1
    return plan.format if alone else f"{plan.format}-{plan.type_name}"
