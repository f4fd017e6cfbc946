"""``plan.json`` as pydantic models, and the output of ``--dry-run``.

``plan.schema.json`` is generated from here (``make docs``). Keys with default values are omitted.
The plan has no times: the same build has the same plan.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from compress import __version__
from compress.console import Console, format_bytes
from compress.errors import UsageError
from compress.files import read_bounded
from compress.plan.job import Job, looks_at_inputs
from compress.plan.shapes import bits_per_weight
from compress.recipe import needs_of
from compress.recipe.schema import Part, explain, json_schema

__all__ = [
    "CheckpointLock", "HighTensor", "Lock", "PlanDocument", "PlannedBudget", "PlannedTarget",
    "plan_document", "plan_schema", "print_plan",
]  # fmt: skip


class PlanTool(Part):
    """The tool that wrote the plan."""

    name: Literal["packlight"]
    version: str


class PlannedModel(Part):
    """The float model."""

    source: str = Field(description="Hub id or folder name.")
    revision: str = Field(description="Commit on the Hub; empty for a folder.")
    adapters: list[str] = Field(
        default=[], description="Merged LoRA adapters as given to --adapter, without local paths."
    )
    family: str
    parameters: int


class HighTensor(Part):
    """A tensor with clearly more bits per weight than the artifact's average."""

    name: str
    grid: str
    why: str


class PlannedBudget(Part):
    """The budget that grids were chosen for."""

    limit_bytes: int
    limit_is: str = Field(default="", description="Meaning of the limit, for messages.")
    smallest_bytes: int = Field(description="Size with every tensor on its smallest grid.")
    recommended_bytes: int = Field(
        default=0, description="Size of the smallest file with acceptable expected quality."
    )
    kept_high: list[HighTensor]


class PlannedTensor(Part):
    """One tensor of an artifact."""

    name: str = Field(
        description="The name in packlight: that of the checkpoint's tensor, or of joined ones."
    )
    target_name: str = Field(description="The name in the artifact.")
    grid: str
    shape: list[int]
    bytes: int
    note: str = Field(default="", description="Why the grid differs from the requested one.")


class PlannedTarget(Part):
    """One artifact."""

    type: str = Field(description="Type as in file names: Q4_K_M, int4-g32, lut4-g8.")
    settings: dict[str, Any] = Field(description="Settings of the recipe that the writer needs.")
    weights_bytes: int
    file_bytes: int = Field(
        default=0, description="Predicted size of the model files; 0: not predicted."
    )
    bits_per_weight: float = Field(description="Bits per weight of the tensors alone.")
    expected_kl_divergence: float | None = Field(
        default=None, description="Mean KL divergence predicted by a cost table, nats per token."
    )
    budget: PlannedBudget | None = None
    notes: list[str]
    tensors: list[PlannedTensor]


class CheckpointLock(Part):
    """Hashes of the checkpoint."""

    headers: str = Field(
        description="Hash of the config and of the names, types and offsets of all tensors."
    )
    files: dict[str, str] | None = Field(
        description="SHA-256 by file name; null: not hashed (see --provenance)."
    )


class Lock(Part):
    """Hashes of the inputs that determine a build's bytes."""

    versions: dict[str, str]
    checkpoint: CheckpointLock
    inputs: dict[str, str] = Field(description="SHA-256 of the calibration texts or the imatrix.")
    adapters: dict[str, dict[str, str]] = Field(
        default={}, description="SHA-256 of each adapter's files."
    )


class PlanDocument(Part):
    """The grid of each tensor, by target."""

    schema_version: Literal[1]
    tool: PlanTool
    model: PlannedModel
    prune: dict[str, Any] | None = Field(
        default=None, description="The recipe's section, and the number of remaining parameters."
    )
    quantize: dict[str, Any] = Field(description="The recipe's section, with its calibration.")
    targets: dict[str, PlannedTarget] = Field(description="Targets by format.")
    lock: Lock | None = Field(
        default=None, description="Hashes of the inputs; null in the output of --dry-run."
    )

    def to_dict(self) -> dict[str, Any]:
        """``plan.json`` as plain data."""
        return self.model_dump(exclude_defaults=True)

    @classmethod
    def load(cls, path: Path) -> PlanDocument:
        """Read a ``plan.json``; unknown keys are ignored.

        Raises:
            UsageError: missing, or not a plan.
        """
        hint = "--plan takes a plan.json"
        try:
            document = json.loads(read_bounded(path).decode("utf-8"))
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}", hint=hint) from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} is not JSON: {error}", hint=hint) from error
        try:
            return cls.model_validate(document, extra="ignore")
        except ValidationError as error:
            why = explain(error, "", document).message.removeprefix(": ")
            raise UsageError(f"{path} is not a plan of packlight: {why}", hint=hint) from None


