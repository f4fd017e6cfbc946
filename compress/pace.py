"""What the tensors of an artifact cost to write, in time: expectations for ``compress.progress``.

Round-to-nearest takes three times as long for a weight on one grid as on another, and a search for
scales ten times, so bytes alone say little about the time left. Before a large model is written,
each kind of tensor is tried on some rows: read, solved, thrown away.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from compress.calibration.propagation import PropagatedWeights
from compress.calibration.statistics import stored_block
from compress.decoder.config import split_name
from compress.grids import get_grid
from compress.machine import worker_threads
from compress.plan.shapes import Plan, PlanEntry, Weights
from compress.progress import Step

__all__ = ["expected_steps"]

SMALLEST = 1 << 26  # weights below which there is nothing to foresee
TRIED = 1 << 20  # weights of a trial: a hundredth of a second, on costly grids half a second
FLOAT = 4e-9  # seconds for a weight that only changes its type, or was solved before
MOVED = 2e-9  # seconds for a weight to be read, and for its code to be written
SEARCHED = 1e-7  # seconds for a weight whose scale is searched for ...
FED_BACK = 1e-10  # ... and for each column of its row, where errors are made up for there


def expected_steps(plans: Sequence[Plan], weights: Sequence[Weights], solver: str) -> list[Step]:
    """A step for each tensor of artifacts that are written together: part by part of the model,
    and in each part one artifact after the other.

    Args:
        plans: of the targets.
        weights: what their writers will pull from.
        solver: of the recipe.
    """
    if sum(count(entry) for plan in plans for entry in plan.entries) < SMALLEST:
        return []
    found: list[tuple[int, int, list[Step]]] = []
    for index, (plan, source) in enumerate(zip(plans, weights, strict=True)):
        costs: dict[str, float] = {}
        written = {row["weight"] for row in source.ledger}  # by a build that was cut off
        part = -1
        steps: list[Step] = []
        for entry in plan.entries:
            reached = part_of(source, entry, part)
            if reached != part:
                part, steps = reached, []
                found.append((part, index, steps))
            if entry.name in written:
                steps.append(Step(entry.nbytes, "written", 0.0))
            else:
                steps.append(expected_step(plan, entry, source, solver, steps, costs))
    found.sort(key=lambda group: group[:2])
    return [step for _, _, steps in found for step in steps]


def expected_step(
    plan: Plan,
    entry: PlanEntry,
    weights: Weights,
    solver: str,
    before: Sequence[Step],
    costs: dict[str, float],
) -> Step:
    """Of one tensor, in a part of the model of which others come ``before``.

    Args:
        costs: seconds per weight that are known by kind; what is tried goes there.
    """
    inner = split_name(entry.name)[0] is not None
    embedding, columns = entry.name.startswith("embed_tokens"), entry.shape[-1]
    matrix = len(entry.shape) > 1 and not entry.name.startswith("rope.")
    if not matrix:
        return Step(entry.nbytes, "float", FLOAT * count(entry) / entry.nbytes)
    if inner and isinstance(weights, PropagatedWeights):
        # All of a block is solved when its first matrix is asked for.
        if any(step.paid_first for step in before):
            return Step(entry.nbytes, "solved", FLOAT * count(entry) / entry.nbytes)
        block = weights.config.num_parameters / weights.config.num_hidden_layers
        cost = (SEARCHED + FED_BACK * columns) * block / entry.nbytes
        return Step(entry.nbytes, f"{plan.format} block", cost, paid_first=True)
    kind = f"{plan.format} {entry.grid}{' embedding' if embedding else ''}"
    if solver == "gptq" and not embedding:
        kind = f"{kind} {columns}"
        costs[kind] = SEARCHED + FED_BACK * columns
    elif kind not in costs:
        tries = not isinstance(weights, PropagatedWeights)  # which would have to walk for it
        costs[kind] = tried(entry, weights) if tries else SEARCHED
    return Step(entry.nbytes, kind, costs[kind] * count(entry) / entry.nbytes)


def tried(entry: PlanEntry, weights: Weights) -> float:
    """Seconds per weight, measured on the first rows."""
    grid, (rows, columns) = get_grid(entry.grid), entry.shape
    some = slice(0, min(rows, max(TRIED // columns // 32, 1) * 32))
    seconds = 0.0
    for _ in range(2):  # the first time also loads compiled kernels
        begin = time.process_time()  # on a busy machine less of a gamble than a clock
        weights.quantize(entry.name, grid, some).pack()
        seconds = (time.process_time() - begin) / worker_threads()
    return MOVED + seconds / (some.stop * columns)


def part_of(weights: Weights, entry: PlanEntry, before: int) -> int:
    """Where in the model a tensor is: 0 for the embedding, then the stored blocks from 1 on, at
    last the norm and the head. Tables that are computed are where the tensor before them is.
    """
    block, role, _ = split_name(entry.name)
    if block is not None:
        return 1 + stored_block(weights.config, block)
    if role in ("norm", "lm_head"):
        return 1 + weights.config.num_hidden_layers
    return 0 if role == "embed_tokens" else max(before, 0)


def count(entry: PlanEntry) -> int:
    """Weights of a tensor."""
    return math.prod(entry.shape)
