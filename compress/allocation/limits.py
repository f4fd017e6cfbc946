"""The limit of a target's file: the budget's bytes, or its memory less cache and activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.console import format_bytes, parse_bytes
from compress.decoder.footprint import activation_bytes, get_device
from compress.errors import UsageError
from compress.formats import get_format
from compress.plan.job import Job
from compress.plan.shapes import Plan

if TYPE_CHECKING:
    from compress.recipe.model import Budget

__all__ = ["Limit", "limit_of"]


@dataclass(frozen=True)
class Limit:
    """The most bytes of a target's file.

    Attributes:
        nbytes: the bytes.
        description: a text on their source; empty for a plain budget of bytes.
    """

    nbytes: int
    description: str = ""


def limit_of(budget: Budget | None, job: Job, plan: Plan) -> Limit | None:
    """The limit of a target; None where the recipe has no budget.

    Args:
        budget: the recipe's; without ``memory``, a device's limit for one app is used.
        job: its context is used.
        plan: of the target, for the bytes of its KV cache.

    Raises:
        UsageError: cache and activations alone are more than the memory.
    """
    if budget is None:
        return None
    found = []
    if budget.weights is not None:
        found.append(Limit(parse_bytes(str(budget.weights))))
    device = get_device(budget.device) if budget.device is not None else None
    memory = None if budget.memory is None else parse_bytes(str(budget.memory))
    if memory is None and device is not None:
        memory = device.app_limit
    if memory is not None:
        where = f" on {device.label}" if device else ""
        found.append(memory_limit(memory, where, job, plan))
    return min(found, key=lambda limit: limit.nbytes) if found else None


def memory_limit(memory: int, where: str, job: Job, plan: Plan) -> Limit:
    """The memory left for weights while running, at the job's context."""
    config, context = job.source.config, job.context
    cache = context * config.kv_cache_bytes_per_token(plan.kv_bytes_per_value)
    prompt_call = get_format(plan.format).prompt_call
    activations = activation_bytes(config, context, prompt_call=prompt_call)
    description = (
        f"{format_bytes(memory)} of memory{where}: {format_bytes(cache)} KV cache at {context} "
        f"positions, {format_bytes(activations)} activations and runtime"
    )
    left = memory - cache - activations
    if left <= 0:
        raise UsageError(
            f"{plan.format}: nothing is left for weights of {description}",
            hint="a smaller --context",
        )
    return Limit(left, f"{description}, {format_bytes(left)} weights")
