"""The least memory that a job needs: the largest block, and everything else in pieces.

All other buffers adapt: hidden states go to a file, windows are scored in batches, and the float
model's speed is not measured where its weights do not fit (``compress.machine.available_memory``).
Runtimes that verify an artifact run in processes of their own and are not bounded.
"""

from __future__ import annotations

from collections.abc import Sequence

from compress.console import Console, format_bytes
from compress.decoder.config import DecoderConfig, hessian_spans, input_roles
from compress.errors import UsageError
from compress.formats import get_format
from compress.machine import available_memory, resident_memory
from compress.plan.job import Job, looks_at_inputs, window_length
from compress.recipe import MASK_NEEDS, method_of, needs_of

__all__ = ["check_memory", "smallest_memory"]

PYTHON = 256 << 20  # the interpreter, numpy, numba as it compiles the kernels for the first time
TORCH = 320 << 20  # its libraries and the tokenizer's
WAITING = 48 << 20  # buffers of each writer that waits while another writes
COPIES = 6  # float32 copies of the widest matrix during GPTQ


def check_memory(
    job: Job,
    console: Console,
    *,
    limit: int | None,
    verify: bool,
    writes: bool = True,
    measures: bool = False,
) -> None:
    """Refuse a memory limit that is too small, before any work.

    Args:
        job: that will be run.
        console: gets a warning where no limit was set but the machine has too little memory.
        limit: ``--max-memory``, bytes.
        verify: whether the float model is scored, too.
        writes: whether anything is written.
        measures: whether grids are chosen by measurement.

    Raises:
        UsageError: a limit below ``smallest_memory``.
    """
    needed = smallest_memory(job, verify=verify, writes=writes, measures=measures)
    if limit is not None and limit < needed:
        raise UsageError(
            f"--max-memory {format_bytes(limit)} is too little for this model",
            hint=f"--max-memory {-(-needed // 10**6)}MB is the smallest that works",
        )
    left = available_memory() + resident_memory()
    if left < needed:
        console.warning(
            f"this takes about {format_bytes(needed)} of memory, {format_bytes(left)} are left"
        )


def smallest_memory(job: Job, *, verify: bool, writes: bool = True, measures: bool = False) -> int:
    """The least peak memory of this process in bytes, with adaptable buffers at their minimum."""
    recipe, config = job.recipe, job.config
    needs: list[int] = []
    if writes:
        alone = max(get_format(plan.format).writing_memory(plan) for plan in job.plans)
        needs.append(alone + WAITING * (len(job.plans) - 1))
    # A block's linears in float32, and one of them at the checkpoint's dtype; and a token's
    # activations inside a block, float32.
    # Of the experts one matrix is in memory at a time.
    one = "experts.0.down_proj"
    roles = [r for r in config.linear_roles if not r.startswith("experts.") or r == one]
    sizes = [rows * columns for rows, columns in map(config.weight_shape, roles)]
    block = 4 * sum(sizes) + 2 * max(sizes)
    heads, width = config.num_attention_heads * config.head_dim, config.intermediate_size
    if config.experts is not None:
        width = max(config.experts.width, config.experts.shared_width)
    token = 4 * (3 * width + 4 * heads + 4 * config.hidden_size)
    if writes and (measures or looks_at_inputs(recipe)):
        length = min(recipe.calibration.sequence_length, config.max_context)
        masks = {MASK_NEEDS.get(method_of(plan.settings) or "") for plan in job.plans}
        hessian = needs_of(recipe.solver) == "hessian" or recipe.folds or "hessian" in masks
        inputs, widest = hessian_bytes(config, roles)
        held = inputs if hessian else 0
        if recipe.calibration.propagate == "quantized" and needs_of(recipe.solver):
            held = 2 * inputs + block // 2  # drifts, codes
        solving = COPIES * max(4 * max(sizes), widest) if hessian else 0
        needs.append(
            TORCH + max(embedding_bytes(config), 2 * held + max(block + length * token, solving))
        )
    if verify:
        length = window_length(config, job.plans, recipe.sequence_length)
        logits = 3 * 4 * length * config.vocab_size
        needs.append(TORCH + max(block + length * token, embedding_bytes(config) + logits))
    return PYTHON + max(needs)


def embedding_bytes(config: DecoderConfig) -> int:
    """Bytes of the embedding, or the head, in float32 and at the checkpoint's dtype."""
    return 6 * config.vocab_size * config.hidden_size


def hessian_bytes(config: DecoderConfig, roles: Sequence[str]) -> tuple[int, int]:
    """Bytes of the Hessians of all inputs of some linears, and of the widest diagonal block,
    float32."""
    leaders, inputs = input_roles(config), {}
    for role in roles:
        group, dot, last = role.rpartition(".")
        if last in leaders:  # a router has none
            inputs[f"{group}{dot}{leaders[last]}"] = role
    columns = [config.weight_shape(role)[1] for role in inputs.values()]
    spans = [4 * (s.stop - s.start) ** 2 for width in columns for s in hessian_spans(width)]
    return sum(spans), max(spans)
