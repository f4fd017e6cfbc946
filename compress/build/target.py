"""The step of a build that each target has for itself: what it is made of.

Targets share the job's source and its statistics unless one of them has weights of its own
(``Job.sources``). Changes that go by statistics and belong to one target stand here, between the
statistics and the writing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from compress.calibration.step import CalibrationStep
from compress.errors import UsageError
from compress.solvers.folding import Folded, fold_statistics
from compress.output.ledger import Ledger
from compress.machine import worker_threads
from compress.plan.shapes import Plan, Weights
from compress.calibration.propagation import PropagatedWeights
from compress.pruning.sparse import Sparsified
from compress.pruning.zeros import method_of, pattern_for
from compress.solvers import get_solver, slabs_at_once
from compress.checkpoint.sources import Source
from compress.calibration.statistics import Statistics


@dataclass(frozen=True)
class TargetInputs:
    """What one target is written from.

    Attributes:
        source: its weights.
        statistics: of the inputs that those weights have; None where nothing needs them.
        notes: lines for the report about this target.
    """

    source: Source
    statistics: Statistics | None
    notes: tuple[str, ...] = ()


def prepare_target(plan: Plan, calibration: CalibrationStep) -> TargetInputs:
    """Source and statistics of a target, just before it is written.

    Args:
        plan: of the target.
        calibration: of the job.

    Raises:
        PacklightError: see ``CalibrationStep.gather``.
    """
    source = calibration.job.source_of(plan)
    recipe = calibration.job.recipe
    inputs = TargetInputs(source, None)
    method = method_of(plan.settings)
    if recipe.folds or method or not calibration.propagates:
        inputs = replace(inputs, statistics=calibration.gather(source, plan))
    if method:
        inputs = thin(plan, inputs, method)
    if recipe.folds:
        inputs = fold(plan, inputs, calibration)
    if calibration.propagates:  # statistics come with the codes
        inputs = replace(inputs, statistics=None)
    return inputs


def thin(plan: Plan, inputs: TargetInputs, method: str) -> TargetInputs:
    """The source with the zeros that the plan's settings ask for."""
    pattern = pattern_for(plan.settings)
    assert pattern is not None
    note = f"zeros chosen by {method} ({pattern.name}) in the blocks' linears"
    source = Sparsified(inputs.source, inputs.statistics, pattern, method)
    return TargetInputs(source, inputs.statistics, (*inputs.notes, note))


def fold(plan: Plan, inputs: TargetInputs, calibration: CalibrationStep) -> TargetInputs:
    """Scales and orders of channels that suit the target's grids (``compress.solvers.awq``)."""
    from compress.solvers.awq import search

    if inputs.statistics is None:
        raise UsageError("quantize.fold and quantize.permute need a solver that looks at inputs")
    recipe, config = calibration.job.recipe, inputs.source.config
    with calibration.console.progress(f"fold {plan.format} {plan.type_name}", "blocks") as update:
        found = search(
            inputs.source,
            inputs.statistics,
            plan,
            recipe.solver,
            scale=recipe.fold == "awq",
            order=recipe.permute,
            length=len(calibration.windows()[0]),
            progress=update,
        )
    inputs.statistics.forget()  # from here on by the folded ones
    return TargetInputs(
        Folded(inputs.source, found.folds),
        fold_statistics(config, inputs.statistics, found.folds),
        (*inputs.notes, found.note()),
    )


def target_weights(
    plan: Plan, inputs: TargetInputs, calibration: CalibrationStep, work: Path, ledger_file: Path
) -> Weights:
    """What the writer of a target pulls from, and its ledger.

    Where each block is solved with what the quantized blocks before it produce, those are kept
    beside the ledger, too: the hidden states before the block that the walk is at.

    Args:
        plan: of the target.
        inputs: as ``prepare_target`` made them.
        calibration: of the job.
        work: an empty folder that stays until the target is written.
        ledger_file: of the target.

    Raises:
        UsageError: calibration texts that are not there or too short.
    """
    solver = calibration.job.recipe.solver
    made_of = hashlib.sha256(f"{plan} {inputs.source.fingerprint()}".encode()).hexdigest()
    ledger = Ledger(ledger_file, made_of)
    if calibration.propagates:
        windows, states = calibration.windows(), ledger_file.with_suffix(".states")
        return PropagatedWeights(
            inputs.source, plan, solver, windows, work=work, ledger=ledger, states=states
        )
    at_once = slabs_at_once(solver, worker_threads())
    return Weights(inputs.source, get_solver(solver, inputs.statistics), ledger, at_once=at_once)
