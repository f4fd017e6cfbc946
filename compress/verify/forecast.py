"""How long a verification will take: told before it starts.

Arithmetic with parameters and tokens, times what this machine needs for a product of matrices right
now: it may be another machine than the one that the constants were measured on, or a busy one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from compress.arch import DecoderConfig
from compress.machine import default_threads
from compress.model import Plan
from compress.progress import Step

__all__ = [
    "FLOAT", "MEASURED", "RUN", "artifact_seconds", "float_steps", "slowness",
    "verification_seconds",
]  # fmt: skip

# Seconds of one core per token and parameter: the float decoder, and each runtime's prefill;
# measured by benchmarks/full_size.py.
FLOAT = 3.1e-11
RUN = {"gguf": 9e-12, "onnx": 7.5e-12, "coreml": 6.2e-11}
MEASURED = 2000  # tokens of speed measurements and samples, beside the windows
SOFTMAX = 2e-8  # seconds per float64 log-probability that is kept
SIDE = 768  # of the square matrices that are multiplied to see how fast the machine is
REFERENCE = 2 * SIDE**3 / 1.4e11  # seconds of one core for that, where the constants were measured


def verification_seconds(
    config: DecoderConfig, plans: Sequence[Plan], windows: int, length: int
) -> float:
    """Seconds of one core of the reference machine for the float model and all artifacts.

    Args:
        config: of the float model.
        plans: of the artifacts.
        windows: that are scored.
        length: tokens of each.
    """
    tokens = windows * length
    seconds = (FLOAT * config.num_parameters + SOFTMAX * config.vocab_size) * tokens
    return seconds + sum(artifact_seconds(config, plan, windows, length) for plan in plans)


def artifact_seconds(config: DecoderConfig, plan: Plan, windows: int, length: int) -> float:
    """The same for one artifact alone."""
    tokens = windows * length
    run = RUN[plan.format] * (tokens + MEASURED) * config.num_parameters
    return run + SOFTMAX * tokens * config.vocab_size


def slowness(threads: int) -> float:
    """Seconds of ``threads`` threads here and now for what takes the reference core one second."""
    matrix = np.ones((SIDE, SIDE), np.float32)
    seconds = math.inf
    for _ in range(3):
        begin = time.perf_counter()
        matrix @ matrix
        seconds = min(seconds, time.perf_counter() - begin)
    return seconds / REFERENCE * default_threads() / min(threads, default_threads())


def float_steps(config: DecoderConfig, batches: Sequence[int], length: int) -> list[Step]:
    """What ``Decoder.stream_logits`` costs and when: blocks, then the head for each window.

    Args:
        config: of the float model.
        batches: windows in each.
        length: tokens of a window.
    """
    head = config.vocab_size * config.hidden_size
    blocks = (config.num_parameters - head) / config.num_hidden_layers
    answer = length * (FLOAT * head + SOFTMAX * config.vocab_size)
    steps = []
    for windows in batches:
        block = FLOAT * windows * length * blocks
        steps.append(Step(config.num_hidden_layers, f"block of {windows}", block))
        steps.append(Step(windows, "answer", answer))
    return steps
