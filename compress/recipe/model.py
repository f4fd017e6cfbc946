"""The recipe as a pydantic model: type, default and description of each key.

``recipes/schema.json`` is generated from here (``make docs``). The settings of a format
(``targets.<format>``) are typed by its exporter, found through ``FORMATS``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    Field,
    PlainValidator,
    Tag,
    ValidationError,
    create_model,
)
from pydantic_core import PydanticCustomError

from compress.console import parse_bytes
from compress.formats import FORMATS
from compress.recipe import BUILTIN_SOLVERS, load, put, solver_names
from compress.recipe.schema import Name, Section, Text, explain, json_schema
from compress.recipe.sections import (
    Auto,
    Budget,
    Calibration,
    Heal,
    Keep,
    Prune,
    TargetSettings,
    Verify,
    kind_of,
    none_if_empty,
)

__all__ = [
    "Budget", "Calibration", "FormatName", "Heal", "Prune", "Quantize", "Recipe", "TargetSettings",
]  # fmt: skip

# Expected form of a text, by the last or first part of its path, for errors.
PATTERNS = (
    ("verify.windows", "a number of windows, or auto"),
    ("quantize.keep", 'the fewest bits, such as ">=6"'),
    ("quantize.candidates", "auto, or a list such as [Q4_K, Q6_K]"),
    ("budgets", "such as 1.8GiB"),
    ("sparsity", "none, 2of4 or a share such as 0.5"),
    ("", "such as int4-g32, int8-channel, lut4-g8"),
)


def a_format(given: str) -> str:
    if given not in (known := list(FORMATS)):
        raise PydanticCustomError("unknown_value", "{known}", {"known": known})
    return given


def a_solver(given: str) -> str:
    if given not in BUILTIN_SOLVERS and given not in (known := solver_names()):
        raise PydanticCustomError("unknown_value", "{known}", {"known": known})
    return given


class OneOfTheFormats:
    """Adds the registered formats to the JSON schema as an enum."""

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": list(FORMATS)}


FormatName = Annotated[str, AfterValidator(a_format), OneOfTheFormats()]
SolverName = Annotated[
    str, AfterValidator(a_solver), Field(json_schema_extra={"examples": list(BUILTIN_SOLVERS)})
]


def targets_model() -> type[Section]:
    """The model of the recipe's ``targets``: one key for each registered format."""
    fields: dict[str, Any] = {name: (row.Settings | None, None) for name, row in FORMATS.items()}
    return create_model("Targets", __base__=Section, **fields)


def read_targets(given: Any) -> dict[str, dict[str, Any]]:
    """Settings by format, validated by each format's model, with defaults, in the given order."""
    found = targets_model().model_validate(given)
    if not given:
        raise ValueError(f"name at least one of {', '.join(sorted(FORMATS))}")
    return {
        name: (getattr(found, name) or FORMATS[name].Settings()).model_dump(exclude_none=True)
        for name in given
    }


class Quantize(Section):
    """The solver that chooses codes, and the grids it may use."""

    solver: SolverName = Field(
        default="rtn",
        description="The solver that chooses codes. rtn: from the weights alone; scale_search: "
        "also from the importance of the inputs; gptq: also compensates rounding "
        "errors in later columns; or a solver registered by another package.",
    )
    candidates: (
        Annotated[
            Annotated[Auto, Tag("auto")] | Annotated[list[Text], Field(min_length=1), Tag("grids")],
            kind_of("auto", "grids"),
        ]
        | None
    ) = Field(
        default=None,
        description="Grids from which a budget chooses, of any format (Q4_K, int4-g32, lut4-g8 …); "
        "auto, the default: those that each format's runtime executes efficiently.",
    )
    keep: Keep | None = None
    fold: Literal["none", "awq"] = Field(
        default="none",
        description="awq: scale up columns with important inputs before rounding, and scale down "
        "the inputs in the weights that produce them; used where the measured error "
        "is lower. Not with rtn.",
    )


