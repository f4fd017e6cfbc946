"""The recipe as typed data: what each key may hold, its default and its description.

``recipes/schema.json`` is generated from here (``make docs``). The settings of a format
(``targets.<format>``) belong to its exporter: ``settings_models`` finds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    PlainValidator,
    StringConstraints,
    Tag,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from compress.console import parse_bytes
from compress.formats import FORMATS
from compress.recipe import AMOUNTS, BUILTIN_SOLVERS, load, put, solver_names
from compress.recipe.schema import Name, Section, Text, explain, json_schema, refusal

__all__ = [
    "Budget",
    "Calibration",
    "FormatName",
    "Heal",
    "Prune",
    "Quantize",
    "Recipe",
    "TargetSettings",
]

# What a text must look like, by the end of the path or its beginning.
PATTERNS = (
    ("verify.windows", "a number of windows, or auto"),
    ("quantize.keep", 'the fewest bits, such as ">=6"'),
    ("quantize.candidates", "auto, or a list such as [Q4_K, Q6_K]"),
    ("budgets", "such as 1.8GiB"),
    ("sparsity", "none, 2of4 or a share such as 0.5"),
    ("", "such as int4-g32, int8-channel, lut4-g8"),
)


def kind_of(text: str, other: str) -> Discriminator:
    """Of a union of a text and something else: the branch by the value's type."""
    return Discriminator(lambda given: text if isinstance(given, str) else other)


def a_size(given: str | int) -> str | int:
    parse_bytes(str(given))
    return given


def a_format(given: str) -> str:
    if given not in (known := list(settings_models())):
        raise PydanticCustomError("unknown_value", "{known}", {"known": known})
    return given


def a_solver(given: str) -> str:
    if given not in BUILTIN_SOLVERS and given not in (known := solver_names()):
        raise PydanticCustomError("unknown_value", "{known}", {"known": known})
    return given


class OneOfTheFormats:
    """For the JSON schema: the formats that there are when it is made."""

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": list(settings_models())}


FormatName = Annotated[str, AfterValidator(a_format), OneOfTheFormats()]
SolverName = Annotated[
    str, AfterValidator(a_solver), Field(json_schema_extra={"examples": list(BUILTIN_SOLVERS)})
]
Auto = Annotated[str, StringConstraints(pattern="^auto$")]
Size = Annotated[str | int, AfterValidator(a_size)]
FewestBits = Annotated[
    str, Field(pattern=r"^>= *([2-9]|1[0-6])$", description='Such as ">=6".')
]  # fmt: skip
Share = Annotated[float, Field(gt=0, lt=1)]
Pattern = Annotated[str, StringConstraints(pattern="^(none|[1-9][0-9]?of[1-9][0-9]?)$")]


class TargetSettings(Section):
    """What every format takes."""

    sparsity: (
        Annotated[
            Annotated[Pattern, Tag("pattern")] | Annotated[Share, Tag("share")],
            kind_of("pattern", "share"),
        ]
        | None
    ) = Field(
        default=None,
        description="Zeros in the blocks' linears: 2of4 keeps 2 of every 4 neighbours, 0.5 drops "
        "half of each row; default none. For formats that store them as nothing, but for a mask "
        "bit per weight.",
    )
    sparsity_method: Literal["magnitude", "wanda", "sparsegpt"] | None = Field(
        default=None,
        description="How zeros are chosen: by the weights, by the weights and their inputs, or "
        "column by column with an update of the later ones; default sparsegpt.",
    )


def settings_models() -> Mapping[str, type[TargetSettings]]:
    """Format → the model of its settings."""
    return {name: row.Settings for name, row in FORMATS.items()}


def targets_model() -> type[Section]:
    """The recipe's ``targets``: one key for each format there is."""
    models = settings_models()
    fields: dict[str, Any] = {name: (model | None, None) for name, model in models.items()}
    return create_model("Targets", __base__=Section, **fields)


def read_targets(given: Any) -> dict[str, dict[str, Any]]:
    """Settings by format, each by its format's model, with defaults, in the order given."""
    found = targets_model().model_validate(given)
    models = settings_models()
    if not given:
        raise ValueError(f"name at least one of {', '.join(sorted(models))}")
    return {
        name: (getattr(found, name) or models[name]()).model_dump(exclude_none=True)
        for name in given
    }


class Budget(Section):
    """What each artifact may take; grids are then chosen per tensor, and those of the targets are
    preferences."""

    weights: Size | None = Field(
        default=None,
        description="Bytes of the file, e.g. 1.8GiB or 1.8GB: weights, scales, embeddings, header "
        "and tokenizer.",
    )
    memory: Size | None = Field(
        default=None,
        description="Bytes while running: the file, the KV cache at the context, activations.",
    )
    device: str | None = Field(
        default=None,
        description="A row of `packlight fit`, e.g. iphone-14: its limit for one app is the memory "
        "where that is not said.",
    )


def none_if_empty(budget: Budget | None) -> Budget | None:
    return budget if budget and budget.model_fields_set else None


