"""llama.cpp's presets: which tensor gets which type, and what happens to rows that do not fit.

The rules are those of ``llama_tensor_get_type_impl`` and ``tensor_type_fallback`` in
``src/llama-quant.cpp`` (llama.cpp of October 2026, without an importance matrix), so that a
``Q4_K_M`` of ours is a ``Q4_K_M`` of theirs, to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from compress.arch import DecoderConfig
from compress.errors import GridError

# Weights per block and bytes per block, of ggml's block structs.
BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q5_1": (32, 24),
    "Q5_0": (32, 22),
    "Q4_1": (32, 20),
    "Q4_0": (32, 18),
    "IQ4_NL": (32, 18),
    "Q6_K": (256, 210),
    "Q5_K": (256, 176),
    "Q4_K": (256, 144),
    "Q3_K": (256, 110),
    "Q2_K": (256, 84),
}

# Rows that 256-weight blocks do not divide: the type with 32-weight blocks that is used instead.
FALLBACKS: dict[str, str] = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}

# Preset → its base type and its number in ``general.file_type`` (``llama_ftype`` in llama.h).
MIXES: dict[str, tuple[str, int]] = {
    "Q2_K": ("Q2_K", 10),
    "Q3_K_S": ("Q3_K", 11),
    "Q3_K_M": ("Q3_K", 12),
    "Q3_K_L": ("Q3_K", 13),
    "Q4_0": ("Q4_0", 2),
    "Q4_1": ("Q4_1", 3),
    "IQ4_NL": ("IQ4_NL", 25),
    "Q4_K_S": ("Q4_K", 14),
    "Q4_K_M": ("Q4_K", 15),
    "Q5_0": ("Q5_0", 8),
    "Q5_1": ("Q5_1", 9),
    "Q5_K_S": ("Q5_K", 16),
    "Q5_K_M": ("Q5_K", 17),
    "Q6_K": ("Q6_K", 18),
    "Q8_0": ("Q8_0", 7),
    "F16": ("F16", 1),
    "BF16": ("BF16", 32),
}


@dataclass(frozen=True)
class Mix:
    """A preset.

    Attributes:
        name: canonical spelling, with ``-pure`` where every tensor gets the base type.
        base: the type of most tensors.
        file_type: ``general.file_type``.
        pure: no exceptions for sensitive tensors (``llama-quantize --pure``).
    """

    name: str
    base: str
    file_type: int
    pure: bool

    @classmethod
    def parse(cls, text: str) -> Mix:
        """``q4_k_m`` → Q4_K_M; ``Q4_0-pure``; ``Q4_K`` is short for Q4_K_M, as in llama.cpp.

        Raises:
            GridError: no such preset.
        """
        name = text.strip().upper()
        pure = name.endswith("-PURE")
        name = name.removesuffix("-PURE")
        if name in ("Q3_K", "Q4_K", "Q5_K"):
            name += "_M"
        if name not in MIXES:
            raise GridError(
                f"there is no GGUF type {text!r}", hint=f"one of: {', '.join(MIXES)}, or Q4_0-pure"
            )
        base, file_type = MIXES[name]
        return cls(f"{name}-pure" if pure else name, base, file_type, pure)

    def wish(self, role: str, block: int, config: DecoderConfig) -> str:
        """The type that the preset wants for a linear or embedding, whatever its shape.

        Args:
            role: as in ``compress.arch`` (``qkv_proj`` counts as the value projection).
            block: index of the block; 0 for what is outside the blocks.
        """
        if self.pure or self.base in ("F16", "BF16"):
            return self.base
        if role == "lm_head" or (role == "embed_tokens" and config.tie_word_embeddings):
            return "Q8_0" if self.base == "Q8_0" else "Q6_K"
        if role in ("v_proj", "qkv_proj"):
            return self._value(block, config)
        if role == "down_proj":
            return self._down(block, config.num_hidden_layers)
        if role == "o_proj":
            raised = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}
            return raised.get(self.name, self.base)
        return self.base

    def _value(self, block: int, config: DecoderConfig) -> str:
        """The value projection: small under grouped heads, and the most sensitive."""
        layers = config.num_hidden_layers
        shared = config.num_attention_heads // config.num_key_value_heads
        grid = self.base
        if self.name == "Q2_K":
            grid = "Q4_K" if shared >= 4 else "Q3_K"
        elif self.name == "Q3_K_M":
            grid = "Q5_K" if block < 2 else "Q4_K"
        elif self.name == "Q3_K_L" or (self.name == "IQ4_NL" and shared >= 4):
            grid = "Q5_K"
        elif self.name in ("Q4_K_M", "Q5_K_M") and more_bits(block, layers):
            grid = "Q6_K"
        elif self.name == "Q4_K_S" and block < 4:
            grid = "Q5_K"
        # llama.cpp's "70B" is 80 layers with grouped heads.
        seventy = layers == 80 and shared > 1 and config.family in ("llama", "mistral", "qwen2")
        return "Q5_K" if seventy and grid in ("Q3_K", "Q4_K") else grid

    def _down(self, block: int, layers: int) -> str:
        if self.name == "Q2_K":
            return "Q3_K"
        if self.name == "Q3_K_M":
            return "Q5_K" if block < layers // 16 else "Q4_K"
        if self.name == "Q3_K_L":
            return "Q5_K"
        if self.name in ("Q4_K_M", "Q5_K_M") and more_bits(block, layers):
            return "Q6_K"
        if self.name in ("Q4_K_S", "IQ4_NL") and block < layers // 8:
            return "Q5_K"
        return self.base


def file_type(type_name: str, sizes: Mapping[str, int]) -> int:
    """``general.file_type``: the preset's, or for a chosen mix that of the type of most bytes.

    Args:
        type_name: of the plan.
        sizes: bytes by type.
    """
    if not type_name.startswith("mix-"):
        return Mix.parse(type_name).file_type
    by_base = {base: number for base, number in MIXES.values()}
    known = [grid for grid in sizes if grid in by_base]
    return by_base[max(known, key=lambda grid: sizes[grid])] if known else by_base["F16"]


def more_bits(block: int, layers: int) -> bool:
    """The blocks that llama.cpp gives more bits: both ends, and every third between."""
    first, last = layers // 8, 7 * layers // 8
    return block < first or block >= last or (block - first) % 3 == 2


def fitting(wish: str, columns: int) -> tuple[str, str]:
    """The type that rows of ``columns`` weights can hold, and a note where it is not the wish."""
    if columns % BLOCKS[wish][0] == 0:
        return wish, ""
    grid = FALLBACKS.get(wish, "F16")
    if columns % BLOCKS[grid][0]:
        grid = "F16"
    note = f"{grid} instead of {wish}: rows of {columns} are not a multiple of {BLOCKS[wish][0]}"
    return grid, note


def tensor_bytes(grid: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in the file, without alignment."""
    weights, size = BLOCKS[grid]
    return math.prod(shape) // weights * size
