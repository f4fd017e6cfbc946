"""Predicts bytes, memory, threads and time of a job.

Memory decides what runs side by side, so it is meant to be an upper bound; time orders the jobs, is
shown as an estimate, and is right within a factor of two. Both from shapes alone, with
constants measured by benchmarks/full_size.py (0.5 to 3.8 billion parameters), solver_cost.py (the
solvers) and batch.py (tiny models, where processes and libraries are all there is).
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.decoder.config import DecoderConfig
from compress.formats import get_format
from compress.grids import get_grid
from compress.grids.palette import Palette
from compress.plan.job import (
    GENERATED_ROOM,
    Job,
    choose_threads,
    looks_at_inputs,
    window_count,
    window_length,
)
from compress.plan.memory import smallest_memory
from compress.plan.shapes import Plan
from compress.recipe import needs_of

__all__ = ["Prediction", "predict", "share_threads"]

# Resident bytes of a process that has loaded its libraries and nothing else.
PYTHON = 200_000_000  # with numpy, numba, onnx, jinja2
TORCH = 200_000_000
MARGIN = 1.1

# Seconds of one core.
START = 6.0  # imports of all processes, report
# More, per weight and target, by what the solver needs: rtn, scale_search, gptq.
SOLVE = {None: 0.0, "importance": 15e-9, "hessian": 430e-9}
WALK = {"importance": 4.5e-11, "hessian": 7.8e-11}
SCORE = 2.5e-11  # per weight and token of the text, in the float model or any runtime


@dataclass(frozen=True)
class Prediction:
    """What one job will take.

    Attributes:
        bytes: of the artifacts' weights, all formats; of their files at most, with a budget.
        memory: bytes resident at the peak, of the job's processes together.
        threads: that it keeps busy.
        seconds: of wall time, if it has these threads for itself.
    """

    bytes: int
    memory: int
    threads: int
    seconds: float


def predict(job: Job, *, verify: bool, threads: int) -> Prediction:
    """The prediction for a job that was planned.

    Args:
        job: no grid of a budget is chosen yet.
        verify: whether its artifacts are run.
        threads: as ``share_threads`` gives them.
    """
    # Bounded by it (--max-memory), a build holds no more.
    memory = smallest_memory(job, verify=verify)
    if verify:  # what it keeps then, and the process beside it
        formats = [get_format(plan.format) for plan in job.plans]
        libraries = PYTHON + TORCH + max(row.process.library_bytes for row in formats)
        memory = max(memory, libraries + max(runtime_memory(job, plan) for plan in job.plans))
    return Prediction(
        bytes=sum(map(job.bytes_of, job.plans)),
        memory=int(memory * MARGIN),
        threads=threads,
        seconds=cpu_seconds(job, verify=verify) / threads,
    )


def share_threads(config: DecoderConfig, wanted: int, cpus: int, jobs: int) -> int:
    """Threads of one job: ``wanted``, else those of ``build``, within its share of ``jobs``."""
    if wanted:
        return min(wanted, cpus)
    return min(choose_threads(0, config), max(1, cpus // jobs) if jobs else cpus)


def runtime_memory(job: Job, plan: Plan) -> int:
    """Bytes of the process that runs an artifact: its weights, cache and logits."""
    process = get_format(plan.format).process
    length = window_length(job.config, job.plans, job.recipe.sequence_length)
    positions = max(job.context, length + GENERATED_ROOM)
    cache = positions * job.shape.kv_cache_bytes_per_token(plan.kv_bytes_per_value)
    logits = 12 * length * job.config.vocab_size
    return process.base_bytes + int(process.per_byte * job.bytes_of(plan)) + cache + logits


def cpu_seconds(job: Job, *, verify: bool) -> float:
    """Seconds of one core, as if nothing were cached."""
    weights, recipe = job.config.num_parameters, job.recipe
    seconds = START
    for plan in job.plans:
        process = get_format(plan.format).process
        palette = process.palette_seconds and any(
            isinstance(get_grid(entry.grid), Palette) for entry in plan.entries
        )
        rate = process.palette_seconds if palette else process.seconds_per_weight
        seconds += weights * (rate + SOLVE[needs_of(recipe.solver)])
    if looks_at_inputs(recipe):
        needs = needs_of(recipe.solver) or "importance"
        seconds += weights * recipe.calibration.tokens * WALK[needs]
    if verify:
        length = window_length(job.config, job.plans, recipe.sequence_length)
        count = window_count(job.config, recipe.windows)
        seconds += weights * count * length * SCORE * (1 + len(job.plans))
    return seconds
