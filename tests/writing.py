"""Writing one artifact without a build around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compress.build.write import put_tensors
from compress.decoder.config import DecoderConfig
from compress.formats import get_format
from compress.plan.shapes import Artifact, Plan, PlanRequest
from compress.plan.weights import Weights


def plan_for(
    name: str, config: DecoderConfig, settings: Mapping[str, Any] = {}, **others: Any
) -> Plan:
    """The plan of a format; ``others`` as ``PlanRequest`` has them."""
    return get_format(name).plan(config, PlanRequest(settings, **others))


def write(
    plan: Plan, weights: Weights, folder: Path, written: Callable[[int], None] = lambda n: None
) -> Artifact:
    """All tensors of a plan, by its format's writer."""
    writer = get_format(plan.format).Writer(plan, weights, folder, written)
    put_tensors([writer], written)
    return writer.close()