class Calibration(Section):
    """What solvers other than rtn look at."""

    texts: list[Text] = Field(
        default=["builtin"],
        min_length=1,
        description="builtin, or .txt and .jsonl files (a `text` or chat `messages` in each line).",
    )
    tokens: int = Field(
        default=16384,
        ge=16,
        le=16777216,
        description="Tokens to draw from the texts, in equal parts.",
    )
    sequence_length: int = Field(
        default=512, ge=16, le=32768, description="Tokens in a window; at most the model's context."
    )
    seed: int = Field(default=0, ge=0, le=4294967295, description="Of the choice of passages.")
    propagate: Literal["float", "quantized"] = Field(
        default="float",
        description="What feeds a block: the float blocks before it, or those as each target has "
        "them.",
    )


class Heal(Section):
    """Train the blocks that stay, one by one, on calibration text; minutes or steps."""

    minutes: float | None = Field(
        default=None,
        gt=0,
        le=10000,
        description="For all blocks together; what is reached depends on the machine's speed.",
    )
    steps: int | None = Field(
        default=None, ge=1, description="For each block; the same inputs give the same bytes."
    )

    @model_validator(mode="after")
    def one_of_both(self) -> Self:
        given = len(self.model_dump(exclude_none=True))
        if given != 1:
            raise ValueError(f"name {'only' if given else 'at least'} one of minutes, steps")
        return self


class Prune(Section):
    """What is taken out before quantization; every target gets the same pruned model."""

    method: Literal["none", "depth", "ffn", "heads"] = Field(
        default="none",
        description="depth drops whole blocks, ffn narrows every MLP, heads drops key-value heads "
        "with their query heads.",
    )
    ratio: Share | None = Field(
        default=None, description="Share of blocks, MLP channels or key-value heads that goes."
    )
    blocks: int | None = Field(default=None, ge=1, description="depth: how many blocks go.")
    width: int | None = Field(
        default=None, ge=1, description="ffn: channels that stay in every MLP."
    )
    kv_heads: int | None = Field(
        default=None, ge=1, description="heads: key-value heads that stay in every block."
    )
    update: bool = Field(
        default=True, description="ffn, heads: update the columns that stay by least squares."
    )
    heal: Heal | None = None

    @model_validator(mode="after")
    def one_amount(self) -> Self:
        """Refuse a method without its amount, or with another's, and healing of nothing."""
        keys = AMOUNTS[self.method]
        given = [
            key
            for key in ("ratio", "blocks", "width", "kv_heads")
            if getattr(self, key) is not None
        ]
        if strange := [key for key in given if key not in keys]:
            raise refusal(
                f"prune.{strange[0]} has no meaning with method {self.method}",
                hint=f"known here: {', '.join(keys)}" if keys else "set prune.method too",
            )
        if self.heal and not keys:
            raise refusal(
                "prune.heal has no effect: nothing is pruned",
                hint="--prune ffn:25%, or prune.method and an amount",
            )
        if keys and len(given) != 1:
            raise refusal(
                f"prune.method {self.method} needs one of {' and '.join(keys)}, "
                f"{'both are' if given else 'none is'} given",
                hint=f"--set prune.{keys[0]}=0.1",
            )
        return self


class Keep(Section):
    """Role: the fewest bits that a budget may give it, e.g. lm_head: ">=6"."""

    embed_tokens: FewestBits | None = None
    lm_head: FewestBits | None = None
    q_proj: FewestBits | None = None
    k_proj: FewestBits | None = None
    v_proj: FewestBits | None = None
    o_proj: FewestBits | None = None
    gate_proj: FewestBits | None = None
    up_proj: FewestBits | None = None
    down_proj: FewestBits | None = None


class Quantize(Section):
    """How codes are chosen, and on which grids."""

    solver: SolverName = Field(
        default="rtn",
        description="How codes are chosen: rtn by the weights alone; scale_search also by the "
        "importance of their inputs; gptq also makes up for rounding in later columns; or a solver "
        "of another package.",
    )
    candidates: (
        Annotated[
            Annotated[Auto, Tag("auto")] | Annotated[list[Text], Field(min_length=1), Tag("grids")],
            kind_of("auto", "grids"),
        ]
        | None
    ) = Field(
        default=None,
        description="Grids that a budget chooses among, of all formats together (Q4_K, int4-g32, "
        "lut4-g8 …); auto, the default: what each format runs well.",
    )
    keep: Keep | None = None
    fold: Literal["none", "awq"] = Field(
        default="none",
        description="awq: columns of important inputs are scaled up before rounding and the inputs "
        "down, in the weights before them; kept where it measures better. Not with rtn.",
    )


class Verify(Section):
    """How much text is scored, and what must come of it."""

    gates: dict[str, str | float] | None = Field(
        default=None, description='metric: limit, e.g. kl_divergence: "<=0.06".'
    )
    windows: Annotated[
        Annotated[int, Field(ge=2, le=100000), Tag("count")] | Annotated[Auto, Tag("auto")],
        kind_of("auto", "count"),
    ] = Field(
        default="auto",
        description="Windows of text that are scored; auto: 16, from a billion parameters on 8, "
        "from three billion on 4.",
    )
    sequence_length: int = Field(
        default=512, ge=16, le=32768, description="Tokens in a window; at most the model's context."
    )


