"""What to try after a failed gate: a line for each kind of failure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.console import short_bytes
from compress.formats import get_format
from compress.recipe import SOLVERS
from compress.verify.gates import parse_one

if TYPE_CHECKING:
    from compress.report.report import ArtifactReport, GateReport, Report

QUALITY = (
    "perplexity", "perplexity_ratio", "kl_divergence", "kl_divergence_p99", "kl_divergence_max",
    "top1_agreement",
)  # fmt: skip
SPEED = ("load_seconds", "prefill_tokens_per_second", "decode_tokens_per_second")
MEMORY = ("peak_memory_bytes", "peak_anonymous_bytes")
# A target's setting for the embedding's grid, and its value of 8 bits.
EIGHT_BITS = {"embedding_bits": "8", "embedding": "int8-g32"}
MORE = 1.15  # times the artifact's bytes: what a larger budget is suggested as


def what_to_try(report: Report) -> list[str]:
    """Lines for ``hint:``, each once, in the order of the failed gates."""
    lines = [
        line
        for artifact in report.artifacts
        for gate in artifact.gates
        if not gate.passed and (line := advice(report, artifact, gate))
    ]
    return list(dict.fromkeys(lines))


def advice(report: Report, artifact: ArtifactReport, gate: GateReport) -> str:
    """What to try for one failed gate; empty where no setting changes its figure."""
    name = gate.name.removeprefix("regression: ")
    if name in QUALITY:
        return better(report, artifact)
    if name in ("bytes", "weights_bytes", "bits_per_weight"):
        size = "SIZE"
        if name != "bits_per_weight" and name == gate.name:
            size = f"{int(parse_one(name, gate.limit).number)}B"
        return f"--budget {size} chooses a grid for every tensor within that size"
    if name in MEMORY:
        return "fewer positions (--context N), or --budget-memory SIZE"
    if name == "kv_cache_bytes_per_token":
        return "fewer key-value heads: --prune heads:25%"
    if name in SPEED:
        return "speed is this machine's: --threads N, or fewer bits (-r small-4bit)"
    return ""


def better(report: Report, artifact: ArtifactReport) -> str:
    """What makes an artifact's answers nearer to the float model's: calibration, then an embedding
    of 8 bits, then more bytes.
    """
    if not report.tool.command:
        return (
            "build it with a calibrated recipe (-r phone-4bit), an embedding of 8 bits, or a "
            "larger --budget"
        )
    solver = SOLVERS.get(report.recipe.get("quantize", {}).get("solver"))
    if solver is not None and solver.needs is None:
        return "calibrated codes: -r phone-4bit, or this recipe with --set quantize.solver=gptq"
    narrow = any(
        tensor.role == "embed_tokens" and tensor.bits_per_weight < 8 for tensor in artifact.tensors
    )
    settings = get_format(artifact.format).Settings.model_fields
    key = next((key for key in EIGHT_BITS if key in settings), None)
    if narrow and key:
        return f"an embedding of 8 bits: --set targets.{artifact.format}.{key}={EIGHT_BITS[key]}"
    size = short_bytes(artifact.bytes * MORE).replace(" ", "")
    return f"more bytes: -f {artifact.format} --budget {size}"
