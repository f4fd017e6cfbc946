"""The memory that a job needs at least: the largest block, and the rest in pieces.

Everything else bends: hidden states go to a file, windows are scored in batches, and the float
model's speed is not measured where its weights do not fit (``compress.machine.available_memory``).
Runtimes that check an artifact take what they take, in processes of their own.
"""

from __future__ import annotations

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
WAITING = 48 << 20  # what a writer holds while another is at work
COPIES = 6  # float32 copies of the widest matrix while GPTQ is at it


def check_memory(
    job: Job,
    console: Console,
    *,
    limit: int | None,
    verify: bool,
    writes: bool = True,
    measures: bool = False,
) -> None:
    """Refuse a bound that is too small before any work.

    Args:
        job: what will be done.
        console: warned where no bound was set but the machine has less than is needed.
        limit: ``--max-memory``, bytes.
        verify: whether the float model is scored, too.
        writes: whether anything is written.
        measures: whether grids are chosen by measurement, whatever the recipe says.

    Raises:
        UsageError: a limit that the largest piece of the work does not fit in.
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
    """Bytes of this process at its largest, with everything that bends at its smallest."""
    recipe, config = job.recipe, job.config
    needs: list[int] = []
    if writes:
        alone = max(get_format(plan.format).writing_memory(plan) for plan in job.plans)
        needs.append(alone + WAITING * (len(job.plans) - 1))
    if writes and (measures or looks_at_inputs(recipe)):
        length = min(recipe.calibration.sequence_length, config.max_context)
        masks = {MASK_NEEDS.get(method_of(plan.settings) or "") for plan in job.plans}
        hessian = needs_of(recipe.solver) == "hessian" or recipe.folds or "hessian" in masks
        held = hessian_bytes(config) if hessian else 0
        if recipe.calibration.propagate == "quantized" and needs_of(recipe.solver):
            held = 2 * hessian_bytes(config) + block_bytes(config) // 2  # drifts, codes
        solving = COPIES * widest_matrix(config) if hessian else 0
        block = block_bytes(config) + activations(config, length)
        needs.append(TORCH + max(embedding_bytes(config), 2 * held + max(block, solving)))
    if verify:
        length = window_length(config, job.plans, recipe.sequence_length)
        logits = 3 * 4 * length * config.vocab_size
        block = block_bytes(config) + activations(config, length)
        needs.append(TORCH + max(block, embedding_bytes(config) + logits))
    return PYTHON + max(needs)


def embedding_bytes(config: DecoderConfig) -> int:
    """The embedding, or the head, as float32 and as it comes from the file."""
    return 6 * config.vocab_size * config.hidden_size


def block_bytes(config: DecoderConfig) -> int:
    """A block's linears in float32, and one of them as it comes from the file."""
    sizes = [rows * columns for rows, columns in map(config.weight_shape, config.linear_roles)]
    return 4 * sum(sizes) + 2 * max(sizes)


def widest_matrix(config: DecoderConfig) -> int:
    """The largest linear of a block in float32, or the square of its columns."""
    shapes = list(map(config.weight_shape, config.linear_roles))
    widths = [width for _, columns in shapes for width in span_widths(columns)]
    return 4 * max(max(rows * columns for rows, columns in shapes), max(widths) ** 2)


def activations(config: DecoderConfig, length: int) -> int:
    """What one window leaves behind on its way through a block, float32."""
    heads = config.num_attention_heads * config.head_dim
    return 4 * length * (3 * config.intermediate_size + 4 * heads + 4 * config.hidden_size)


def hessian_bytes(config: DecoderConfig) -> int:
    """Second moments of all inputs of a block, float32."""
    observed = set(map(input_roles(config).__getitem__, config.linear_roles))
    columns = [config.weight_shape(role)[1] for role in observed]
    return 4 * sum(width**2 for count in columns for width in span_widths(count))


def span_widths(columns: int) -> list[int]:
    """Columns of each diagonal block of a Hessian."""
    return [int(span.stop - span.start) for span in hessian_spans(columns)]