class Recipe(Section):
    """The settings of a build: targets, calibration, quantization, verification and gates.

    ```yaml
    schema: 1
    targets: {gguf: {type: Q4_K_M}}
    quantize: {solver: gptq}
    ```

    >>> Recipe.load("int4-fast").set("targets.gguf.type", "Q4_0").targets["gguf"]
    {'type': 'Q4_0'}
    """

    version: Literal[1] = Field(alias="schema", description="Version of this schema.")
    name: Name = Field(default="recipe", description="Name of the recipe in reports.")
    description: str | None = Field(
        default=None, description="One line, printed by `packlight recipes`."
    )
    budget: Annotated[Budget | None, AfterValidator(none_if_empty)] = None
    targets: Annotated[dict[str, dict[str, Any]], PlainValidator(read_targets)] = Field(
        default_factory=dict, validate_default=True
    )
    calibration: Calibration = Field(default_factory=Calibration)
    allow_dense: bool = Field(
        default=False,
        description="Allow sparsity in formats that store zeros like other weights, for "
        "experiments.",
    )
    prune: Prune | None = None
    quantize: Quantize = Field(default_factory=Quantize)
    verify: Verify = Field(default_factory=Verify)

    @property
    def solver(self) -> str:
        """Name of the solver."""
        return self.quantize.solver

    @property
    def fold(self) -> str:
        """``awq``: channels are scaled before codes are chosen; ``none``."""
        return self.quantize.fold

    @property
    def candidates(self) -> tuple[str, ...]:
        """Grids that a budget chooses from; empty: each format's default."""
        named = self.quantize.candidates
        return tuple(named) if isinstance(named, list) else ()

    @property
    def keep(self) -> dict[str, int]:
        """Role → the fewest bits that a budget may give it."""
        minimum = self.quantize.keep.model_dump(exclude_none=True) if self.quantize.keep else {}
        return {role: int(bits.lstrip(">= ")) for role, bits in minimum.items()}

    @property
    def windows(self) -> int:
        """Number of windows of text to score; 0: chosen by the model's size."""
        return self.verify.windows if isinstance(self.verify.windows, int) else 0

    @property
    def sequence_length(self) -> int:
        """Tokens in a scored window."""
        return self.verify.sequence_length

    @property
    def gates(self) -> dict[str, str]:
        """Metric → limit such as ``"<=0.06"``."""
        return {name: str(limit) for name, limit in (self.verify.gates or {}).items()}

    @property
    def prunes(self) -> bool:
        """Whether anything is pruned."""
        return self.prune is not None and self.prune.method != "none"

    @property
    def folds(self) -> bool:
        """Whether a search for folds precedes the choice of codes."""
        return self.quantize.fold != "none"

    @property
    def budget_bytes(self) -> int | None:
        """The budget of each target's file in bytes; None without one or for a memory budget."""
        weights = self.budget.weights if self.budget else None
        return None if weights is None else parse_bytes(str(weights))

    @classmethod
    def load(
        cls, source: str | Path, overrides: Iterable[str] = (), formats: Iterable[str] = ()
    ) -> Recipe:
        """A recipe by shipped name or file path; see ``compress.recipe.load``."""
        return load(source, overrides, formats)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """Validate a document as a recipe, with defaults.

        Args:
            document: as parsed from YAML.
            source: its name in errors, and the recipe's name where it has none.

        Raises:
            RecipeError: the first problem, with its path and the nearest known key.
        """
        try:
            recipe = cls.model_validate(document)
        except ValidationError as error:
            raise explain(error, source, document, with_targets(), hint_of) from None
        if "name" in document:
            return recipe
        return recipe.model_copy(update={"name": Path(source).stem})

    @classmethod
    def verification(
        cls, gates: Mapping[str, str], windows: int = 0, sequence_length: int = 512
    ) -> Recipe:
        """The recipe of ``packlight verify``, without targets.

        Args:
            gates: metric → limit.
            windows: number of windows of text; 0: chosen by the model's size.
            sequence_length: tokens in a window.
        """
        verify = Verify.model_construct(
            gates=dict(gates), windows=windows or "auto", sequence_length=sequence_length
        )
        return cls.model_construct(version=1, name="verify", verify=verify, targets={})

    def set(self, path: str, value: Any) -> Recipe:
        """The recipe with another value at a path such as ``targets.gguf.type``.

        Raises:
            RecipeError: not valid; the message names the path.
        """
        document = self.model_dump(by_alias=True, exclude_none=True)
        put(document, path.split("."), value)
        return Recipe.from_dict(document, self.name)

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain data, as in reports: text files without their folders."""
        document = self.model_dump(by_alias=True, exclude_none=True)
        # Files that are published with an artifact must not name paths of this machine.
        document["calibration"]["texts"] = [
            Path(text).name if Path(text).is_absolute() else text for text in self.calibration.texts
        ]
        if not self.allow_dense:
            del document["allow_dense"]
        return document

    def to_yaml(self) -> str:
        """The resolved recipe as YAML text, which ``load`` accepts."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        return text


def hint_of(path: str, kind: str) -> str:
    """The hint for an error at one of the recipe's keys, or ``""``."""
    if kind == "unknown_key":
        return owners_of(path)
    if kind == "string_pattern_mismatch":
        if path.endswith("name"):
            return "letters, digits, . _ -"
        return next(hint for key, hint in PATTERNS if path.endswith(key) or path.startswith(key))
    return ""


def owners_of(path: str) -> str:
    """The other formats that have a key unknown at a path such as ``targets.gguf.rotate``."""
    section, _, key = path.rpartition(".")
    owners = [row.title for row in FORMATS.values() if key in row.Settings.model_fields]
    there = section in {f"targets.{name}" for name in FORMATS}
    return f"{key} is a setting of {' and '.join(owners)}" if owners and there else ""


def with_targets() -> type[Recipe]:
    """``Recipe`` with its targets typed by the registered formats."""
    targets: Any = (targets_model(), Field(json_schema_extra={"minProperties": 1}))
    return create_model("Recipe", __base__=Recipe, targets=targets)


def recipe_schema() -> str:
    """The text of ``recipes/schema.json``, with the registered formats."""
    return json_schema(with_targets(), "packlight recipe")
