"""Writing one artifact without a build around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.build.write import in_parts
from compress.decoder.config import DecoderConfig
from compress.formats import get_format
from compress.plan.shapes import Artifact, Plan, PlanRequest, Writer
from compress.plan.weights import Weights


def plan_for(
    name: str, config: DecoderConfig, settings: Mapping[str, Any] = {}, **others: Any
) -> Plan:
    """The plan of a format; ``others`` as ``PlanRequest`` has them."""
    return get_format(name).plan(config, PlanRequest(settings, **others))


def put_all(writers: Sequence[Writer], written: Callable[[int], None] = lambda n: None) -> None:
    """What a build does: each tensor by its writer, but for those in its ledger."""
    for writer, entry in in_parts(writers):
        weights = writer.weights
        if entry.target_name in weights.ledger:
            written(entry.nbytes)
        else:
            weights.finish(entry, writer.file, writer.put(entry))


def write(
    plan: Plan, weights: Weights, folder: Path, written: Callable[[int], None] = lambda n: None
) -> Artifact:
    """All tensors of a plan, by its format's writer."""
    writer = get_format(plan.format).Writer(plan, weights, folder, written)
    put_all([writer], written)
    return writer.close()
