"""``report.json``: the truth about one build. HTML, model card and console tables are made from it.

The document is plain data and obeys ``report.schema.json``. Numbers that are not finite become
null. Figures are rounded to seven digits, and gates are judged on the rounded figures, so that the
report never contradicts itself. Paths are relative to the report's folder.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from compress import __version__
from compress.decoder.config import DecoderConfig, split_name
from compress.errors import PacklightError
from compress.plan.shapes import Artifact, PlanEntry
from compress.verify import Outcome, Verified
from compress.verify.gates import Limit, judge
from compress.verify.generate import Generation
from compress.verify.quality import Quality, Series
from compress.verify.resources import Resources, Speed
from compress.verify.tasks import TaskScore

SCHEMA_VERSION = 1

FORMATS = {"gguf": "GGUF", "onnx": "ONNX", "coreml": "Core ML"}

Decode = Callable[[Sequence[int]], str]
"""Token ids → text."""


@dataclass(frozen=True)
class Baseline:
    """The float model, as far as no artifact knows it.

    Attributes:
        bytes: of the checkpoint's tensors.
        dtype: as stored: ``BF16``.
        runtime: what computed the float logits: ``torch 2.13.0+cpu, float32``.
        text: what was scored: a file's name, or ``built-in``.
        speed: of the float model with its weights in memory, or None when not measured.
    """

    bytes: int
    dtype: str
    runtime: str
    text: str
    speed: Speed | None = None


def build_report(
    *,
    model: Mapping[str, Any],
    recipe: Mapping[str, Any],
    command: str,
    context: int,
    baseline: Baseline,
    artifacts: Sequence[tuple[Artifact, Outcome]],
    limits: Sequence[Limit],
    folder: Path,
    decode: Decode | None = None,
    budget_bytes: int | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The document.

    Args:
        model: from ``model_facts``.
        recipe: as resolved (``Recipe.document``), with its ``name``.
        command: what makes this again, without local paths.
        context: positions that the KV cache is told for.
        baseline: the float model.
        artifacts: each with what became of it.
        limits: the recipe's gates.
        folder: where the report will stand; artifact paths are relative to it.
        decode: the tokenizer's, for the text sample.
        budget_bytes: of one artifact's file, where the recipe has a budget.
        notes: sentences about the whole build.
    """
    parameters = int(model["parameters"])
    entries = [
        describe_artifact(artifact, outcome, parameters, context, limits, folder, decode)
        for artifact, outcome in artifacts
    ]
    ran = (outcome for _, outcome in artifacts if isinstance(outcome, Verified))
    quality = next((verified.quality for verified in ran), None)
    document = {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "packlight", "version": __version__, "command": command},
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "python": platform.python_version(),
        },
        "model": dict(model),
        "recipe": dict(recipe),
        "context": context,
        "budget_bytes": budget_bytes,
        "baseline": describe_baseline(baseline, parameters, quality),
        "artifacts": entries,
        "verdict": verdict(entries),
        "notes": list(notes),
    }
    cleaned: dict[str, Any] = clean(document)
    return cleaned


def model_facts(
    config: DecoderConfig, source: str, revision: str | None = None, license: str | None = None
) -> dict[str, Any]:
    """The report's ``model``.

    Args:
        config: the decoder.
        source: Hub id, or the last part of a local path.
        revision: commit on the Hub.
        license: identifier from the model's own card, when it is known.
    """
    return {
        "name": source.rstrip("/").rsplit("/", 1)[-1],
        "source": source,
        "revision": revision,
        "license": license,
        "family": config.family,
        "architecture": config.architecture,
        "parameters": config.num_parameters,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_context": config.max_context,
    }


def describe_baseline(
    baseline: Baseline, parameters: int, quality: Quality | None
) -> dict[str, Any]:
    """The report's ``baseline``; what was not measured is None."""
    perplexity = quality.baseline_perplexity if quality else None
    return {
        "bytes": baseline.bytes,
        "dtype": baseline.dtype,
        "parameters": parameters,
        "runtime": baseline.runtime,
        "text": baseline.text,
        "windows": quality.windows if quality else None,
        "tokens": quality.tokens if quality else None,
        "perplexity": perplexity.value if perplexity else None,
        "perplexity_se": perplexity.se if perplexity else None,
        **describe_speed(baseline.speed),
    }


