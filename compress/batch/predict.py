"""What one job will take, before it is started: bytes, memory, threads, time.

Memory decides what runs side by side, so it is meant to be an upper bound; time orders the jobs and
tells a person when to come back, and is right within a factor of two. Both from shapes alone, with
constants measured by benchmarks/full_size.py (0.5 to 3.8 billion parameters), solver_cost.py (the
solvers) and batch.py (tiny models, where processes and libraries are all there is).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from compress.arch import DecoderConfig, WeightMap
from compress.job import GENERATED_ROOM, Job, choose_threads, looks_at_inputs, window_length
from compress.model import Plan
from compress.solvers import NEEDS

__all__ = ["Prediction", "predict", "share_threads"]

# Resident bytes of a process that has loaded its libraries and nothing else.
PYTHON = 200_000_000  # with numpy, numba, onnx, jinja2
TORCH = 200_000_000
COREMLTOOLS = 280_000_000
SLAB = 150_000_000  # rows of one tensor that a writer has in hand
WRITER = {"gguf": 0.0, "onnx": 0.0, "coreml": 1.4}  # bytes more per weight of the largest tensor
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
# Per token and parameter: the float decoder, and each runtime's prefill.
FLOAT = 3.1e-11
RUN = {"gguf": 9e-12, "onnx": 7.5e-12, "coreml": 6.2e-11}
WALK = {"importance": 4.5e-11, "hessian": 7.8e-11}
MEASURED = 2000  # tokens of speed measurements and samples, beside the windows


@dataclass(frozen=True)
class Prediction:
    """What one job will take.

    Attributes:
        bytes: of the artifacts' weights, all formats.
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
        job: as ``compress.job.prepare`` makes it; no grid of a budget is chosen yet.
        verify: whether its artifacts are run.
        threads: as ``share_threads`` gives them.
    """
    memory = writing_memory(job)
    if looks_at_inputs(job.recipe):
        memory = max(memory, calibration_memory(job))
    if verify:
        memory = max(memory, baseline_memory(job), *(runtime_memory(job, p) for p in job.plans))
    formats = {plan.format for plan in job.plans}
    libraries = PYTHON + COREMLTOOLS * ("coreml" in formats)
    libraries += TORCH * (verify or looks_at_inputs(job.recipe))
    return Prediction(
        bytes=job.predicted_bytes,
        memory=int((libraries + memory) * MARGIN),
        threads=threads,
        seconds=cpu_seconds(job, verify=verify) / threads,
    )


def share_threads(config: DecoderConfig, wanted: int, cpus: int, jobs: int) -> int:
    """Threads of one job: as told, else what ``build`` would take, within its share of ``jobs``."""
    if wanted:
        return min(wanted, cpus)
    return min(choose_threads(0, config), max(1, cpus // jobs) if jobs else cpus)


# --- memory ------------------------------------------------------------------------------------


def writing_memory(job: Job) -> float:
    """Bytes while artifacts are written: a slab, and what Core ML's writer wants at once."""
    largest = largest_tensor(job.shape)
    return min(SLAB, 8 * largest) + max(WRITER[plan.format] * largest for plan in job.plans)


def largest_tensor(config: DecoderConfig) -> int:
    """Weights of the largest tensor as it is stored."""
    weights = WeightMap(config)
    return max(math.prod(weights.shape(name)) for name in weights.names())


def block_bytes(config: DecoderConfig) -> int:
    """Bytes of one block in float32."""
    roles = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return 4 * sum(
        math.prod(config.weight_shape(role)) for role in roles if role in config.linear_roles
    )


def calibration_memory(job: Job) -> float:
    """Bytes of a walk: a block, hidden states before and after it, second moments."""
    config, texts = job.config, job.recipe.calibration
    states: int = 8 * texts["tokens"] * config.hidden_size
    memory = block_bytes(config) + states
    if NEEDS.get(job.recipe.solver) == "hessian" or job.recipe.budget or job.recipe.prunes:
        memory += 8 * (config.intermediate_size**2 + 3 * config.hidden_size**2)
    if texts.get("propagate") == "quantized":
        memory += block_bytes(config) + states
    return memory


def baseline_memory(job: Job) -> float:
    """Bytes of the float model's answers: a block, hidden states, logits of one window."""
    config, recipe = job.config, job.recipe
    length = window_length(config, job.plans, recipe.sequence_length)
    states = 8 * recipe.windows * length * config.hidden_size
    return block_bytes(config) + states + 12 * length * config.vocab_size


def runtime_memory(job: Job, plan: Plan) -> float:
    """Bytes of the process that runs an artifact: its weights, cache and logits."""
    base, factor = RUNTIME[plan.format]
    length = window_length(job.config, job.plans, job.recipe.sequence_length)
    positions = max(job.context, length + GENERATED_ROOM)
    cache = positions * job.shape.kv_cache_bytes_per_token(plan.kv_bytes_per_value)
    return base + factor * plan.weights_bytes + cache + 12 * length * job.config.vocab_size


# --- time --------------------------------------------------------------------------------------


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
        tokens = recipe.windows * length
        seconds += weights * tokens * FLOAT
        seconds += sum(weights * (tokens + MEASURED) * RUN[plan.format] for plan in job.plans)
    return seconds
