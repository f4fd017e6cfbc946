"""The sections of a recipe as pydantic models: type, default and description of each key.

``compress.recipe.model`` has the recipe itself, its targets and its solver.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, StringConstraints, Tag, model_validator

from compress.console import parse_bytes
from compress.recipe import AMOUNTS
from compress.recipe.schema import Section, Text, refusal

__all__ = [
    "Auto", "Budget", "Calibration", "Heal", "Keep", "Prune", "TargetSettings", "Verify", "kind_of",
    "none_if_empty",
]  # fmt: skip


def kind_of(text: str, other: str) -> Discriminator:
    """A discriminator for a union of a text and another type: by the value's type."""
    return Discriminator(lambda given: text if isinstance(given, str) else other)


def a_size(given: str | int) -> str | int:
    parse_bytes(str(given))
    return given


Auto = Annotated[str, StringConstraints(pattern="^auto$")]
Size = Annotated[str | int, AfterValidator(a_size)]
FewestBits = Annotated[
    str, Field(pattern=r"^>= *([2-9]|1[0-6])$", description='Minimum bits, such as ">=6".')
]  # fmt: skip
Share = Annotated[float, Field(gt=0, lt=1)]
Pattern = Annotated[str, StringConstraints(pattern="^(none|[1-9][0-9]?of[1-9][0-9]?)$")]


class TargetSettings(Section):
    """Settings that every format has."""

    sparsity: (
        Annotated[
            Annotated[Pattern, Tag("pattern")] | Annotated[Share, Tag("share")],
            kind_of("pattern", "share"),
        ]
        | None
    ) = Field(
        default=None,
        description="Zeros in the blocks' linear layers: 2of4 retains 2 of every 4 adjacent "
        "weights, 0.5 sets half of each row to zero; default none. For formats that "
        "store only non-zero weights and a mask of one bit per weight.",
    )
    sparsity_method: Literal["magnitude", "wanda", "sparsegpt"] | None = Field(
        default=None,
        description="How zeros are chosen. magnitude: by the weights; wanda: by weights and "
        "inputs; sparsegpt, the default: column by column, with an update of later "
        "columns.",
    )


class Budget(Section):
    """The limit of each artifact. Grids are then chosen per tensor; the grids of the targets are
    preferences."""

    weights: Size | None = Field(
        default=None,
        description="Maximum size of the file, e.g. 1.8GiB or 1.8GB: weights, scales, embeddings, "
        "header and tokenizer.",
    )
    memory: Size | None = Field(
        default=None,
        description="Maximum memory while running: file, KV cache at the context, activations.",
    )
    device: str | None = Field(
        default=None,
        description="A device of `packlight fit`, e.g. iphone-14; its memory limit for one app is "
        "the default of `memory`.",
    )


def none_if_empty(budget: Budget | None) -> Budget | None:
    return budget if budget and budget.model_fields_set else None


class Calibration(Section):
    """The text from which solvers other than rtn compute input statistics."""

    texts: list[Text] = Field(
        default=["builtin"],
        min_length=1,
        description="builtin, or .txt and .jsonl files (each line with `text` or chat `messages`).",
    )
    tokens: int = Field(
        default=16384,
        ge=16,
        le=16777216,
        description="Number of tokens, drawn from the texts in equal parts.",
    )
    sequence_length: int = Field(
        default=512, ge=16, le=32768, description="Tokens in a window; at most the model's context."
    )
    seed: int = Field(default=0, ge=0, le=4294967295, description="Seed of the choice of passages.")
    propagate: Literal["float", "quantized"] = Field(
        default="float",
        description="The inputs of a block: outputs of the float blocks before it, or of the "
        "blocks as quantized for each target.",
    )


class Heal(Section):
    """Train the remaining blocks one at a time on calibration text, for minutes or steps."""

    minutes: float | None = Field(
        default=None,
        gt=0,
        le=10000,
        description="Time for all blocks together; the result depends on the machine's speed.",
    )
    steps: int | None = Field(
        default=None, ge=1, description="Steps for each block; the same inputs give the same bytes."
    )

    @model_validator(mode="after")
    def one_of_both(self) -> Self:
        given = len(self.model_dump(exclude_none=True))
        if given != 1:
            raise ValueError(f"name {'only' if given else 'at least'} one of minutes, steps")
        return self


class Prune(Section):
    """Structures removed before quantization; every target has the same pruned model."""

    method: Literal["none", "depth", "ffn", "heads"] = Field(
        default="none",
        description="depth: remove whole blocks; ffn: remove channels of every MLP; heads: remove "
        "key-value heads with their query heads.",
    )
    ratio: Share | None = Field(
        default=None, description="Share of blocks, MLP channels or key-value heads to remove."
    )
    blocks: int | None = Field(default=None, ge=1, description="depth: number of blocks to remove.")
    width: int | None = Field(
        default=None, ge=1, description="ffn: channels that remain in every MLP."
    )
    kv_heads: int | None = Field(
        default=None, ge=1, description="heads: key-value heads that remain in every block."
    )
    update: bool = Field(
        default=True, description="ffn, heads: update the remaining columns by least squares."
    )
    heal: Heal | None = None

    @model_validator(mode="after")
    def one_amount(self) -> Self:
        """Refuse a missing amount, the amount of another method, and healing without pruning."""
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
    """Minimum bits per weight of a role under a budget, e.g. lm_head: ">=6"."""

    embed_tokens: FewestBits | None = None
    lm_head: FewestBits | None = None
    q_proj: FewestBits | None = None
    k_proj: FewestBits | None = None
    v_proj: FewestBits | None = None
    o_proj: FewestBits | None = None
    gate_proj: FewestBits | None = None
    up_proj: FewestBits | None = None
    down_proj: FewestBits | None = None


class Verify(Section):
    """The text that is scored, and the limits on the results."""

    gates: dict[str, str | float] | None = Field(
        default=None, description='Limits by metric, e.g. kl_divergence: "<=0.06".'
    )
    windows: Annotated[
        Annotated[int, Field(ge=1, le=100000), Tag("count")] | Annotated[Auto, Tag("auto")],
        kind_of("auto", "count"),
    ] = Field(
        default="auto",
        description="Number of windows of text to score; auto: 16; 8 from one billion parameters "
        "on, 4 from three billion on; from 50 million on fewer once the verdict is certain.",
    )
    sequence_length: int = Field(
        default=512, ge=16, le=32768, description="Tokens in a window; at most the model's context."
    )
