"""Writing the artifacts of a build, each from its own weights and all beside each other."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from compress.calibration.step import CalibrationStep
from compress.console import Console, format_bytes
from compress.build.lockstep import in_lockstep
from compress.machine import reuse_memory
from compress.plan.shapes import Artifact, Plan, Progress, Shipyard
from compress.output.folder import state_folder
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
    places = [folder / plan.format for plan in plans]
    formats = ", ".join(plan.format for plan in plans)
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
            plan, pulled, progress = plans[index], weights[index], updates[index]
            pulled.source = source
            exporter = shipyard.get_exporter(plan.format)
            artifact = exporter.write(plan, pulled, places[index], progress)
            notes = artifact.notes + inputs[index].notes + pulled.notes()
            return replace(artifact, notes=notes)

        def let_go(index: int) -> None:
            statistics = inputs[index].statistics
            if statistics is not None:
                statistics.forget()

        with console.progress(label, "bytes") as update:
            updates = added_up(update, [plan.weights_bytes for plan in plans])
            artifacts = in_lockstep([mine.source for mine in inputs], write, let_go)
    for artifact in artifacts:
        console.detail(f"{artifact.path.name}: {format_bytes(artifact.nbytes)}")
    return artifacts


def added_up(update: Progress, totals: Sequence[int]) -> list[Progress]:
    """A progress callback for each of several tasks; ``update`` gets their sums."""
    done = [0] * len(totals)

    def add(index: int, count: int, total: int) -> None:
        done[index] = count
        update(sum(done), sum(totals))

    return [partial(add, index) for index in range(len(totals))]
