"""The recipe's settings of MLX, ``targets.mlx``; imports pydantic."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compress.recipe.model import TargetSettings

__all__ = ["Settings"]


class Settings(TargetSettings):
    """Settings of the MLX folder."""

    bits: Literal[2, 3, 4, 5, 6, 8] = Field(default=4, description="Bits of the linear layers.")
    group_size: Literal[32, 64, 128] = Field(
        default=64, description="Number of weights that share a scale and a bias."
    )
    mode: Literal["affine", "mxfp4"] = Field(
        default="affine",
        description="Grid of 4 bits: affine, or mxfp4: 4-bit floats, groups of 32 that share a "
        "power of two, 4.25 bits per weight.",
    )
    embedding_bits: Literal[2, 3, 4, 5, 6, 8] | None = Field(
        default=None,
        description="Bits of embed_tokens; default: `bits`, but 8 where it is also the head (tied) "
        "and under 40 % of the weights.",
    )
    head_bits: Literal[2, 3, 4, 5, 6, 8] | None = Field(
        default=None, description="Bits of an lm_head of its own; default: `bits`."
    )
    dtype: Literal["float16", "bfloat16"] | None = Field(
        default=None,
        description="Type of scales, biases and norms, in which MLX computes; default: float16, "
        "bfloat16 for gemma, whose activations exceed float16.",
    )
