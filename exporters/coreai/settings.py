"""The recipe's settings of Core AI, ``targets.coreai``; imports pydantic."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from compress.recipe.model import TargetSettings

__all__ = ["Settings"]


GridName = Annotated[
    str,
    StringConstraints(
        pattern="^(F16|int[248]-(g(16|32|64|128|256)|channel)(-asym)?|lut[123468]-(g[0-9]+|tensor))$"
    ),
]


class Settings(TargetSettings):
    """Settings of the Core AI bundle."""

    grid: GridName = Field(
        default="int4-g32",
        description="Grid: int4-g32 (what Apple's own recipes use on the GPU), lut4-g32 …",
    )
    embedding: GridName | None = Field(
        default=None,
        description="Grid of embed_tokens; default: the same as `grid`, or 8 bits where it is the "
        "head, too, and less than two fifths of the weights.",
    )
    deployment: Literal["iOS27"] = Field(
        default="iOS27", description="Oldest system that can load the bundle."
    )
    context: int | None = Field(
        default=None,
        ge=32,
        le=131072,
        description="Most positions of the KV cache, which grows; default: 1024 or the model's "
        "limit if smaller.",
    )