def describe_artifact(
    artifact: Artifact,
    outcome: Outcome,
    parameters: int,
    context: int,
    limits: Sequence[Limit],
    folder: Path,
    decode: Decode | None,
) -> dict[str, Any]:
    """One of the report's ``artifacts``."""
    verified = outcome if isinstance(outcome, Verified) else None
    failure = outcome.message if isinstance(outcome, PacklightError) else None
    base = folder.parent if artifact.path == folder else folder
    found: dict[str, Any] = {
        "format": artifact.format,
        "type": artifact.type_name,
        "path": artifact.path.relative_to(base).as_posix(),
        "bytes": artifact.nbytes,
        "weights_bytes": artifact.weights_bytes,
        "bits_per_weight": artifact.nbytes * 8 / parameters,
        "kv_cache_bytes_per_token": artifact.kv_cache_bytes_per_token,
        "kv_cache_bytes": artifact.kv_cache_bytes_per_token * context,
        "max_context": artifact.plan.max_context or None,
        **describe_quality(verified.quality if verified else None),
        **describe_resources(verified.resources if verified else None),
        **describe_generation(verified.generation if verified else None, decode),
        "tasks": [describe_task(task) for task in verified.tasks] if verified else [],
        "failure": failure,
        "notes": list(
            dict.fromkeys(
                [
                    *([f"It could not be run: {failure}"] if failure else []),
                    *artifact.plan.notes,
                    *artifact.notes,
                    *caveats(verified),
                ]
            )
        ),
        "tensors": [describe_tensor(entry) for entry in artifact.plan.entries],
    }
    found = clean(found)
    found["gates"] = [asdict(gate) for gate in judge(limits, found)] if verified else []
    return found


def caveats(verified: Verified | None) -> list[str]:
    """What a reader of the figures must know about what ran the artifact."""
    if verified and "evaluator" in verified.resources.runtime:
        return [
            f"Run by the {verified.resources.runtime}, not by the device's own runtime: quality is "
            "the file's, speed and memory are not a device's."
        ]
    return []


def describe_quality(quality: Quality | None) -> dict[str, Any]:
    """Figures against the baseline; all None when nothing was run."""
    if quality is None:
        return {
            "perplexity": None,
            "perplexity_se": None,
            "perplexity_ratio": None,
            "perplexity_ratio_se": None,
            "kl_divergence": None,
            "top1_agreement": None,
            "top1_agreement_se": None,
            "nonfinite_tokens": None,
            "kl_along_text": None,
            "kl_by_position": None,
        }
    return {
        "perplexity": quality.perplexity.value,
        "perplexity_se": quality.perplexity.se,
        "perplexity_ratio": quality.perplexity_ratio.value,
        "perplexity_ratio_se": quality.perplexity_ratio.se,
        "kl_divergence": {
            "mean": quality.kl_mean.value,
            "se": quality.kl_mean.se,
            "p99": quality.kl_p99.value,
            "p99_se": quality.kl_p99.se,
            "max": quality.kl_max,
        },
        "top1_agreement": quality.top1_agreement.value,
        "top1_agreement_se": quality.top1_agreement.se,
        "nonfinite_tokens": quality.nonfinite_tokens,
        "kl_along_text": describe_series(quality.kl_along_text),
        "kl_by_position": describe_series(quality.kl_by_position),
    }


def describe_series(series: Series) -> dict[str, Any]:
    """A curve, three digits a point."""
    return {
        "tokens_per_point": series.tokens_per_point,
        "mean": [float(f"{value:.3g}") for value in series.mean],
        "max": [float(f"{value:.3g}") for value in series.max],
    }


def describe_resources(resources: Resources | None) -> dict[str, Any]:
    """What running took; all None when nothing was run."""
    return {
        "runtime": resources.runtime if resources else None,
        "load_seconds": resources.load_seconds if resources else None,
        "startup_memory_bytes": resources.startup_memory_bytes if resources else None,
        "peak_memory_bytes": resources.peak_memory_bytes if resources else None,
        "peak_anonymous_bytes": resources.peak_anonymous_bytes if resources else None,
        **describe_speed(resources.speed if resources else None),
    }


def describe_speed(speed: Speed | None) -> dict[str, Any]:
    """Tokens per second, and how many tokens they were measured with."""
    return {
        "prefill_tokens_per_second": speed.prefill_tokens_per_second if speed else None,
        "decode_tokens_per_second": speed.decode_tokens_per_second if speed else None,
        "prefill_tokens": speed.prefill_tokens if speed else None,
        "decode_tokens": speed.decode_tokens if speed else None,
    }


