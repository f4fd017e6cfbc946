"""The recipe's settings of ONNX, ``targets.onnx``; imports pydantic."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.recipe.model import TargetSettings

__all__ = ["Settings"]


class Settings(TargetSettings):
    """Settings of the ONNX folder."""

    bits: Literal[4, 8] = Field(default=4, description="Bits of the linear layers.")
    group_size: Literal[16, 32, 64, 128, 256] = Field(
        default=32, description="Number of weights that share a scale."
    )
    symmetric: bool = Field(default=True, description="true: no zero points.")
    embedding_bits: Literal[4, 8, 16] | None = Field(
        default=None,
        description="Bits of embed_tokens; default: `bits`, but 8 where it is also the head (tied) "
        "and under 40 % of the weights; 16 is float16.",
    )
    head_bits: Literal[4, 8] | None = Field(
        default=None, description="Bits of lm_head; default: `bits`; where tied: `embedding_bits`."
    )
    value_bits: Literal[4, 8] | None = Field(
        default=None,
        description="Bits of v_proj; default: `bits`, but 8 where several query heads share a "
        "value head.",
    )
    accuracy_level: Literal[0, 4] = Field(
        default=4, description="MatMulNBits: 4 computes in int8 (fast), 0 in float32."
    )
    context: int | None = Field(
        default=None,
        ge=32,
        le=4194304,
        description="Positions in the cos and sin tables; default: the model's limit.",
    )