def plan_document(job: Job, lock: Lock | None = None) -> PlanDocument:
    """``plan.json`` of a build.

    Args:
        job: with the grids of every target.
        lock: hashes of what the build is made from (``compress.output.lock``).
    """
    recipe, parameters = job.recipe.to_dict(), job.config.num_parameters
    prune = {**recipe["prune"], "parameters_left": job.shape.num_parameters} if job.cut else None
    inputs = {"calibration": recipe["calibration"]} if looks_at_inputs(job.recipe) else {}
    targets = {}
    for plan in job.plans:
        expected = plan.expected_divergence
        targets[plan.format] = PlannedTarget(
            type=plan.type_name,
            settings=plan.settings,
            weights_bytes=plan.weights_bytes,
            file_bytes=plan.file_bytes,
            bits_per_weight=round(bits_per_weight(plan.weights_bytes, parameters), 4),
            expected_kl_divergence=None if expected is None else float(f"{expected:.4g}"),
            budget=job.budgets.get(plan.format),
            notes=list(plan.notes),
            tensors=[
                PlannedTensor(
                    name=entry.name,
                    target_name=entry.target_name,
                    grid=entry.grid,
                    shape=list(entry.shape),
                    bytes=entry.nbytes,
                    note=entry.note,
                )
                for entry in plan.entries
            ],
        )
    return PlanDocument(
        schema_version=1,
        tool=PlanTool(name="packlight", version=__version__),
        model=PlannedModel(
            source=job.checkpoint.source,
            revision=job.checkpoint.revision,
            adapters=[adapter.label for adapter in job.checkpoint.adapters],
            family=job.config.family,
            parameters=parameters,
        ),
        prune=prune,
        quantize={**recipe["quantize"], **inputs},
        targets=targets,
        lock=lock,
    )


def plan_schema() -> str:
    """``plan.schema.json``."""
    return json_schema(PlanDocument, "packlight plan")


def print_plan(job: Job, console: Console) -> None:
    """``--dry-run``: print the bytes, the grids and the notes of each target; writes nothing."""
    console.result(plan_document(job).to_dict())
    parameters = job.config.num_parameters
    console.data(f"{job.checkpoint.source}: {job.config.family}, {parameters:,} parameters")
    for adapter in job.checkpoint.adapters:
        console.data(f"merged with the adapter {adapter.label}")
    if job.cut:
        left = job.shape.num_parameters
        console.data(f"pruned: {job.cut.describe()}, {left:,} parameters are left")
    rows = []
    for plan in job.plans:
        counts: dict[str, int] = {}
        for entry in plan.entries:
            counts[entry.grid] = counts.get(entry.grid, 0) + 1
        grids = ", ".join(f"{count} {grid}" for grid, count in sorted(counts.items()))
        bits = f"{bits_per_weight(plan.weights_bytes, parameters):.3f}"
        rows.append([plan.format, plan.type_name, format_bytes(plan.weights_bytes), bits, grids])
    console.table(["format", "type", "weights", "bits per weight", "tensors"], rows)
    if needs_of(job.recipe.solver):
        seen = job.recipe.to_dict()["calibration"]
        what = f"{seen['tokens']} tokens of {', '.join(seen['texts'])}"
        console.data(f"solver: {job.recipe.solver}, calibrated on {what}")
    else:
        console.data(f"solver: {job.recipe.solver}")
    if job.recipe.folds:
        console.data(f"channels: rescaled ({job.recipe.fold}) where that measures better")
    for plan in job.plans:
        for note in plan.notes:
            console.data(f"note ({plan.format}): {note}")
