"""Writing the artifacts of a build, each from its own weights and all beside each other."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from compress.calibration.step import CalibrationStep
from compress.console import Console, format_bytes
from compress.plan.job import Job
from compress.build.lockstep import in_lockstep
from compress.machine import reuse_memory
from compress.plan.shapes import Artifact, Plan, Progress, Shipyard
from compress.output.folder import state_folder
from compress.pace import expected_steps
from compress.checkpoint.sources import Source
from compress.build.target import prepare_target, target_weights

__all__ = ["write_artifacts"]


def write_artifacts(
    calibration: CalibrationStep, shipyard: Shipyard, folder: Path, console: Console
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
        artifacts += write_together(group, calibration, shipyard, folder, console)
    return artifacts


def write_together(
    plans: Sequence[Plan],
    calibration: CalibrationStep,
    shipyard: Shipyard,
    folder: Path,
    console: Console,
) -> list[Artifact]:
    """Write some targets in lockstep (``compress.build.lockstep``), or one as it is."""
    inputs = [prepare_target(plan, calibration) for plan in plans]
    places = [folder / target_folder(plan, calibration.job) for plan in plans]
    formats = ", ".join(dict.fromkeys(plan.format for plan in plans))
    label = f"write {formats}" if len(plans) > 1 else f"write {formats} {plans[0].type_name}"
    with tempfile.TemporaryDirectory(prefix="packlight-", dir=folder) as work:
        weights = []
        for plan, mine, place in zip(plans, inputs, places, strict=True):
            place.mkdir(exist_ok=True)
            ledger = state_folder(folder) / f"{place.name}.ledger"
            weights.append(target_weights(plan, mine, calibration, Path(work), ledger))
            if found := len(weights[-1].ledger):
                console.detail(f"{place.name}: {found} arrays were written before")

        def write(index: int, source: Source) -> Artifact:
            plan, pulled, tell = plans[index], weights[index], updates[index]
            pulled.source = source
            artifact = shipyard.get_exporter(plan.format).write(plan, pulled, places[index], tell)
            notes = artifact.notes + inputs[index].notes + pulled.notes()
            return replace(artifact, notes=notes)

        def let_go(index: int) -> None:
            statistics = inputs[index].statistics
            if statistics is not None:
                statistics.forget()

        console.begin(f"{label}: estimate")
        steps = expected_steps(plans, weights, calibration.job.recipe.solver)
        with console.progress(label, "bytes", steps) as update:
            updates = added_up(update, [plan.weights_bytes for plan in plans])
            artifacts = in_lockstep([mine.source for mine in inputs], write, let_go)
    for artifact in artifacts:
        console.detail(f"{artifact.path.name}: {format_bytes(artifact.nbytes)}")
    return artifacts


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
