"""``report.json`` as pydantic models, the source of HTML, model card and console tables.

``report.schema.json`` is generated from here (``make docs``).

Numbers that are not finite are None. Figures are rounded to seven digits, and gates are evaluated
on the rounded figures, so that the report is consistent. Paths are relative to the report's folder.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
)

from compress.decoder.config_json import write_json
from compress.errors import ArtifactError
from compress.files import read_bounded
from compress.recipe.model import OneOfTheFormats
from compress.recipe.schema import Part, explain, json_schema

__all__ = [
    "ArtifactReport", "BaselineReport", "DeviceReport", "GateReport", "Generation", "HarnessFacts",
    "HarnessFigure", "KlDivergence", "Machine",
    "ModelFacts", "Report", "Series", "TaskReport", "TensorReport", "TokenizerDifference", "Tool",
    "report_schema",
]  # fmt: skip


def rounded(value: Any) -> Any:
    """A number rounded to seven digits; None for NaN and infinities."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) >= 1e7 else float(f"{value:.7g}")


# Integers stay integers: a limit on bytes is 640000000, not 640000000.0.
Number = Annotated[int | float, BeforeValidator(rounded), WithJsonSchema({"type": "number"})]
Figure = Annotated[
    int | float | None,
    BeforeValidator(rounded),
    WithJsonSchema({"type": ["number", "null"]}),
]
"""A figure, None where it was not measured."""
Count = Annotated[int, Field(ge=0)]
RATE = {
    "prefill": "Median speed of one batch into an empty cache.",
    "decode": "Median speed of single tokens after the prefill.",
}
BATCH, DECODED = "Length of the prefill batch.", "Number of decoded tokens."


class Tool(Part):
    """The tool that wrote the report."""

    name: Literal["packlight"] = "packlight"
    version: str
    command: str = Field(default="", description="That repeats the build; empty for verify.")


class Machine(Part):
    """The machine on which speed and memory were measured."""

    system: str
    processor: str
    python: str


class AdapterFacts(Part):
    """A LoRA adapter that was merged into the float model."""

    source: str = Field(description="Hub id or folder name.")
    revision: str | None = None
    weight: float = 1.0
    sha256: str = Field(default="", description="Hash of adapter_model.safetensors.")


class ModelFacts(Part):
    """The float model."""

    name: str = ""
    source: str = Field(description="Hub id or folder name.")
    revision: str | None = None
    adapters: list[AdapterFacts] = Field(
        default=[], exclude_if=lambda adapters: not adapters, description="Merged LoRA adapters."
    )
    license: str | None = None
    family: str = ""
    architecture: str = ""
    parameters: int = Field(default=1, ge=1)
    num_hidden_layers: Count = 0
    hidden_size: Count = 0
    vocab_size: Count = 0
    max_context: Count = 0

    @property
    def whole_source(self) -> str:
        """The source with its merged adapters: ``org/model + my-lora × 0.5``."""
        merged = [
            f" + {adapter.source}" + (f" × {adapter.weight:g}" if adapter.weight != 1 else "")
            for adapter in self.adapters
        ]
        return self.source + "".join(merged)


class BaselineReport(Part):
    """The float model as it was stored and run."""

    bytes: Count = Field(default=0, description="Size of the checkpoint's tensors.")
    dtype: str = ""
    parameters: int = 1
    runtime: str = ""
    text: str = ""
    windows: int | None = None
    tokens: int | None = Field(default=None, description="Number of scored positions.")
    perplexity: Figure = None
    perplexity_se: Figure = None
    prefill_tokens_per_second: Figure = Field(default=None, description=RATE["prefill"])
    decode_tokens_per_second: Figure = Field(default=None, description=RATE["decode"])
    prefill_tokens: int | None = Field(default=None, description=BATCH)
    decode_tokens: int | None = Field(default=None, description=DECODED)


class KlDivergence(Part):
    """KL(baseline ‖ artifact)."""

    mean: Figure = Field(default=None, description="Mean in nats per token.")
    se: Figure = None
    p99: Figure = Field(default=None, description="99th percentile over tokens.")
    p99_se: Figure = Field(default=None, description="Standard error by Woodruff's method.")
    max: Figure = Field(default=None, description="Largest value of a token.")


class Series(Part):
    """KL divergence in bins of positions."""

    tokens_per_point: int = Field(ge=1)
    mean: list[Figure]
    max: list[Figure]


