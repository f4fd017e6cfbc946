"""What a recipe may say of each format: ``targets.<format>``.

The models give recipes their keys, defaults and errors, and ``recipes/schema.json`` its text.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from compress.recipe.model import TargetSettings

__all__ = ["SETTINGS", "CoremlSettings", "GgufSettings", "OnnxSettings"]


def upper(given: Any) -> Any:
    return given.upper() if isinstance(given, str) else given


class GgufSettings(TargetSettings):
    """llama.cpp's file."""

    type: Annotated[
        Literal[
            "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "Q5_0",
            "Q5_1", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0", "IQ4_NL", "IQ4_XS", "MXFP4", "IQ3_XXS",
            "IQ3_XS", "IQ3_S", "IQ3_M", "F16", "BF16",
        ],
        BeforeValidator(upper),
    ] = Field(
        default="Q4_K_M", description="A llama.cpp type or mix; case does not matter."
    )  # fmt: skip


class OnnxSettings(TargetSettings):
    """ONNX Runtime's folder."""

    bits: Literal[4, 8] = Field(default=4, description="Bits of the linear layers.")
    group_size: Literal[16, 32, 64, 128, 256] = Field(
        default=32, description="Weights that share a scale."
    )
    symmetric: bool = Field(default=True, description="Without zero points.")
    embedding_bits: Literal[4, 8, 16] | None = Field(
        default=None, description="Bits of embed_tokens; default: as bits; 16 is float16."
    )
    head_bits: Literal[4, 8] | None = Field(
        default=None, description="Bits of lm_head; default: as bits."
    )
    accuracy_level: Literal[0, 4] = Field(
        default=4, description="MatMulNBits: 4 computes in int8 (fast), 0 in float32."
    )


CoremlGrid = Annotated[
    str,
    StringConstraints(
        pattern="^(F16|int[48]-(g(16|32|64|128|256)|channel)(-asym)?|lut[123468]-(g[0-9]+|tensor))$"
    ),
]


class CoremlSettings(TargetSettings):
    """Core ML's package."""

    grid: CoremlGrid = Field(
        default="int4-g32", description="int4-g32 (GPU), lut4-g8 or lut4-g16 (Neural Engine) …"
    )
    embedding: CoremlGrid | None = Field(
        default=None, description="Grid of embed_tokens; default: the same."
    )
    rotate: Literal["none", "r1", "r2", "r1r2"] = Field(
        default="none",
        description="Fold rotations into the weights: r1 of the residual stream, r2 of the values "
        "in each head; for palettes and channel grids of models with RMSNorm.",
    )
    deployment: Literal["iOS18"] = Field(
        default="iOS18", description="Oldest system that must run it."
    )
    context: int | None = Field(
        default=None,
        ge=32,
        le=131072,
        description="Positions of the KV cache; default 2048 or the model's limit.",
    )


SETTINGS: dict[str, type[TargetSettings]] = {
    "gguf": GgufSettings,
    "onnx": OnnxSettings,
    "coreml": CoremlSettings,
}
