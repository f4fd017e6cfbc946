"""Describes checkpoints and artifacts as plain data; reads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.checkpoint.checkpoint import Checkpoint
from compress.console import format_bytes
from compress.decoder.config import DecoderConfig
from compress.errors import UsageError
from compress.formats import get_format
from compress.plan.job import describe_model, find_artifacts
from compress.plan.shapes import bits_per_weight

__all__ = ["describe", "describe_checkpoint"]


def describe(target: str | Path, hub: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Describe the artifacts at a path, or else the checkpoint, with the keys of ``describe`` in
    ``compress.formats.MEMBERS``; a checkpoint lacks those about running it.

    Args:
        target: an artifact, the folder of a build, a checkpoint's folder, a Hub id or a URL.
        hub: ``revision``, ``token``, ``cache_dir`` and ``fetch``.

    Raises:
        ArtifactError, CheckpointError, UnsupportedModelError: it cannot be read, or is no decoder.
    """
    found = find_artifacts(Path(target)) if Path(target).exists() else []
    if found and hub.get("revision"):
        raise UsageError("--revision is for a Hub id, and this is an artifact")
    if found:
        return [get_format(name).inspect(path) for name, path in found]
    return [describe_checkpoint(Checkpoint.open(str(target), headers=True, **hub))]


def described_experts(config: DecoderConfig) -> dict[str, str]:
    """A line on the mixture of experts, if there is one."""
    e = config.experts
    if e is None:
        return {}
    shared = f", and one of width {e.shared_width} for every token" if e.shared_width else ""
    return {"experts": f"{e.count} of width {e.width}, {e.chosen} for each token{shared}"}


def described_layers(config: DecoderConfig) -> dict[str, str]:
    """A line on layers that convolve in place of attention, if there are any."""
    taps = [config.kinds[kind].taps for kind in config.layers]
    if not any(taps):
        return {}
    attending = taps.count(0)
    line = f"{attending} attend, {len(taps) - attending} convolve over {max(taps)} positions"
    return {"layers": line}


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe a checkpoint with the keys that exporters use for artifacts."""
    config = describe_model(checkpoint)
    window, rope = config.sliding_window, config.ropes[0]
    dtypes = sorted({info.dtype for info in checkpoint.tensors.values()})
    metadata = {
        "family": config.family,
        "blocks": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "heads": f"{config.num_attention_heads} ({config.num_key_value_heads} for keys and values)",
        "head size": config.head_dim,
        "feed-forward size": config.intermediate_size,
        **described_experts(config),
        **described_layers(config),
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "exported up to": config.max_context,
        "sliding window": window if window else "none",
        "rope": f"{rope.kind}, theta {rope.theta:g}, {rope.rotary_dim} dims",
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
