"""What one job will take, before it is started: bytes, memory, threads, time.

Memory decides what runs side by side, so it is meant to be an upper bound; time orders the jobs and
tells a person when to come back, and is right within a factor of two. Both from shapes alone, with
constants measured by benchmarks/full_size.py (0.5 to 3.8 billion parameters), solver_cost.py (the
solvers) and batch.py (tiny models, where processes and libraries are all there is).
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.allocation.chosen import Chosen
from compress.decoder.config import DecoderConfig
from compress.plan.job import (
    GENERATED_ROOM,
    GetExporter,
    Job,
    choose_threads,
    looks_at_inputs,
    window_count,
    window_length,
)
from compress.plan.memory import smallest_memory
from compress.plan.shapes import Plan
from compress.solvers import NEEDS
from compress.verify.agenda import Agenda
from compress.verify.forecast import verification_seconds

__all__ = ["Prediction", "predict", "share_threads"]

# Resident bytes of a process that has loaded its libraries and nothing else.
PYTHON = 200_000_000  # with numpy, numba, onnx, jinja2
TORCH = 200_000_000
COREMLTOOLS = 280_000_000
# A process that runs the artifact: what it has without it, and bytes per byte of weights.
RUNTIME = {
    "gguf": (80_000_000, 1.05),
    "onnx": (100_000_000, 1.65),
    "coreml": (290_000_000, 1.15),
}
MARGIN = 1.1

# Seconds of one core.
START = 6.0  # imports of all processes, report
WEIGHT = {"gguf": 17e-9, "onnx": 7e-9, "coreml": 11e-9}  # rounding and packing, per weight
PALETTE = 26e-9  # Core ML's palettes, per weight
SOLVE = {"rtn": 0.0, "scale_search": 15e-9, "gptq": 430e-9}  # more, per weight and target
WALK = {"importance": 4.5e-11, "hessian": 7.8e-11}


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


def predict(chosen: Chosen, get_exporter: GetExporter, *, verify: bool, threads: int) -> Prediction:
    """The prediction for a job that was planned.

    Args:
        chosen: the job, no grid of a budget chosen yet.
        get_exporter: format → its exporter.
        verify: whether its artifacts are run.
        threads: as ``share_threads`` gives them.
    """
    job = chosen.job
    # Bounded by it (--max-memory), a build holds no more.
    memory = smallest_memory(job, get_exporter, verify=verify)
    if verify:  # what it keeps then, and the process beside it
        coreml = any(plan.format == "coreml" for plan in job.plans)
        libraries = PYTHON + TORCH + COREMLTOOLS * coreml
        memory = max(memory, libraries + max(runtime_memory(chosen, plan) for plan in job.plans))
    return Prediction(
        bytes=chosen.predicted_bytes,
        memory=int(memory * MARGIN),
        threads=threads,
        seconds=cpu_seconds(job, verify=verify) / threads,
    )


def share_threads(config: DecoderConfig, wanted: int, cpus: int, jobs: int) -> int:
    """Threads of one job: as told, else what ``build`` would take, within its share of ``jobs``."""
    if wanted:
        return min(wanted, cpus)
    return min(choose_threads(0, config), max(1, cpus // jobs) if jobs else cpus)


def runtime_memory(chosen: Chosen, plan: Plan) -> int:
    """Bytes of the process that runs an artifact: its weights, cache and logits."""
    job = chosen.job
    base, factor = RUNTIME[plan.format]
    length = window_length(job.config, job.plans, job.recipe.sequence_length)
    positions = max(job.context, length + GENERATED_ROOM)
    cache = positions * job.shape.kv_cache_bytes_per_token(plan.kv_bytes_per_value)
    logits = 12 * length * job.config.vocab_size
    return base + int(factor * chosen.bytes_of(plan)) + cache + logits


def cpu_seconds(job: Job, *, verify: bool) -> float:
    """Seconds of one core, as if nothing were cached."""
    weights, recipe = job.config.num_parameters, job.recipe
    seconds = START
    for plan in job.plans:
        palette = plan.format == "coreml" and plan.type_name.startswith("lut")
        rate = PALETTE if palette else WEIGHT[plan.format]
        seconds += weights * (rate + SOLVE[recipe.solver])
    if looks_at_inputs(recipe):
        needs = NEEDS.get(recipe.solver, "importance")
        seconds += weights * recipe.calibration["tokens"] * WALK[needs]
    if verify:
        length = window_length(job.config, job.plans, recipe.sequence_length)
        count = window_count(job.config, recipe.windows)
        agenda = Agenda.of([length] * count, max(job.context, length + GENERATED_ROOM))
        seconds += verification_seconds(job.config, job.plans, agenda)
    return seconds
