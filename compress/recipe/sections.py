"""The sections of a recipe as typed data: what each key may hold, its default and its description.

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
    str, Field(pattern=r"^>= *([2-9]|1[0-6])$", description='Such as ">=6".')
]  # fmt: skip
Share = Annotated[float, Field(gt=0, lt=1)]
Pattern = Annotated[str, StringConstraints(pattern="^(none|[1-9][0-9]?of[1-9][0-9]?)$")]


class TargetSettings(Section):
    """Settings of every format."""

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
