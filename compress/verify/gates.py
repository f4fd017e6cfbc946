"""Gates: limits on the measured figures of an artifact, and whether they are met."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.console import parse_bytes
from compress.errors import RecipeError, did_you_mean

# Name of a gate → path of its figure in an artifact of report.json.
METRICS: dict[str, tuple[str, ...]] = {
    "perplexity": ("perplexity",),
    "perplexity_ratio": ("perplexity_ratio",),
    "kl_divergence": ("kl_divergence", "mean"),
    "kl_divergence_p99": ("kl_divergence", "p99"),
    "kl_divergence_max": ("kl_divergence", "max"),
    "top1_agreement": ("top1_agreement",),
    "tokenizer_agreement": ("tokenizer_agreement",),
    "generation_consistent": ("generation_consistent",),
    "bytes": ("bytes",),
    "weights_bytes": ("weights_bytes",),
    "bits_per_weight": ("bits_per_weight",),
    "kv_cache_bytes_per_token": ("kv_cache_bytes_per_token",),
    "peak_memory_bytes": ("peak_memory_bytes",),
    "peak_anonymous_bytes": ("peak_anonymous_bytes",),
    "load_seconds": ("load_seconds",),
    "prefill_tokens_per_second": ("prefill_tokens_per_second",),
    "decode_tokens_per_second": ("decode_tokens_per_second",),
}

COMPARE = {
    "<=": lambda value, limit: value <= limit,
    ">=": lambda value, limit: value >= limit,
    "<": lambda value, limit: value < limit,
    ">": lambda value, limit: value > limit,
}


@dataclass(frozen=True)
class Limit:
    """A gate's limit, before anything is measured.

    Attributes:
        name: a key of ``METRICS``.
        text: as the recipe has it, ``<=1.8GiB``.
        operator: ``<=``, ``>=``, ``<`` or ``>``.
        number: bytes where the metric is bytes.
    """

    name: str
    text: str
    operator: str
    number: float


@dataclass(frozen=True)
class Gate:
    """A gate with its result; ``value`` is None where nothing was measured."""

    name: str
    limit: str
    value: float | None
    passed: bool


def parse(gates: Mapping[str, object]) -> list[Limit]:
    """Gates of a recipe, checked; call it before any work is done.

    Raises:
        RecipeError: an unknown metric or a limit that is none.
    """
    return [parse_one(name, str(limit)) for name, limit in gates.items()]


def parse_option(text: str) -> tuple[str, str]:
    """``--gate kl_divergence=<=0.05`` (or ``kl_divergence<=0.05``) → name and limit.

    Raises:
        RecipeError: neither.
    """
    match = re.fullmatch(r"\s*(\w+)\s*=?\s*([<>].*)", text)
    if not match:
        raise RecipeError(
            f"--gate {text}: write NAME=LIMIT", hint='--gate "kl_divergence=<=0.05" (in quotes)'
        )
    limit = parse_one(match[1], match[2])
    return limit.name, limit.text


def parse_one(name: str, text: str) -> Limit:
    """One gate: a metric's name and ``<=``, ``>=``, ``<`` or ``>`` with a number or a size.

    Raises:
        RecipeError: an unknown metric or a limit that is none.
    """
    where = f"verify.gates.{name}"
    if name not in METRICS:
        raise RecipeError(f"{where}: unknown metric", hint=did_you_mean(name, METRICS, "known"))
    return parse_limit(where, name, text)


def parse_limit(where: str, name: str, text: str) -> Limit:
    """A limit on the figure ``name``; ``where`` is what messages name.

    Raises:
        RecipeError: not a limit.
    """
    match = re.fullmatch(r"(<=|>=|<(?!=)|>(?!=))\s*(\S.*)", text.strip())
    if not match:
        raise RecipeError(
            f"{where}: {text!r} is not a limit", hint='write "<=1.06", ">=0.88" or "<=1.8GiB"'
        )
    try:
        number = float(match[2])
    except ValueError:
        number = parse_size(where, name, match[2])
    if not math.isfinite(number):
        raise RecipeError(f"{where}: {text!r} is not a limit", hint="write a finite number")
    return Limit(name, text.strip(), match[1], number)


def parse_size(where: str, name: str, text: str) -> float:
    """A limit with a unit, for the metrics that are bytes."""
    if "bytes" not in name:
        raise RecipeError(f"{where}: {text!r} is not a number", hint="only bytes take units")
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error


EXACT = Limit("tokenizer_agreement", ">=1", ">=", 1.0)
"""The gate of every artifact whose tokenizer was compared, unless its recipe sets another."""


def judge(limits: Sequence[Limit], artifact: object) -> list[Gate]:
    """Evaluate the limits, and ``EXACT``, on an artifact of a report.

    A figure that is missing, NaN or infinite never passes.
    """
    gates = []
    named = any(limit.name == EXACT.name for limit in limits)
    if not named and find(artifact, EXACT.name) is not None:
        limits = [*limits, EXACT]
    for limit in limits:
        value = find(artifact, limit.name)
        passed = value is not None and bool(COMPARE[limit.operator](value, limit.number))
        gates.append(Gate(limit.name, limit.text, value, passed))
    return gates


def find(artifact: object, name: str) -> float | None:
    """A metric's value in an artifact of a report; None when missing or not finite."""
    node: Any = artifact
    for key in METRICS[name]:
        node = getattr(node, key, None)
    if node is None or not math.isfinite(node):
        return None
    return float(node)
