"""How long a verification will take: told before it starts, and the expectations it starts with.

Arithmetic with parameters and tokens, times what this machine needs for a product of matrices right
now: it may be another machine than the one that the constants were measured on, or a busy one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from compress.decoder.config import DecoderConfig
from compress.machine import default_threads
from compress.plan.shapes import Plan
from compress.progress import Estimate, Step
from compress.verify.agenda import Agenda, Run

__all__ = [
    "FLOAT", "Slowness", "artifact_seconds", "artifact_start", "artifact_steps", "float_steps",
    "slowness", "verification_seconds",
]  # fmt: skip

# Seconds of one core of the reference machine, per token and weight: the float decoder, and each
# runtime in a run of hundreds of tokens; by grid where that makes a difference. "coreml" is the MIL
# evaluator: Core ML itself, on a Mac, was never measured and will take less.
FLOAT = 1.6e-11
RUN = {"gguf": 2.9e-11, "onnx": 1.8e-11, "coreml": 1.65e-11}
GGUF_RUN = {
    "Q2_K": 1.9e-11, "Q3_K": 1.9e-11, "Q4_K": 1.9e-11, "Q5_K": 1.9e-11, "Q6_K": 1.9e-11,
    "IQ3_XXS": 1.9e-11, "IQ3_S": 1.9e-11, "IQ4_XS": 2.2e-11, "Q4_1": 5e-11, "Q5_0": 4e-11,
    "Q5_1": 5e-11, "F16": 4.2e-11, "BF16": 4.2e-11,
}  # fmt: skip
READ = 3e-9  # seconds per weight that the float decoder reads, however many tokens there are
# A run costs as much as if it had so many tokens more: weights are unpacked for it, however few.
MORE = {"gguf": 3.6, "onnx": 3.2}
# The MIL evaluator keeps so many weights as float32, or else so many as float16 and the others
# packed: seconds per weight and run.
AS_FLOAT32, AS_FLOAT16 = 1 << 28, 1 << 29
FROM_FLOAT32, FROM_FLOAT16, UNPACKED = 2.5e-10, 4.5e-10, 2.9e-9
BLOCK = {"gguf": 4e-5, "onnx": 8e-5, "coreml": 1.6e-3}  # seconds per block and run, for its calls
ROUNDED = 1.9e-8  # seconds per logit that the MIL evaluator rounds to float16
SOFTMAX = 8e-9  # seconds per float64 log-probability that is kept ...
COMPARED = 1.1e-8  # ... or compared with one that was kept
# Until a runtime has loaded an artifact: the process with its libraries, and each byte of weights.
START = {"gguf": 0.4, "onnx": 0.5, "coreml": 1.6}
LOADED = 1e-9
SIDE = 768  # of the square matrices that are multiplied to see how fast the machine is
PRODUCTS = 6
REFERENCE = 2 * SIDE**3 / 1.4e11  # seconds of one core for that, where the constants were measured


@dataclass(frozen=True)
class Slowness:
    """Seconds here and now for what takes one core of the reference machine a second.

    Attributes:
        runtime: in all threads of a runtime or the float decoder.
        alone: in one thread.
    """

    runtime: float = 1.0
    alone: float = 1.0


REFERENCE_CORE = Slowness()


def slowness(threads: int, clock: Callable[[], float] = time.perf_counter) -> Slowness:
    """Of ``threads`` threads, by some products of matrices in a twentieth of a second."""
    matrix = np.ones((SIDE, SIDE), np.float32)
    matrix @ matrix  # wakes the library's threads
    begin = clock()
    for _ in range(PRODUCTS):
        matrix @ matrix
    alone = (clock() - begin) / PRODUCTS / REFERENCE * default_threads()
    return Slowness(alone / min(threads, default_threads()), alone)


def verification_seconds(
    config: DecoderConfig, plans: Sequence[Plan], agenda: Agenda, slow: Slowness = REFERENCE_CORE
) -> float:
    """Seconds for the float model and all artifacts.

    Args:
        config: of the float model.
        plans: of the artifacts.
        agenda: what each is verified by.
        slow: by default, one core of the reference machine.
    """
    steps = float_steps(config, [len(agenda.windows)], max(agenda.windows), slow)
    seconds = sum(step.units * step.cost for step in steps)
    return seconds + sum(artifact_seconds(config, plan, agenda, slow) for plan in plans)


def artifact_seconds(config: DecoderConfig, plan: Plan, agenda: Agenda, slow: Slowness) -> float:
    """The same for one artifact alone."""
    steps, start = artifact_steps(config, plan, agenda, slow), artifact_start(plan, slow)
    return Estimate(steps, lambda: 0.0, start).seconds_left or 0.0


def artifact_start(plan: Plan, slow: Slowness) -> float:
    """Seconds until the runtime has loaded an artifact."""
    return slow.alone * (START[plan.format] + LOADED * plan.weights_bytes)


def artifact_steps(config: DecoderConfig, plan: Plan, agenda: Agenda, slow: Slowness) -> list[Step]:
    """What an artifact's tokens cost, from the first one on: a step for each of its runs."""
    steps = []
    for run in agenda.runs:
        kind = run.kind if run.kind == "decoded" else f"{run.kind} {run.tokens}"
        cost = run_seconds(config, plan, run, slow) / run.tokens
        steps.append(Step(run.tokens, kind, cost, until=run.until))
    return steps


