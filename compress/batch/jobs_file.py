"""A jobs file as typed data; ``batch/schema.json`` is generated from here (``make docs``)."""

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
    """Options of `packlight build`, in its words."""

    model_config = ConfigDict(alias_generator=lambda name: name.replace("_", "-"))

    set: dict[str, Any] | None = Field(
        default=None,
        description="Keys of the recipe with their values, such as quantize.solver: gptq.",
    )
    adapter: list[str] | None = Field(
        default=None, description="LoRA adapters, merged into the model: PATH or PATH=WEIGHT."
    )
    calibration: list[str] | None = Field(default=None, description="Text or JSONL files.")
    eval_text: str | None = Field(default=None, description="UTF-8 text to score on.")
    imatrix: str | None = Field(default=None, description="A file with the importance of inputs.")
    budget: str | None = Field(default=None, description="Bytes of each target's file.")
    budget_memory: str | None = Field(default=None, description="Memory of each target.")
    device: str | None = Field(default=None, description="The memory budget of a device.")
    prune: str | None = Field(default=None, description="METHOD:AMOUNT.")
    plan: str | None = Field(default=None, description="Grids as in this plan.json.")
    allow_dense: bool | None = Field(
        default=None, description="Sparsity also in formats that store zeros."
    )
    context: int | None = Field(default=None, ge=32, description="Positions of the KV cache.")
    seed: int | None = Field(
        default=None, ge=0, description="Of the choice of calibration passages."
    )
    verify: bool | None = Field(default=None, description="false: write only.")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of a job.")
    memory: Annotated[str, AfterValidator(a_size)] | None = Field(
        default=None, description="What a job takes, where the prediction is known to be wrong."
    )

    def given(self) -> Iterator[tuple[str, Any]]:
        """Names and values of the options that are set."""
        return ((name, getattr(self, name)) for name in self.model_fields_set)


class ModelEntry(Section):
    """A model with recipes, formats or options of its own."""

    model: Text = Field(description="A folder, a Hub id or a pattern.")
    name: Name | None = Field(
        default=None,
        description="Its folder in the output tree; default: the last part of the model.",
    )
    revision: str = Field(default="", description="Branch, tag or commit of a Hub model.")
    recipes: Recipes | None = Field(
        default=None, description="Of this model; default: those of all."
    )
    formats: Formats | None = Field(
        default=None, description="Of this model; default: those of all."
    )
    options: Options = Field(default_factory=Options)


class Override(Section):
    """What some jobs do differently."""

    jobs: Text = Field(description="A pattern of names: MODEL/RECIPE, such as phi*/phone-4bit.")
    skip: bool | None = Field(default=None, description="Leave these jobs out.")
    formats: Formats | None = None
    options: Options = Field(default_factory=Options)


class JobsFile(Section):
    """What to build: every model with every recipe, in every format. Paths are relative to the
    file."""

    version: Literal[1] = Field(alias="schema", description="Version of this schema.")
    output: Text | None = Field(
        default=None,
        description="The output tree, DIR/MODEL/RECIPE for every job; default: the file's name "
        "without .yaml, beside it.",
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
        default=None, description="Targets; default: those of each recipe."
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
        description="A job for each, such as 1.8GiB: a curve of size and quality for every model "
        "and recipe.",
    )
    split: bool = Field(
        default=False,
        description="A job for each format, instead of one that reads each shard once for all of "
        "them.",
    )
    options: Options = Field(default_factory=Options, description="Of every job.")
    overrides: list[Override] = Field(
        default=[], description="What some jobs do differently; later ones over earlier ones."
    )


def jobs_schema() -> str:
    """``batch/schema.json``."""
    return json_schema(JobsFile, "packlight batch")
