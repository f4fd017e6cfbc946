"""``README.md`` beside the artifacts: a Hugging Face model card, made from ``report.json``.

Metadata keys: https://huggingface.co/docs/hub/model-cards. Strings from a checkpoint are escaped
for where they stand: YAML, a table cell, a sentence, a fenced block.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from compress.formats import get_format
from compress.report.report import ArtifactReport, KlDivergence, Report
from compress.report.words import fenced, figure, label, pipe_table, sentence, size

HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


def model_card(report: Report) -> str:
    """The card, Markdown with a YAML head.

    Args:
        report: of a build.
    """
    model = report.model
    parts = [
        head(report),
        f"# {sentence(model.name)}: {', '.join(map(markdown_label, report.artifacts))}",
        f"{sentence(model.source)} ({model.parameters:,} parameters) written by "
        f"packlight {sentence(report.tool.version)} "
        f"with the recipe {sentence(report.recipe['name'])}.",
        verdict(report),
        "## Measured",
        table(report),
        measured(report),
        "## How to run",
        *(part for artifact in report.artifacts for part in how_to_run(artifact)),
        *notes(report),
        "## Made with",
        fenced(report.tool.command, "sh"),
        "All figures, per tensor too, are in `report.json`; `report.html` shows them.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def head(report: Report) -> str:
    """The YAML that the Hub reads; what is not known is left out."""
    model = report.model
    formats = list(dict.fromkeys(artifact.format for artifact in report.artifacts))
    facts: dict[str, Any] = {}
    # A local folder's name stands in for the Hub id that the folder is uploaded to.
    if HUB_ID.fullmatch(model.source):
        facts |= {"base_model": model.source, "base_model_relation": "quantized"}
    if model.license:
        facts["license"] = " ".join(model.license.split())  # no line may look like the end
    if formats:
        facts["library_name"] = formats[0]
    facts |= {"pipeline_tag": "text-generation", "tags": [*formats, "quantized", "packlight"]}
    text: str = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---"


def verdict(report: Report) -> str:
    """One sentence: did it pass."""
    lost = [markdown_label(artifact) for artifact in report.artifacts if artifact.failure]
    if lost:
        return f"**Failed**: {', '.join(lost)} could not be run."
    failed = [
        f"{markdown_label(artifact)}: {sentence(gate.name)}"
        for artifact in report.artifacts
        for gate in artifact.gates
        if not gate.passed
    ]
    if report.verdict == "not verified":
        return "**Not verified**: the files were written but not run."
    if report.verdict == "failed":
        return f"**Failed** its recipe's gates: {', '.join(failed) or 'answers are not numbers'}."
    gates = sum(len(artifact.gates) for artifact in report.artifacts)
    return f"**Passed** all {gates} gates of its recipe." if gates else "**Passed**."


def table(report: Report) -> str:
    """The measured figures, one artifact a line; a dash for what was not measured."""
    columns = ("artifact", "file", "size", "bits per weight", "perplexity", "÷ float",
               "KL divergence", "same top token", "decode, tokens/s", "peak memory")  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for found in report.artifacts:
        kl = found.kl_divergence or KlDivergence()
        rows.append(
            (
                markdown_label(found),
                sentence(found.path),
                size(found.bytes),
                f"{found.bits_per_weight:.3f}",
                figure(found.perplexity, found.perplexity_se),
                figure(found.perplexity_ratio, found.perplexity_ratio_se),
                figure(kl.mean, kl.se),
                figure(found.top1_agreement, found.top1_agreement_se, " %", 100),
                figure(found.decode_tokens_per_second),
                size(found.peak_memory_bytes),
            )
        )
    base = report.baseline
    rows.append(
        (
            f"float, {sentence(base.dtype)}",
            "–",
            size(base.bytes),
            f"{base.bytes * 8 / base.parameters:.3f}",
            figure(base.perplexity, base.perplexity_se),
            *["–"] * 3,
            figure(base.decode_tokens_per_second),
            "–",
        )
    )
    return pipe_table(columns, rows, left=2)


def measured(report: Report) -> str:
    """On what the figures were taken, and what ran each file."""
    baseline = report.baseline
    if baseline.tokens is None:
        return ""
    runtimes = [
        f"{markdown_label(artifact)} in {sentence(artifact.runtime)}"
        for artifact in report.artifacts
        if artifact.runtime
    ]
    return (
        f"Over {baseline.tokens:,} tokens in {baseline.windows} windows of the "
        f"{sentence(baseline.text)} text, each file as it was written ({'; '.join(runtimes)}), "
        "against the float model in float32. KL divergence is KL(float ‖ artifact) in nats per "
        "token; ± is one standard error over windows. Speed and memory are of the machine that "
        "made this, not of a phone."
    )


def how_to_run(artifact: ArtifactReport) -> list[str]:
    """A heading, and the shortest way to run an artifact."""
    how = get_format(artifact.format).how_to_run(artifact.path)
    return [f"### {markdown_label(artifact)}", *how]


def notes(report: Report) -> list[str]:
    """A heading and a list, or nothing."""
    lines = [f"- {sentence(note)}" for note in report.notes]
    for artifact in report.artifacts:
        lines += [f"- {markdown_label(artifact)}: {sentence(note)}" for note in artifact.notes]
    return ["## Notes", "\n".join(lines)] if lines else []


def markdown_label(artifact: ArtifactReport) -> str:
    """``GGUF Q4_K_M``, in Markdown."""
    return sentence(label(artifact))