class Generation(Part):
    """Greedy generation, compared with that of the float model."""

    prompt_text: str | None = None
    text: str | None = None
    tokens: list[Count] = Field(default=[])
    first_difference: int | None = Field(
        default=None, description="Index of the first token that differs."
    )
    gap: Figure = Field(
        default=None, description="Logit difference at that index; near zero is a tie."
    )
    spread: Figure = Field(
        default=None,
        description="Standard deviation of the logits at that index, the scale of `gap`.",
    )


class TaskReport(Part):
    """Results on multiple-choice questions, of the artifact and of the float model."""

    name: str = Field(description="File name without its suffix.")
    items: int = Field(ge=1)
    accuracy: Number = Field(description="Share of items whose most likely choice is the answer.")
    accuracy_se: Figure = Field(default=None, description="Binomial standard error, with n - 1.")
    accuracy_norm: Number = Field(
        description="Accuracy with log-likelihoods divided by the UTF-8 bytes of the choice."
    )
    accuracy_norm_se: Figure = None
    baseline_accuracy: Number
    baseline_accuracy_se: Figure = None
    baseline_accuracy_norm: Number
    difference: Number = Field(description="accuracy - baseline_accuracy.")
    difference_se: Figure = Field(
        default=None, description="Standard error from paired differences per item."
    )
    agreement: Number = Field(description="Share of items on which both choose the same answer.")
    agreement_se: Figure = None


class HarnessFigure(Part):
    """A metric of a task or group of lm-evaluation-harness."""

    task: str
    metric: str
    filter: str = Field(default="none", description="The harness's filter of answers.")
    items: int = Field(ge=1, description="Number of documents.")
    num_fewshot: Count = 0
    version: str = Field(default="", description="Version of the task in the harness.")
    higher_is_better: bool = True
    group: bool = Field(default=True, description="False for a task that is a part of a group.")
    value: Figure = Field(description="As the harness computes it.")
    value_se: Figure = Field(default=None, description="Standard error over documents.")
    baseline: Figure = Field(default=None, description="The float model's value.")
    baseline_se: Figure = None
    difference: Figure = Field(default=None, description="value - baseline.")
    difference_se: Figure = Field(
        default=None, description="Standard error from paired differences per document."
    )


class HarnessFacts(Part):
    """How the tasks of lm-evaluation-harness were run (packlight eval)."""

    version: str = Field(description="Version of lm-evaluation-harness.")
    tasks: list[str]
    num_fewshot: int | None = Field(
        default=None, description="Worked examples in each prompt; null: each task's own number."
    )
    limit: Number | None = Field(
        default=None, description="Documents of each task, or below 1 their share; null: all."
    )
    apply_chat_template: bool = False
    context: Count = Field(description="Number of positions that prompts and answers may take.")
    figures: list[HarnessFigure] = Field(default=[], description="The float model's.")


class TensorReport(Part):
    """One tensor of an artifact; ``block`` is None outside the blocks."""

    name: str
    block: int | None = None
    role: str = ""
    grid: str
    shape: list[Count]
    bytes: Count
    bits_per_weight: Number
    note: str = ""


class TokenizerDifference(Part):
    """The first text that the artifact tokenizes differently from the checkpoint."""

    text: str
    add_special: bool = Field(description="Whether the tokenizer's BOS and EOS tokens are added.")
    expected: list[Count] = Field(
        description="Token ids of the checkpoint's tokenizer in Hugging Face."
    )
    found: list[Count] = Field(description="Token ids of the artifact's tokenizer.")
    texts: Count = Field(default=1, description="Number of compared texts.")
    differing: Count = Field(default=1, description="Number of texts with different ids.")


class GateReport(Part):
    """A limit and the measured value; None if not measured."""

    name: str
    limit: str
    value: Figure
    passed: bool


class DeviceReport(Part):
    """Whether an artifact for an app fits into the memory of a device: arithmetic."""

    name: str = Field(description="As `packlight fit --device` takes it.")
    label: str
    app_limit_bytes: Count = Field(description="What an app may hold.")
    entitled_bytes: Count = Field(description="The same with increased-memory-limit.")
    limits_measured: bool = Field(description="Whether the limits were measured on this device.")
    verdict: Literal["fits", "with entitlement", "too large"]
    largest_context: Count = Field(description="Positions that fit with the entitlement.")
    tokens_per_second: list[Figure] = Field(description="Likely decode speed, from and to.")


