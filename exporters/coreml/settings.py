"""The recipe's settings of Core ML, ``targets.coreml``; imports pydantic."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from compress.recipe.model import TargetSettings

__all__ = ["Settings"]


GridName = Annotated[
    str,
    StringConstraints(
        pattern="^(F16|int[48]-(g(16|32|64|128|256)|channel)(-asym)?|lut[123468]-(g[0-9]+|tensor))$"
    ),
]
ChunkSize = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]*(\.[0-9]+)? ?[KMG]i?B$")]


class Settings(TargetSettings):
    """Settings of the Core ML package."""

    preset: Literal["iphone-gpu", "iphone-ane"] = Field(
        default="iphone-gpu",
        description="iphone-gpu: one package of flexible shapes with the KV cache as states, for "
        "GPU and CPU. iphone-ane (experimental, never run on a phone by us): packages of static "
        "shapes for the Neural Engine.",
    )
    grid: GridName | None = Field(
        default=None,
        description="Grid; default: int4-g32, of iphone-ane lut4-g32. Palettes (lut4-g32, lut6-g16 "
        "…) are for iphone-ane, blocks (int4-g32) for iphone-gpu.",
    )
    embedding: GridName | None = Field(
        default=None,
        description="Grid of embed_tokens; default: the same as `grid`, or 8 bits where it is the "
        "head, too, and less than two fifths of the weights.",
    )
    value: GridName | None = Field(
        default=None,
        description="Grid of v_proj; default: the same as `grid`, or 8 bits where several query "
        "heads share a value head.",
    )
    deployment: Literal["iOS18"] = Field(
        default="iOS18", description="Oldest system that can load the package."
    )
    context: int | None = Field(
        default=None,
        ge=32,
        le=131072,
        description="Positions of the KV cache; default: 2048 or the model's limit if smaller.",
    )
    chunk: ChunkSize | None = Field(
        default=None,
        description="Most bytes of the weights in one package of iphone-ane; default: 1GB.",
    )