class Recipe(Section):
    """What to reach: targets, how to quantize, and the gates that the artifacts must pass.

    ```yaml
    schema: 1
    targets: {gguf: {type: Q4_K_M}}
    quantize: {solver: gptq}
    ```

    >>> Recipe.load("int4-fast").set("targets.gguf.type", "Q4_0").targets["gguf"]
    {'type': 'Q4_0'}
    """

    version: Literal[1] = Field(alias="schema", description="Version of this schema.")
    name: Name = Field(default="recipe", description="Shown in reports.")
    description: str | None = Field(default=None, description="One line for `packlight recipes`.")
    budget: Annotated[Budget | None, AfterValidator(none_if_empty)] = None
    targets: Annotated[dict[str, dict[str, Any]], PlainValidator(read_targets)] = Field(
        default_factory=dict, validate_default=True
    )
    calibration: Calibration = Field(default_factory=Calibration)
    allow_dense: bool = Field(
        default=False,
        description="Sparsity also in formats that store zeros like other weights, for "
        "experiments.",
    )
    prune: Prune | None = None
    quantize: Quantize = Field(default_factory=Quantize)
    verify: Verify = Field(default_factory=Verify)

    @property
    def solver(self) -> str:
        """How codes are chosen."""
        return self.quantize.solver

    @property
    def fold(self) -> str:
        """``awq`` scales channels before that, ``none`` does not."""
        return self.quantize.fold

    @property
    def candidates(self) -> tuple[str, ...]:
        """Grids that a budget chooses among; none: each format's own choice."""
        named = self.quantize.candidates
        return tuple(named) if isinstance(named, list) else ()

    @property
    def keep(self) -> dict[str, int]:
        """Role → the fewest bits that a budget may give it."""
        minimum = self.quantize.keep.model_dump(exclude_none=True) if self.quantize.keep else {}
        return {role: int(bits.lstrip(">= ")) for role, bits in minimum.items()}

    @property
    def windows(self) -> int:
        """Windows of text that are scored; 0: by the model's size."""
        return self.verify.windows if isinstance(self.verify.windows, int) else 0

    @property
    def sequence_length(self) -> int:
        """Tokens in such a window."""
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
        """Whether ``fold`` asks for a search before codes are chosen."""
        return self.fold != "none"

    @property
    def budget_bytes(self) -> int | None:
        """Bytes of each target's file; None where only memory counts, or nothing does."""
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
        """A document as a recipe, with its defaults.

        Args:
            document: as YAML has it.
            source: where it is from, for errors, and for its name where it has none.

        Raises:
            RecipeError: the first problem, with its path and the nearest known key.
        """
        try:
            recipe = cls.model_validate(document)
        except ValidationError as error:
            raise explain(error, source, document, hint_of) from None
        if "name" in document:
            return recipe
        return recipe.model_copy(update={"name": Path(source).stem})

    @classmethod
    def verification(
        cls, gates: Mapping[str, str], windows: int = 0, sequence_length: int = 512
    ) -> Recipe:
        """What artifacts that are there already are held against; it has no targets yet.

        Args:
            gates: metric → limit.
            windows: of text; 0: by the model's size.
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
        """The resolved recipe as plain data, as reports have it: texts without their folders."""
        document = self.model_dump(by_alias=True, exclude_none=True)
        # What travels with an artifact names no place of this machine.
        document["calibration"]["texts"] = [
            Path(text).name if Path(text).is_absolute() else text for text in self.calibration.texts
        ]
        if not self.allow_dense:
            del document["allow_dense"]
        return document

    def to_yaml(self) -> str:
        """The resolved recipe, as it can be read again."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        return text


def hint_of(path: str, kind: str) -> str:
    """The hint that a recipe's own key has for an error."""
    if kind == "unknown_key":
        return owners_of(path)
    if kind == "string_pattern_mismatch":
        if path.endswith("name"):
            return "letters, digits, . _ -"
        return next(hint for key, hint in PATTERNS if path.endswith(key) or path.startswith(key))
    return ""


def owners_of(path: str) -> str:
    """The formats that have a key which is not known at a path such as ``targets.gguf.rotate``."""
    section, _, key = path.rpartition(".")
    owners = [row.title for row in FORMATS.values() if key in row.Settings.model_fields]
    there = section in {f"targets.{name}" for name in FORMATS}
    return f"{key} is a setting of {' and '.join(owners)}" if owners and there else ""


def recipe_schema() -> str:
    """``recipes/schema.json``, with the formats that there are."""
    fields: dict[str, Any] = {
        "targets": (targets_model(), Field(json_schema_extra={"minProperties": 1}))
    }
    return json_schema(create_model("Recipe", __base__=Recipe, **fields), "packlight recipe")
