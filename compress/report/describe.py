"""Makes a ``Report`` from the artifacts and measurements of a build."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.decoder.config import DecoderConfig, split_name
from compress.errors import PacklightError
from compress.plan.shapes import Artifact, PlanEntry
from compress.report import report as typed
from compress.report.report import ArtifactReport, BaselineReport, ModelFacts, Report, TensorReport
from compress.report.words import tokenizes_otherwise
from compress.verify import Outcome, Verified
from compress.verify.agreement import Agreement
from compress.verify.gates import Limit, judge
from compress.verify.quality import Series
from compress.verify.resources import Speed
from compress.verify.stopping import ALL
from compress.verify.tasks import TaskScore

if TYPE_CHECKING:
    from compress.checkpoint.adapter import Adapter

__all__ = ["Baseline", "build_report", "model_facts"]

Decode = Callable[[Sequence[int]], str]
"""Token ids → text."""


@dataclass(frozen=True)
class Baseline:
    """Facts about the float model and its run.

    Attributes:
        bytes: of the checkpoint's tensors.
        dtype: as stored: ``BF16``.
        runtime: name and version: ``torch 2.13.0+cpu, float32``.
        text: name of the evaluation text's file, or ``built-in``.
        speed: of the float model with its weights in memory, or None when not measured.
    """

    bytes: int
    dtype: str
    runtime: str
    text: str
    speed: Speed | None = None


def build_report(
    *,
    model: ModelFacts,
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
) -> Report:
    """Make the report.

    Args:
        model: from ``model_facts``.
        recipe: as resolved (``Recipe.to_dict``), with its ``name``.
        command: the command line that repeats the build, without local paths.
        context: positions that KV cache sizes assume.
        baseline: the float model.
        artifacts: each with its measurements or failure.
        limits: the recipe's gates.
        folder: of the report; artifact paths are relative to it.
        decode: the tokenizer's, for the text sample.
        budget_bytes: of one artifact's file, where the recipe has a budget.
        notes: sentences about the whole build.
    """
    entries = [
        describe_artifact(artifact, outcome, model.parameters, context, limits, folder, decode)
        for artifact, outcome in artifacts
    ]
    ran = [outcome.quality for _, outcome in artifacts if isinstance(outcome, Verified)]
    measured: dict[str, Any] = speed_of(baseline.speed) if baseline.speed else {}
    if ran:
        quality = max(ran, key=lambda quality: quality.windows)  # the first of those with most
        perplexity = quality.baseline_perplexity
        measured |= {"windows": quality.windows, "tokens": quality.tokens}
        measured |= {"perplexity": perplexity.value, "perplexity_se": perplexity.se}
    return Report(
        schema_version=1,
        tool=typed.Tool(version=__version__, command=command),
        machine=typed.Machine(
            system=platform.system(),
            processor=platform.machine(),
            python=platform.python_version(),
        ),
        model=model,
        recipe=dict(recipe),
        context=context,
        budget_bytes=budget_bytes,
        baseline=BaselineReport(
            bytes=baseline.bytes,
            dtype=baseline.dtype,
            parameters=model.parameters,
            runtime=baseline.runtime,
            text=baseline.text,
            **measured,
        ),
        artifacts=entries,
        verdict=typed.verdict(entries),
        notes=list(notes),
    )


def model_facts(
    config: DecoderConfig,
    source: str,
    revision: str | None = None,
    license: str | None = None,
    adapters: Sequence[Adapter] = (),
) -> ModelFacts:
    """The report's ``model``.

    Args:
        config: the decoder.
        source: Hub id, or the last part of a local path.
        revision: commit on the Hub.
        license: identifier from the model's own card, when it is known.
        adapters: merged into it.
    """
    return ModelFacts(
        name=source.rstrip("/").rsplit("/", 1)[-1],
        source=source,
        revision=revision,
        adapters=[
            typed.AdapterFacts(
                source=adapter.source,
                revision=adapter.revision or None,
                weight=adapter.weight,
                sha256=adapter.sha256,
            )
            for adapter in adapters
        ],
        license=license,
        family=config.family,
        architecture=config.architecture,
        parameters=config.num_parameters,
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_context=config.max_context,
    )


def describe_artifact(
    artifact: Artifact,
    outcome: Outcome,
    parameters: int,
    context: int,
    limits: Sequence[Limit],
    folder: Path,
    decode: Decode | None,
) -> ArtifactReport:
    """One of the report's ``artifacts``; gates are evaluated where it was run."""
    verified = outcome if isinstance(outcome, Verified) else None
    failure = outcome.message if isinstance(outcome, PacklightError) else None
    base = folder.parent if artifact.path == folder else folder
    notes = [f"It could not be run: {failure}"] if failure else []
    notes += [*artifact.plan.notes, *artifact.notes]
    if verified and any(word in verified.resources.runtime for word in ("evaluator", "twin")):
        notes.append(
            f"Run by the {verified.resources.runtime}, not by the device's own runtime: quality is "
            "the file's, speed and memory are not a device's."
        )
    if verified and "decoded weights" in verified.resources.runtime:
        notes.append(
            f"Run by {verified.resources.runtime}: quality is of the file's weights, speed and "
            "memory are not a device's."
        )
    notes += verified.remarks if verified else ()
    if verified and verified.stopped != ALL:
        notes.append(f"Scored on {verified.quality.windows} windows of text: {verified.stopped}.")
    agreed = agreement_of(verified.agreement if verified else None)
    if difference := agreed.get("tokenizer_difference"):
        notes.append(f"Its tokenizer is not the checkpoint's: {tokenizes_otherwise(difference)}.")
    found = ArtifactReport(
        format=artifact.format,
        type=artifact.type_name,
        path=artifact.path.relative_to(base).as_posix(),
        bytes=artifact.nbytes,
        weights_bytes=artifact.weights_bytes,
        bits_per_weight=artifact.nbytes * 8 / parameters,
        kv_cache_bytes_per_token=artifact.kv_cache_bytes_per_token,
        kv_cache_bytes=artifact.kv_cache_bytes_per_token * context,
        max_context=artifact.plan.max_context or None,
        failure=failure,
        notes=list(dict.fromkeys(notes)),
        tensors=[describe_tensor(entry) for entry in artifact.plan.entries],
        **(figures_of(verified, decode) if verified else {}),
        **agreed,
    )
    if verified:
        found.gates = [typed.GateReport(**asdict(gate)) for gate in judge(limits, found)]
    return found


