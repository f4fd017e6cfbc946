"""Compares weights, KV cache and activations with the memory of devices; nothing is run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.checkpoint.checkpoint import Checkpoint
from compress.decoder.config import DecoderConfig
from compress.decoder.footprint import (
    Device,
    Footprint,
    devices,
    embedding_bytes,
    footprint,
    get_device,
    judge,
    largest_context,
    realistic_tokens_per_second,
    tokens_per_second,
)
from compress.errors import UsageError
from compress.formats import get_format
from compress.plan.job import DEFAULT_CONTEXT, find_artifacts, prepare
from compress.recipe import Recipe, load

__all__ = ["fit_rows"]


def fit_rows(
    target: str | Path,
    *,
    device: str | None = None,
    memory: int | None = None,
    context: int | None = None,
    recipe: str | Path | Recipe = "phone-4bit",
    overrides: Iterable[str] = (),
    formats: Iterable[str] = (),
    hub: Mapping[str, Any],
    adapters: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """A row for each artifact, or each target of the recipe, and each device; see ``fit_row``.

    Args:
        target: an artifact, the folder of a build, or a checkpoint.
        device: the only one; None: all of the table.
        memory: bytes, instead of devices.
        context: positions of the KV cache.
        recipe: that a checkpoint would be built with; this, ``overrides`` and ``formats`` as
            for ``compress.recipe.load``.
        hub: ``revision``, ``token``, ``cache_dir`` and ``fetch``.
        adapters: LoRAs on the checkpoint, as ``compress.checkpoint.merged.merge`` takes them.

    Raises:
        UsageError: no such device, a context that is too long, an artifact without a config, or
            one with adapters.
    """
    if device and memory:
        raise UsageError("--device and --memory exclude each other")
    found = find_artifacts(Path(target)) if Path(target).exists() else []
    if found and adapters:
        raise UsageError("--adapter goes with a checkpoint, this is an artifact")
    if found:
        needs = artifact_needs(found, context)
    else:
        needs = planned_needs(str(target), load(recipe, overrides, formats), context, hub, adapters)
    rows = []
    for label, config, need in needs:
        if memory is not None:
            rows.append(memory_row(label, config, need, memory))
        else:
            chosen = [get_device(device)] if device else list(devices().values())
            rows += [device_row(label, config, need, row) for row in chosen]
    return rows


def planned_needs(
    target: str,
    recipe: Recipe,
    context: int | None,
    hub: Mapping[str, Any],
    adapters: Sequence[str] = (),
) -> list[tuple[str, DecoderConfig, Footprint]]:
    """The footprint of each target of a recipe."""
    checkpoint = Checkpoint.open(target, adapters=adapters, headers=True, **hub)
    job = prepare(checkpoint, recipe, context=context, transforms={})
    needs = []
    for plan in job.plans:
        embedding = embedding_bytes(job.shape, plan.entries)
        need = footprint(
            job.shape,
            plan.weights_bytes,
            embedding,
            job.context,
            plan.kv_bytes_per_value,
            prompt_call=get_format(plan.format).prompt_call,
            outside=plan.weights_outside,
        )
        needs.append((f"{plan.format} {plan.type_name}", job.shape, need))
    return needs


def artifact_needs(
    found: list[tuple[str, Path]], context: int | None
) -> list[tuple[str, DecoderConfig, Footprint]]:
    """The footprint of each artifact, from its own metadata."""
    needs = []
    for name, path in found:
        facts = get_format(name).inspect(path)
        if not facts["config"]:
            raise UsageError(
                f"{path} does not say what model it holds",
                hint="keep config.json beside it, or give the checkpoint instead",
            )
        config = DecoderConfig.from_hf(facts["config"], context=facts["context"])
        weights = sum(row["bytes"] for row in facts["tensors"])
        table = 0 if config.tie_word_embeddings else largest_embedding(facts["tensors"])
        if context is not None and context > config.max_context:
            most = f"the {config.max_context} positions of {path.name}"
            raise UsageError(f"--context {context} is more than {most}")
        # Some runtimes allocate the cache for the number of positions given at build time.
        room = min(config.max_context, facts["context"] or config.max_context)
        positions = context or min(DEFAULT_CONTEXT, room)
        need = footprint(
            config,
            weights,
            table,
            positions,
            facts["kv_bytes_per_value"],
            prompt_call=get_format(name).prompt_call,
            outside=facts.get("weights_outside", False),
        )
        label = name if path.name == name else f"{name} {path.name}"  # a folder of that name
        needs.append((label, config, need))
    return needs


def largest_embedding(tensors: Iterable[Mapping[str, Any]]) -> int:
    """Bytes of the token embedding among described tensors."""
    names = ("embed_tokens", "token_embd")
    return sum(row["bytes"] for row in tensors if any(name in row["name"] for name in names))


def fit_row(label: str, config: DecoderConfig, need: Footprint, limit: int) -> dict[str, Any]:
    """The columns that every row of the table has; sizes in bytes."""
    return {
        "artifact": label,
        "context": need.context,
        "weights_bytes": need.weights,
        "weights_outside": need.outside,
        "kv_cache_bytes": need.kv_cache,
        "activation_bytes": need.activations,
        "total_bytes": need.total,
        "limit_bytes": limit,
        "largest_context": largest_context(config, need, limit),
    }


def memory_row(label: str, config: DecoderConfig, need: Footprint, memory: int) -> dict[str, Any]:
    """A row that compares a footprint with a number of bytes."""
    verdict = "fits" if need.total <= memory else "too large"
    return fit_row(label, config, need, memory) | {"device": "memory", "verdict": verdict}


def device_row(label: str, config: DecoderConfig, need: Footprint, row: Device) -> dict[str, Any]:
    """A row that compares a footprint with the memory an app may use on a device."""
    return fit_row(label, config, need, row.entitled) | {
        "device": row.name,
        "app_limit_bytes": row.app_limit,
        "verdict": judge(need, row),
        "tokens_per_second_bound": round(tokens_per_second(need, row), 1),
        "tokens_per_second_realistic": [
            round(speed, 1) for speed in realistic_tokens_per_second(need, row)
        ],
        "estimated": list(row.estimated),
        "limits_measured": row.limits_measured,
        "limits_source": row.source,
    }