class ArtifactReport(Part):
    """One artifact: its size, and its comparison with the float model."""

    format: Annotated[str, OneOfTheFormats()]
    type: str = Field(description="Type as in file names: Q4_K_M, int4-g32, lut4-g8.")
    path: Annotated[str, StringConstraints(pattern="^[^/]")] = Field(
        default="-", description="Path relative to this file."
    )
    bytes: Count = Field(description="Size of the model files: weights, graph, embedded tokenizer.")
    weights_bytes: Count = Field(default=0, description="Size of the packed tensors alone.")
    bits_per_weight: Number = Field(
        default=1, gt=0, description="bytes × 8 ÷ parameters of the float model."
    )
    kv_cache_bytes_per_token: Count = Field(
        default=0, description="Size of the keys and values of one position."
    )
    kv_cache_bytes: Count = Field(
        default=0, description="Size of the KV cache for `context` positions."
    )
    max_context: int | None = Field(
        default=None,
        description="Number of positions up to which the artifact agrees with the float model.",
    )
    windows: int | None = Field(
        default=None,
        exclude_if=lambda windows: windows is None,
        description="Windows that were scored, where the verdict stood before all were.",
    )
    stopped: str = Field(
        default="",
        exclude_if=lambda stopped: not stopped,
        description="Why no more were scored.",
    )
    perplexity: Figure = Field(default=None, description="exp of the mean negative log-likelihood.")
    perplexity_se: Figure = Field(
        default=None, description="Standard error over windows, as for every key ending in _se."
    )
    perplexity_ratio: Figure = Field(default=None, description="Artifact ÷ baseline.")
    perplexity_ratio_se: Figure = Field(
        default=None, description="Standard error from paired differences per token."
    )
    kl_divergence: KlDivergence | None = None
    top1_agreement: Figure = Field(
        default=None, description="Share of positions with the same most likely token."
    )
    top1_agreement_se: Figure = None
    nonfinite_tokens: int | None = Field(
        default=None, description="Number of positions with NaN or infinite logits."
    )
    kl_along_text: Series | None = None
    kl_by_position: Series | None = None
    runtime: str | None = Field(
        default=None, description="Name and version of the runtime that ran the artifact."
    )
    load_seconds: Figure = Field(
        default=None, description="Time until the runtime is ready to evaluate."
    )
    startup_memory_bytes: int | None = Field(
        default=None, description="Resident size of the process before loading."
    )
    peak_memory_bytes: int | None = Field(
        default=None,
        description="Largest resident size of a process that loads and runs the artifact.",
    )
    peak_anonymous_bytes: int | None = Field(
        default=None, description="The same, without pages of mapped files."
    )
    prefill_tokens_per_second: Figure = Field(default=None, description=RATE["prefill"])
    decode_tokens_per_second: Figure = Field(default=None, description=RATE["decode"])
    prefill_tokens: int | None = Field(default=None, description=BATCH)
    decode_tokens: int | None = Field(default=None, description=DECODED)
    tokenizer_agreement: Figure = Field(
        default=None,
        description="Share of texts for which the artifact's tokenizer and the checkpoint's, "
        "loaded by Hugging Face, return the same ids.",
    )
    tokenizer_difference: TokenizerDifference | None = None
    generation_consistent: bool | None = Field(
        default=None, description="Whether greedy tokens are equal with and without the KV cache."
    )
    generation: Generation | None = None
    tasks: list[TaskReport] = Field(
        default=[],
        description="Multiple-choice tasks (packlight verify --task); standard errors are over "
        "items.",
    )
    harness: list[HarnessFigure] = Field(
        default=[],
        exclude_if=lambda figures: not figures,
        description="Tasks of lm-evaluation-harness (packlight eval).",
    )
    activation_bytes: int | None = Field(
        default=None,
        exclude_if=lambda found: found is None,
        description="Allowance for activations in an app, for the memory of `devices`.",
    )
    weights_outside: bool = Field(
        default=False,
        exclude_if=lambda outside: not outside,
        description="Whether the system holds the weights outside the memory of an app.",
    )
    devices: list[DeviceReport] = Field(
        default=[],
        exclude_if=lambda devices: not devices,
        description="Devices that an artifact for an app fits on, at `context` positions.",
    )
    failure: str | None = Field(
        default=None, description="The error, if the artifact could not be run."
    )
    notes: list[str] = Field(default=[])
    tensors: list[TensorReport] = Field(default=[])
    gates: list[GateReport] = Field(default=[])

    def __repr__(self) -> str:
        return f"ArtifactReport({self.format} {self.type}, {self.bytes} bytes)"

    __str__ = __repr__