def figures_of(verified: Verified, decode: Decode | None) -> dict[str, Any]:
    """The report's figures measured by running an artifact."""
    quality, resources, sample = verified.quality, verified.resources, verified.generation
    fewer = {"windows": quality.windows, "stopped": verified.stopped}
    return {
        **(fewer if verified.stopped != ALL else {}),
        "perplexity": quality.perplexity.value,
        "perplexity_se": quality.perplexity.se,
        "perplexity_ratio": quality.perplexity_ratio.value,
        "perplexity_ratio_se": quality.perplexity_ratio.se,
        "kl_divergence": typed.KlDivergence(
            mean=quality.kl_mean.value,
            se=quality.kl_mean.se,
            p99=quality.kl_p99.value,
            p99_se=quality.kl_p99.se,
            max=quality.kl_max,
        ),
        "top1_agreement": quality.top1_agreement.value,
        "top1_agreement_se": quality.top1_agreement.se,
        "nonfinite_tokens": quality.nonfinite_tokens,
        "kl_along_text": describe_series(quality.kl_along_text),
        "kl_by_position": describe_series(quality.kl_by_position),
        "runtime": resources.runtime,
        "load_seconds": resources.load_seconds,
        "startup_memory_bytes": resources.startup_memory_bytes,
        "peak_memory_bytes": resources.peak_memory_bytes,
        "peak_anonymous_bytes": resources.peak_anonymous_bytes,
        **speed_of(resources.speed),
        "generation_consistent": sample.consistent,
        "generation": typed.Generation(
            prompt_text=decode(sample.prompt) if decode else None,
            text=decode(sample.tokens) if decode else None,
            tokens=list(sample.tokens),
            first_difference=sample.first_difference,
            gap=sample.gap,
            spread=sample.spread,
        ),
        "tasks": [describe_task(task) for task in verified.tasks],
    }


def agreement_of(agreement: Agreement | None) -> dict[str, Any]:
    """The report's figures of the tokenizer comparison."""
    if agreement is None:
        return {}
    first = agreement.first
    difference = first and typed.TokenizerDifference(
        text=first.text,
        add_special=first.add_special,
        expected=list(first.expected),
        found=list(first.found),
        texts=agreement.texts,
        differing=agreement.differing,
    )
    return {"tokenizer_agreement": agreement.share, "tokenizer_difference": difference}


def speed_of(speed: Speed) -> dict[str, Any]:
    """Tokens per second, and how many tokens they were measured with."""
    return {
        "prefill_tokens_per_second": speed.prefill_tokens_per_second,
        "decode_tokens_per_second": speed.decode_tokens_per_second,
        "prefill_tokens": speed.prefill_tokens,
        "decode_tokens": speed.decode_tokens,
    }


def describe_series(series: Series) -> typed.Series:
    """A curve, rounded to three digits."""
    return typed.Series(
        tokens_per_point=series.tokens_per_point,
        mean=[float(f"{value:.3g}") for value in series.mean],
        max=[float(f"{value:.3g}") for value in series.max],
    )


def describe_task(task: TaskScore) -> typed.TaskReport:
    """One task's scores of artifact and float model."""
    return typed.TaskReport(
        name=task.name,
        items=task.items,
        accuracy=task.accuracy.value,
        accuracy_se=task.accuracy.se,
        accuracy_norm=task.accuracy_norm.value,
        accuracy_norm_se=task.accuracy_norm.se,
        baseline_accuracy=task.baseline_accuracy.value,
        baseline_accuracy_se=task.baseline_accuracy.se,
        baseline_accuracy_norm=task.baseline_accuracy_norm.value,
        difference=task.difference.value,
        difference_se=task.difference.se,
        agreement=task.agreement.value,
        agreement_se=task.agreement.se,
    )


def describe_tensor(entry: PlanEntry) -> TensorReport:
    """One tensor of an artifact; ``block`` is None outside the blocks."""
    # In `packlight verify` entries have the artifact's tensor names only.
    name = entry.name or entry.target_name
    block, role, kind = split_name(entry.name) if entry.name else (None, name, "weight")
    return TensorReport(
        name=name,
        block=block,
        role=role if kind == "weight" else f"{role}.{kind}",
        grid=entry.grid,
        shape=list(entry.shape),
        bytes=entry.nbytes,
        bits_per_weight=entry.nbytes * 8 / math.prod(entry.shape),
        note=entry.note,
    )
