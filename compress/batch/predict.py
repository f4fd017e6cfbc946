"""Predicts bytes, memory, threads and time of a job.

Memory decides which jobs run at once, so it is an upper bound; time orders the jobs, is shown as an
estimate, and is right within a factor of two. Both follow from shapes alone, with constants
measured by benchmarks/full_size.py (0.5 to 3.8 billion parameters), solver_cost.py (the solvers)
and batch.py (tiny models, where processes and libraries dominate).
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

# Resident bytes of a process that has only loaded its libraries.
PYTHON = 200_000_000  # with numpy, numba, onnx, jinja2
TORCH = 200_000_000
MARGIN = 1.1

# Seconds on one core.
START = 6.0  # imports of all processes, report
# Additional seconds per weight and target, by what the solver needs: rtn, scale_search, gptq.
SOLVE = {None: 0.0, "importance": 15e-9, "hessian": 430e-9}
WALK = {"importance": 4.5e-11, "hessian": 7.8e-11}
SCORE = 2.5e-11  # per weight and token of the text, in the float model or any runtime


@dataclass(frozen=True)
class Prediction:
    """Predicted resources of one job.

    Attributes:
        bytes: of the artifacts' weights, all formats; with a budget, the most of their files.
        memory: peak resident bytes of the job's processes together.
        threads: that it uses.
        seconds: wall time, if no other job uses these threads.
    """

    bytes: int
    memory: int
    threads: int
    seconds: float


def predict(job: Job, *, verify: bool, threads: int) -> Prediction:
    """Predict the resources of a planned job.

    Args:
        job: before grids of a budget are chosen.
        verify: whether its artifacts are verified.
        threads: from ``share_threads``.
    """
    # Peak memory of a build with this value as --max-memory.
    memory = smallest_memory(job, verify=verify)
    if verify:  # its own memory, and that of the process that runs an artifact
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
    """Threads of one job: ``wanted``, else those of ``build``, at most the CPUs ÷ ``jobs``."""
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
    """Predicted seconds on one core, with an empty cache."""
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
