"""The recipe's settings of GGUF, ``targets.gguf``; imports pydantic."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from compress.recipe.model import TargetSettings

__all__ = ["Settings"]


class Settings(TargetSettings):
    """Settings of the GGUF file."""

    type: Annotated[
        Literal[
            "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "Q5_0",
            "Q5_1", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0", "IQ4_NL", "IQ4_XS", "MXFP4", "IQ3_XXS",
            "IQ3_XS", "IQ3_S", "IQ3_M", "F16", "BF16",
        ],
        BeforeValidator(lambda given: given.upper() if isinstance(given, str) else given),
    ] = Field(
        default="Q4_K_M", description="A llama.cpp type or mix; case-insensitive."
    )  # fmt: skip
