"""A jobs file as pydantic models; ``batch/schema.json`` is generated from here (``make docs``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag

from compress.console import parse_bytes
from compress.recipe.model import FormatName
from compress.recipe.schema import Name, Section, Text, Unique, json_schema

__all__ = ["JobsFile", "ModelEntry", "Options", "jobs_schema"]


def a_size(text: str) -> str:
    parse_bytes(text)
    return text


def sizes(texts: list[str]) -> list[str]:
    return [a_size(text) for text in texts]


Recipes = Annotated[
    list[Text], Field(min_length=1, json_schema_extra={"uniqueItems": True}), Unique
]
Formats = Annotated[
    list[FormatName], Field(min_length=1, json_schema_extra={"uniqueItems": True}), Unique
]


class Options(Section):
    """Options of `packlight build`, under the same names."""

    model_config = ConfigDict(alias_generator=lambda name: name.replace("_", "-"))

    set: dict[str, Any] | None = Field(
        default=None,
        description="Recipe keys and their values, such as quantize.solver: gptq.",
    )
    adapter: list[str] | None = Field(
        default=None, description="LoRA adapters to merge into the model: PATH or PATH=WEIGHT."
    )
    calibration: list[str] | None = Field(
        default=None, description="Text or JSONL files for calibration."
    )
    eval_text: str | None = Field(default=None, description="UTF-8 text to score on.")
    imatrix: str | None = Field(
        default=None, description="Imatrix file with the importance of inputs."
    )
    budget: str | None = Field(
        default=None, description="Maximum size of each target's file, e.g. 1.8GiB."
    )
    budget_memory: str | None = Field(
        default=None, description="Maximum memory of each target while running."
    )
    device: str | None = Field(
        default=None, description="Device whose memory limit is the budget, e.g. iphone-14."
    )
    prune: str | None = Field(default=None, description="METHOD:AMOUNT, e.g. ffn:25%.")
    plan: str | None = Field(default=None, description="plan.json whose grids are used.")
    allow_dense: bool | None = Field(
        default=None, description="Allow sparsity in formats that store zeros like other weights."
    )
    force: bool | None = Field(
        default=None, description="Build palettes whose codes are chosen without calibration."
    )
    context: int | None = Field(default=None, ge=32, description="Positions of the KV cache.")
    seed: int | None = Field(
        default=None, ge=0, description="Seed of the choice of calibration passages."
    )
    verify: bool | None = Field(
        default=None, description="false: write artifacts without running them."
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads of a job.")
    fetch: Literal["auto", "download", "streaming"] | None = Field(
        default=None, description="Weights of a Hub id or URL: downloaded, or read in ranges."
    )
    memory: Annotated[str, AfterValidator(a_size)] | None = Field(
        default=None, description="Peak memory of a job, to replace a wrong prediction."
    )

    def given(self) -> Iterator[tuple[str, Any]]:
        """Names and values of the options that are set."""
        return ((name, getattr(self, name)) for name in self.model_fields_set)


class ModelEntry(Section):
    """A model with its own recipes, formats or options."""

    model: Text = Field(description="A folder, a Hub id or a pattern.")
    name: Name | None = Field(
        default=None,
        description="Folder name in the output tree; default: the last part of `model`.",
    )
    revision: str = Field(default="", description="Branch, tag or commit of a Hub model.")
    recipes: Recipes | None = Field(
        default=None, description="Recipes of this model; default: the file's `recipes`."
    )
    formats: Formats | None = Field(
        default=None, description="Formats of this model; default: the file's `formats`."
    )
    options: Options = Field(default_factory=Options)


class Override(Section):
    """Settings of the jobs that match a pattern."""

    jobs: Text = Field(description="Pattern of job names MODEL/RECIPE, such as phi*/phone-4bit.")
    skip: bool | None = Field(default=None, description="true: do not run these jobs.")
    formats: Formats | None = None
    options: Options = Field(default_factory=Options)


class JobsFile(Section):
    """Models, recipes and formats to build in all combinations. Paths are relative to the file."""

    version: Literal[1] = Field(alias="schema", description="Version of this schema.")
    output: Text | None = Field(
        default=None,
        description="Folder of the output tree, DIR/MODEL/RECIPE for each job; default: the file's "
        "path without .yaml.",
    )
    models: list[
        Annotated[
            Annotated[Text, Tag("text")] | Annotated[ModelEntry, Tag("entry")],
            Discriminator(lambda given: "text" if isinstance(given, str) else "entry"),
        ]
    ] = Field(
        min_length=1, description="Folders, Hub ids, or patterns of folders such as ./shelf/*."
    )
    recipes: Recipes = Field(default=["phone-4bit"], description="Shipped recipes or YAML files.")
    formats: Formats | None = Field(
        default=None, description="Formats to build; default: the targets of each recipe."
    )
    budgets: (
        Annotated[
            list[Annotated[str, Field(pattern="^[0-9][0-9.]*[A-Za-z]*$")]],
            Field(min_length=1, json_schema_extra={"uniqueItems": True}),
            Unique,
            AfterValidator(sizes),
        ]
        | None
    ) = Field(
        default=None,
        description="Budgets, such as 1.8GiB, with one job for each: a curve of size and quality "
        "for every model and recipe.",
    )
    split: bool = Field(
        default=False,
        description="true: one job per format, instead of one job that reads each shard once for "
        "all formats.",
    )
    options: Options = Field(default_factory=Options, description="Options of every job.")
    overrides: list[Override] = Field(
        default=[], description="Settings of some jobs; later entries take precedence."
    )


def jobs_schema() -> str:
    """``batch/schema.json``."""
    return json_schema(JobsFile, "packlight batch")