class Report(Part):
    """The artifacts of a build and their comparison with the float model.

    null: not measured, or not finite.

    Example:
        >>> report = Report.from_dict({
        ...     "schema_version": 1, "tool": {"version": "0.1.0"}, "model": {"source": "tiny"},
        ...     "baseline": {}, "verdict": "passed", "artifacts": [{
        ...         "format": "gguf", "type": "Q4_0", "bytes": 640,
        ...         "kl_divergence": {"mean": 0.03}}]})
        >>> report.passed, report["gguf"].kl_divergence.mean
        (True, 0.03)
    """

    schema_version: Literal[1]
    tool: Tool
    machine: Machine = Machine(system="", processor="", python="")
    model: ModelFacts
    recipe: dict[str, Any] = Field(
        default={"name": ""},
        description="The resolved recipe; see recipes/schema.json.",
        json_schema_extra={"required": ["name"]},
    )
    context: Count = Field(
        default=0, description="Number of positions for which `kv_cache_bytes` is given."
    )
    budget_bytes: int | None = Field(default=None, description="Maximum size of one artifact.")
    baseline: BaselineReport
    artifacts: list[ArtifactReport]
    harness: HarnessFacts | None = Field(default=None, exclude_if=lambda facts: facts is None)
    verdict: Literal["passed", "failed", "not verified"] = "not verified"
    notes: list[str] = Field(default=[])
    asked: str = Field(
        default="",
        description="SHA-256 of the build's settings and inputs, by which --resume recognizes a "
        "finished build.",
    )

    def __getitem__(self, format: str) -> ArtifactReport:
        """The artifact of a format, the first where there are several.

        Raises:
            KeyError: there is none.
        """
        for artifact in self.artifacts:
            if artifact.format == format:
                return artifact
        there = ", ".join(artifact.format for artifact in self.artifacts) or "nothing"
        raise KeyError(f"no {format} in this report, only {there}")

    @property
    def passed(self) -> bool:
        """Whether every artifact was run and no gate failed."""
        return self.verdict == "passed"

    def to_dict(self) -> dict[str, Any]:
        """``report.json`` as plain data: JSON types only."""
        return self.model_dump()

    @classmethod
    def from_dict(cls, document: Any, source: str = "the document") -> Report:
        """A report from the data of ``to_dict``, of this or an earlier version; unknown keys are
        ignored.

        Raises:
            ArtifactError: not a report.
        """
        try:
            return cls.model_validate(document, extra="ignore")
        except ValidationError as error:
            why = explain(error, source, document).message.removeprefix(f"{source}: ")
            raise ArtifactError(f"{source} is not a report of packlight: {why}") from None

    def save(self, path: str | Path) -> None:
        """Write ``report.json``: indented UTF-8."""
        write_json(Path(path), self.model_dump())

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a ``report.json``.

        Raises:
            ArtifactError: it cannot be read, or is not a report.
        """
        try:
            document = json.loads(read_bounded(Path(path)).decode("utf-8"))
        except OSError as error:
            raise ArtifactError(f"{path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{path} is not JSON") from error
        return cls.from_dict(document, str(path))

    def __repr__(self) -> str:
        made = ", ".join(f"{found.format} {found.type}" for found in self.artifacts)
        return f"Report({self.model.name}, {self.recipe['name']}: {self.verdict}; {made})"

    __str__ = __repr__


def verdict(artifacts: list[ArtifactReport]) -> Literal["passed", "failed", "not verified"]:
    """``passed`` when all were run and no gate failed, ``failed``, or ``not verified``."""
    if any(artifact.failure for artifact in artifacts):
        return "failed"
    if any(not gate.passed for artifact in artifacts for gate in artifact.gates):
        return "failed"
    if not artifacts or any(artifact.runtime is None for artifact in artifacts):
        return "not verified"
    if any(artifact.perplexity_ratio is None for artifact in artifacts):
        return "failed"  # it ran, and its logits are not finite
    return "passed"


def report_schema() -> str:
    """``report.schema.json``."""
    return json_schema(Report, "packlight report", "serialization")
