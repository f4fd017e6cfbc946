"""The recipe's settings of this format: ``targets.toy``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.recipe.model import TargetSettings

__all__ = ["Settings"]


class Settings(TargetSettings):
    """One file and its header."""

    grid: Literal["int8-g32", "int8-channel"] = Field(
        default="int8-channel", description="Grid of every matrix."
    )
