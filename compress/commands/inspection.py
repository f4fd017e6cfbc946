"""``packlight inspect`` and ``packlight fit``: facts and arithmetic, no weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from compress.checkpoint.checkpoint import Checkpoint
from compress.console import Console, format_bytes
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
    tokens_per_second,
)
from compress.errors import UsageError
from compress.formats import get_format
from compress.plan.job import DEFAULT_CONTEXT, describe_model, find_artifacts, prepare
from compress.plan.shapes import bits_per_weight
from compress.recipe import load


def inspect(target: str, hub: Mapping[str, Any], console: Console) -> int:
    """Show a checkpoint or an artifact; ``-v`` lists the tensors."""
    found = find_artifacts(Path(target)) if Path(target).exists() else []
    if found:
        described = [get_format(name).describe(path) for name, path in found]
    else:
        described = [describe_checkpoint(Checkpoint.open(target, **hub))]
    console.result(described[0] if len(described) == 1 else described)
    for number, facts in enumerate(described):
        if number:
            console.data("")
        print_facts(facts, console)
    return 0


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint in the form in which exporters describe artifacts."""
    config = describe_model(checkpoint)
    window = config.sliding_window
    dtypes = sorted({info.dtype for info in checkpoint.tensors.values()})
    metadata = {
        "family": config.family,
        "blocks": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "heads": f"{config.num_attention_heads} ({config.num_key_value_heads} for keys and values)",
        "head size": config.head_dim,
        "feed-forward size": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "exported up to": config.max_context,
        "sliding window": window if window else "none",
        "rope": f"{config.rope.kind}, theta {config.rope.theta:g}, {config.rope.rotary_dim} dims",
        "embeddings": "tied" if config.tie_word_embeddings else "untied",
        "KV cache per token": format_bytes(config.kv_cache_bytes_per_token()) + " in float16",
        "dtype": ", ".join(dtypes),
        "files": len({info.file for info in checkpoint.tensors.values()}),
    }
    return {
        "format": "checkpoint",
        "name": checkpoint.source,
        "architecture": config.architecture,
        "parameters": config.num_parameters,
        "bytes": checkpoint.nbytes,
        "bits_per_weight": bits_per_weight(checkpoint.nbytes, config.num_parameters),
        "metadata": metadata,
        "tensors": [
            {"name": name, "shape": list(info.shape), "grid": info.dtype, "bytes": info.nbytes}
            for name, info in checkpoint.tensors.items()
        ],
    }


def print_facts(facts: Mapping[str, Any], console: Console) -> None:
    """Key and value, aligned; the tensors as a table when verbose."""
    head: dict[str, Any] = {
        "name": facts["name"],
        "format": facts["format"],
        "architecture": facts["architecture"],
        "parameters": f"{facts['parameters']:,}" if facts["parameters"] else "unknown",
        "size": format_bytes(facts["bytes"]),
    }
    if facts.get("bits_per_weight"):
        head["bits per weight"] = f"{facts['bits_per_weight']:.3f}"
    grids: dict[str, int] = {}
    for tensor in facts["tensors"]:
        grids[tensor["grid"]] = grids.get(tensor["grid"], 0) + 1
    head["tensors"] = ", ".join(f"{count} {grid}" for grid, count in sorted(grids.items()))
    rows = head | dict(facts["metadata"])
    width = max(map(len, rows))
    for key, value in rows.items():
        console.data(f"{key.ljust(width)}  {shorten(value)}")
    if console.verbose:
        console.data("")
        console.table(
            ["tensor", "shape", "grid", "bytes"],
            [
                [row["name"], "×".join(map(str, row["shape"])), row["grid"], f"{row['bytes']:,}"]
                for row in facts["tensors"]
            ],
        )