def run_seconds(config: DecoderConfig, plan: Plan, run: Run, slow: Slowness) -> float:
    """Seconds of one run."""
    head = config.vocab_size * config.hidden_size
    weights = config.num_parameters - (0 if config.tie_word_embeddings else head)
    if run.kind in ("first", "read") and plan.format == "gguf":
        # llama.cpp does for the last token alone what follows the last block's attention.
        weights -= head
        weights -= int(0.75 * weights / config.num_hidden_layers)
    runs = run.tokens if run.kind == "decoded" else 1
    # Attention: products with the key and the value of every position, as if these were weights.
    width = config.num_attention_heads * config.head_dim
    attention = 2 * config.num_hidden_layers * width * run.tokens // runs
    seconds = run.tokens * (weights + attention) * seconds_per_weight(plan)
    seconds += runs * BLOCK[plan.format] * config.num_hidden_layers
    if plan.format == "coreml":
        seconds += run.tokens * ROUNDED * config.vocab_size
        seconds += runs * unpacking_seconds(weights, first=run.kind == "first")
    else:
        seconds += runs * MORE[plan.format] * weights * seconds_per_weight(plan)
    seconds *= slow.runtime
    if run.kind == "scored":
        seconds += slow.alone * run.tokens * COMPARED * config.vocab_size
    return seconds


def unpacking_seconds(weights: int, *, first: bool) -> float:
    """What the MIL evaluator takes for its weights in one run; ``first`` it unpacks them all."""
    if weights <= AS_FLOAT32:
        return weights * (FROM_FLOAT32 + first * UNPACKED)
    kept = min(weights, AS_FLOAT16)
    return kept * FROM_FLOAT16 + (weights if first else weights - kept) * UNPACKED


def seconds_per_weight(plan: Plan) -> float:
    """Of one token, the mean over an artifact's tensors."""
    run = RUN[plan.format]
    if plan.format != "gguf":
        return run
    counts = [(math.prod(entry.shape), entry.grid) for entry in plan.entries]
    seconds = sum(count * GGUF_RUN.get(grid, run) for count, grid in counts)
    return seconds / sum(count for count, _ in counts)


def float_steps(
    config: DecoderConfig, batches: Sequence[int], length: int, slow: Slowness = REFERENCE_CORE
) -> list[Step]:
    """What ``Decoder.stream_logits`` costs and when: blocks, then the head for each window.

    Args:
        config: of the float model.
        batches: windows in each.
        length: tokens of a window.
        slow: by default, one core of the reference machine.
    """
    head = config.vocab_size * config.hidden_size
    blocks = (config.num_parameters - head) / config.num_hidden_layers
    answer = length * (slow.runtime * FLOAT * head + slow.alone * SOFTMAX * config.vocab_size)
    steps = []
    for windows in batches:
        block = slow.runtime * (FLOAT * windows * length + READ) * blocks
        steps.append(Step(config.num_hidden_layers, f"block of {windows}", block))
        steps.append(Step(windows, "answer", answer))
    return steps
