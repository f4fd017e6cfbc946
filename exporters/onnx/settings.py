"""The recipe's settings of this format, ``targets.onnx``; loads pydantic."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.recipe.model import TargetSettings

__all__ = ["Settings"]


class Settings(TargetSettings):
    """ONNX Runtime's folder."""

    bits: Literal[4, 8] = Field(default=4, description="Bits of the linear layers.")
    group_size: Literal[16, 32, 64, 128, 256] = Field(
        default=32, description="Weights that share a scale."
    )
    symmetric: bool = Field(default=True, description="Without zero points.")
    embedding_bits: Literal[4, 8, 16] | None = Field(
        default=None,
        description="Bits of embed_tokens; default: as bits, or 8 where it is the head, too, and "
        "less than two fifths of the weights; 16 is float16.",
    )
    head_bits: Literal[4, 8] | None = Field(
        default=None, description="Bits of lm_head; default: as bits; tied: as embedding_bits."
    )
    accuracy_level: Literal[0, 4] = Field(
        default=4, description="MatMulNBits: 4 computes in int8 (fast), 0 in float32."
    )
    context: int | None = Field(
        default=None,
        ge=32,
        le=4194304,
        description="Positions in the tables of cos and sin; default: the model's limit.",
    )