def shorten(value: Any, limit: int = 100) -> str:
    """One printable line of bounded length: metadata may hold templates and token lists."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


# --- fit -------------------------------------------------------------------------------------


def fit(
    target: str,
    console: Console,
    *,
    device: str | None,
    memory: int | None,
    context: int | None,
    recipe: str,
    overrides: Iterable[str],
    formats: Iterable[str],
    hub: Mapping[str, Any],
) -> int:
    """Weights + KV cache + activations against memory; 1 when nothing fits anywhere asked."""
    found = find_artifacts(Path(target)) if Path(target).exists() else []
    if found:
        needs = artifact_needs(found, context)
    else:
        job = prepare(
            Checkpoint.open(target, **hub),
            load(recipe, overrides, formats),
            context=context,
        )
        needs = []
        for plan in job.plans:
            embedding = embedding_bytes(job.shape, plan.entries)
            need = footprint(
                job.shape, plan.weights_bytes, embedding, job.context, plan.kv_bytes_per_value
            )
            needs.append((f"{plan.format} {plan.type_name}", job.shape, need))
    rows = []
    for label, config, need in needs:
        if memory is not None:
            rows.append(memory_row(label, config, need, memory))
        else:
            chosen = [get_device(device)] if device else list(devices().values())
            rows += [device_row(label, config, need, row) for row in chosen]
    console.result({"rows": rows})
    print_fit(rows, console)
    return 0 if any(row["verdict"] != "too large" for row in rows) else 1


def artifact_needs(
    found: list[tuple[str, Path]], context: int | None
) -> list[tuple[str, DecoderConfig, Footprint]]:
    """The footprint of each artifact, from its own metadata."""
    needs = []
    for name, path in found:
        facts = get_format(name).describe(path)
        if not facts["config"]:
            raise UsageError(
                f"{path} does not say what model it holds",
                hint="keep config.json beside it, or give the checkpoint instead",
            )
        config = DecoderConfig.from_hf(facts["config"])
        weights = sum(row["bytes"] for row in facts["tensors"])
        table = 0 if config.tie_word_embeddings else largest_embedding(facts["tensors"])
        if context is not None and context > config.max_context:
            most = f"the {config.max_context} positions of {path.name}"
            raise UsageError(f"--context {context} is more than {most}")
        # A Core ML package makes room for as many positions as it was built for.
        room = min(config.max_context, facts["context"] or config.max_context)
        positions = context or min(DEFAULT_CONTEXT, room)
        need = footprint(config, weights, table, positions, facts["kv_bytes_per_value"])
        label = name if path.name == name else f"{name} {path.name}"  # a folder called onnx
        needs.append((label, config, need))
    return needs


def largest_embedding(tensors: Iterable[Mapping[str, Any]]) -> int:
    """Bytes of the token embedding among described tensors."""
    names = ("embed_tokens", "token_embd")
    return sum(row["bytes"] for row in tensors if any(name in row["name"] for name in names))


def fit_row(label: str, config: DecoderConfig, need: Footprint, limit: int) -> dict[str, Any]:
    """What every row of the table has; bytes."""
    return {
        "artifact": label,
        "context": need.context,
        "weights_bytes": need.weights,
        "kv_cache_bytes": need.kv_cache,
        "activation_bytes": need.activations,
        "total_bytes": need.total,
        "limit_bytes": limit,
        "largest_context": largest_context(config, need, limit),
    }


def memory_row(label: str, config: DecoderConfig, need: Footprint, memory: int) -> dict[str, Any]:
    """Against a bare number of bytes."""
    verdict = "fits" if need.total <= memory else "too large"
    return fit_row(label, config, need, memory) | {"device": "memory", "verdict": verdict}


def device_row(label: str, config: DecoderConfig, need: Footprint, row: Device) -> dict[str, Any]:
    """Against what an app may hold on a device."""
    return fit_row(label, config, need, row.entitled) | {
        "device": row.name,
        "app_limit_bytes": row.app_limit,
        "verdict": judge(need, row),
        "tokens_per_second_bound": round(tokens_per_second(need, row), 1),
        "estimated": list(row.estimated),
    }


PARTS = {
    "weights": "weights_bytes",
    "KV cache": "kv_cache_bytes",
    "activations": "activation_bytes",
}


def print_fit(rows: list[dict[str, Any]], console: Console) -> None:
    """One block per artifact: what it needs, then a line per device."""
    if not rows:
        raise UsageError("nothing to fit")
    for label in dict.fromkeys(row["artifact"] for row in rows):
        mine = [row for row in rows if row["artifact"] == label]
        first = mine[0]
        console.data(f"{label} at {first['context']} tokens: {format_bytes(first['total_bytes'])}")
        for part, key in PARTS.items():
            console.data(f"  {part:<11}  {format_bytes(first[key])}")
        cells = [
            [
                row["device"],
                format_bytes(row["limit_bytes"]).split(" (")[0],
                str(row["largest_context"]),
                f"{row['tokens_per_second_bound']}" if "tokens_per_second_bound" in row else "-",
                row["verdict"],
            ]
            for row in mine
        ]
        headers = ["device", "limit", "context that fits", "tokens/s at most", "verdict"]
        console.table(headers, cells)
        console.data("")