def describe_generation(generation: Generation | None, decode: Decode | None) -> dict[str, Any]:
    """The greedy sample, and whether the KV cache is right."""
    if generation is None:
        return {"generation_consistent": None, "generation": None}
    return {
        "generation_consistent": generation.consistent,
        "generation": {
            "prompt_text": decode(generation.prompt) if decode else None,
            "text": decode(generation.tokens) if decode else None,
            "tokens": list(generation.tokens),
            "first_difference": generation.first_difference,
            "gap": generation.gap,
            "spread": generation.spread,
        },
    }


def describe_task(task: TaskScore) -> dict[str, Any]:
    """One task, the artifact beside the float model."""
    return {
        "name": task.name,
        "items": task.items,
        "accuracy": task.accuracy.value,
        "accuracy_se": task.accuracy.se,
        "accuracy_norm": task.accuracy_norm.value,
        "accuracy_norm_se": task.accuracy_norm.se,
        "baseline_accuracy": task.baseline_accuracy.value,
        "baseline_accuracy_se": task.baseline_accuracy.se,
        "baseline_accuracy_norm": task.baseline_accuracy_norm.value,
        "difference": task.difference.value,
        "difference_se": task.difference.se,
        "agreement": task.agreement.value,
        "agreement_se": task.agreement.se,
    }


TASK_HEADERS = ("task", "format", "items", "accuracy", "float", "difference", "same choice")


def task_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Lines of the console's table of tasks; ± is one standard error."""

    def percent(value: float, error: float | None, sign: str = "") -> str:
        return f"{value * 100:{sign}.1f}" + (f" ± {error * 100:.1f} %" if error else " %")

    return [
        [
            task["name"],
            artifact["format"],
            str(task["items"]),
            percent(task["accuracy"], task["accuracy_se"]),
            percent(task["baseline_accuracy"], task["baseline_accuracy_se"]),
            percent(task["difference"], task["difference_se"], "+"),
            percent(task["agreement"], task["agreement_se"]),
        ]
        for artifact in report["artifacts"]
        for task in artifact["tasks"]
    ]


def describe_tensor(entry: PlanEntry) -> dict[str, Any]:
    """One tensor of an artifact; ``block`` is None outside the blocks."""
    # What `packlight verify` reads back has the artifact's names only.
    name = entry.name or entry.target_name
    block, role, kind = split_name(entry.name) if entry.name else (None, name, "weight")
    return {
        "name": name,
        "block": block,
        "role": role if kind == "weight" else f"{role}.{kind}",
        "grid": entry.grid,
        "shape": list(entry.shape),
        "bytes": entry.nbytes,
        "bits_per_weight": entry.nbytes * 8 / math.prod(entry.shape),
        "note": entry.note,
    }


def verdict(artifacts: Sequence[Mapping[str, Any]]) -> str:
    """``passed`` when all were run and no gate failed, ``failed``, or ``not verified``."""
    if any(artifact["failure"] for artifact in artifacts):
        return "failed"
    if any(not gate["passed"] for artifact in artifacts for gate in artifact["gates"]):
        return "failed"
    if not artifacts or any(artifact["runtime"] is None for artifact in artifacts):
        return "not verified"
    if any(artifact["perplexity_ratio"] is None for artifact in artifacts):
        return "failed"  # it ran, and its answers are not numbers
    return "passed"


def artifact_label(artifact: Mapping[str, Any]) -> str:
    """``GGUF Q4_K_M``: how pages call an artifact of the report."""
    return f"{FORMATS[artifact['format']]} {artifact['type']}"


def decimals(error: float) -> int:
    """Places that show a standard error, and so its figure, to two digits: 0.0031 → 4."""
    return max(0, 1 - int(f"{error:e}".partition("e")[2]))


def clean(value: Any) -> Any:
    """Numbers that JSON can hold: seven digits, None for NaN and infinities; tuples are lists."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() and abs(value) >= 1e7 else float(f"{value:.7g}")
    if isinstance(value, Mapping):
        return {str(key): clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [clean(inner) for inner in value]
    return value


def schema() -> dict[str, Any]:
    """The JSON schema of ``report.json`` (draft 2020-12)."""
    text = files("compress.report").joinpath("report.schema.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document
