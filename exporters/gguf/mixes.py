"""llama.cpp's presets: the type of each tensor, and the fallback for rows that do not fit.

The rules are those of ``llama_tensor_get_type_impl`` and ``tensor_type_fallback`` in
``src/llama-quant.cpp`` (llama.cpp of October 2026), so that packlight's ``Q4_K_M`` has the same
types and bytes as llama.cpp's. A few presets differ where an importance matrix is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from compress.decoder.config import DecoderConfig
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
    "MXFP4": (32, 17),
    "Q6_K": (256, 210),
    "Q5_K": (256, 176),
    "Q4_K": (256, 144),
    "IQ4_XS": (256, 136),
    "Q3_K": (256, 110),
    "IQ3_S": (256, 110),
    "IQ3_XXS": (256, 98),
    "Q2_K": (256, 84),
}

# Rows that 256-weight blocks do not divide: the type with 32-weight blocks that is used instead.
FALLBACKS: dict[str, str] = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ3_XXS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
}

# Types in llama.cpp's presets that packlight cannot write → the type that is written instead.
LACKING: dict[str, str] = {"IQ2_S": "IQ3_XXS"}

# Preset → its base type and its number in ``general.file_type`` (``llama_ftype`` in llama.h).
# MXFP4 has the number of llama.cpp's MXFP4_MOE, which uses it in experts only (and Q8_0 elsewhere):
# llama-quantize writes it into dense layers with --pure or --tensor-type.
MIXES: dict[str, tuple[str, int]] = {
    "Q2_K": ("Q2_K", 10),
    "IQ3_XXS": ("IQ3_XXS", 23),
    "IQ3_XS": ("IQ3_S", 22),
    "IQ3_S": ("IQ3_S", 26),
    "IQ3_M": ("IQ3_S", 27),
    "Q3_K_S": ("Q3_K", 11),
    "Q3_K_M": ("Q3_K", 12),
    "Q3_K_L": ("Q3_K", 13),
    "Q4_0": ("Q4_0", 2),
    "Q4_1": ("Q4_1", 3),
    "MXFP4": ("MXFP4", 38),
    "IQ4_XS": ("IQ4_XS", 30),
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

# Preset → the value projection's type where at least four heads share it.
VALUES_OF_FOUR: dict[str, str] = {
    "Q2_K": "Q4_K",
    "IQ3_XXS": "Q4_K",
    "IQ3_XS": "Q4_K",
    "IQ3_S": "Q4_K",
    "IQ4_XS": "Q5_K",
    "IQ4_NL": "Q5_K",
}

# Preset → type of down_proj in the first eighth of the blocks: always; only without; only with an
# importance matrix.
DOWN_FIRST: dict[str, str] = {"Q4_K_S": "Q5_K", "IQ3_M": "Q4_K"}
DOWN_FIRST_PLAIN: dict[str, str] = {"IQ3_XXS": "Q4_K", "IQ4_XS": "Q5_K", "IQ4_NL": "Q5_K"}
DOWN_FIRST_WEIGHTED: dict[str, str] = {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}

# Presets that raise o_proj to Q5_K where there are eight experts.
OUTPUT_OF_EIGHT = (
    "Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M",
    "IQ4_XS",
)  # fmt: skip

# Role → preset → type, where all blocks have the same.
OTHERS: dict[str, dict[str, str]] = {
    "q_proj": {"IQ3_XXS": "IQ2_S", "IQ3_XS": "IQ3_XXS"},
    "k_proj": {"IQ3_XXS": "IQ2_S", "IQ3_XS": "IQ3_XXS"},
    "o_proj": {
        "Q2_K": "Q3_K",
        "IQ3_XXS": "IQ3_S",
        "IQ3_M": "Q4_K",
        "Q3_K_M": "Q4_K",
        "Q3_K_L": "Q5_K",
    },
}


@dataclass(frozen=True)
class Mix:
    """A preset.

    Attributes:
        name: canonical spelling, with ``-pure`` where every tensor gets the base type.
        base: the type of most tensors.
        file_type: ``general.file_type``.
        pure: no exceptions for sensitive tensors (``llama-quantize --pure``).
        importance: codes are chosen with an importance matrix (``llama-quantize --imatrix``).
    """

    name: str
    base: str
    file_type: int
    pure: bool
    importance: bool = False

    @classmethod
    def parse(cls, text: str, *, importance: bool = False) -> Mix:
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
        return cls(f"{name}-pure" if pure else name, base, file_type, pure, importance)

    def wish(self, role: str, block: int, config: DecoderConfig) -> str:
        """The preset's type for a linear or embedding, before the fallback for its shape.

        Args:
            role: as in ``compress.decoder.config`` (``qkv_proj`` counts as the value projection).
            block: index of the block; 0 outside the blocks.
        """
        if self.pure or self.base in ("F16", "BF16"):
            return self.base
        if config.experts is not None:
            _, _, last = role.rpartition(".")
            found = self._beside_experts(role, config.experts.count)
            if found:
                return found
            role = last
        if role == "lm_head" or (role == "embed_tokens" and config.tie_word_embeddings):
            if self.base == "Q8_0":
                return "Q8_0"
            # Where rows do not fit, llama.cpp uses the fallback of Q6_K, not that of Q5_K.
            return "Q5_K" if self.name == "IQ3_XXS" and config.hidden_size % 256 == 0 else "Q6_K"
        if role == "embed_tokens":
            return "IQ3_S" if self.name == "IQ3_XXS" else self.base
        if role in ("v_proj", "qkv_proj"):
            return self._value(block, config)
        if role == "down_proj":
            eight = config.experts is not None and config.experts.count == 8
            if eight and self.name == "IQ3_M" and more_bits(block, config.num_hidden_layers):
                return "Q4_K"
            return self._down(block, config.num_hidden_layers)
        if role in ("up_proj", "gate_proj", "gate_up_proj"):
            middle = config.num_hidden_layers // 8 <= block < 7 * config.num_hidden_layers // 8
            return "IQ3_XXS" if self.name == "IQ3_XS" and middle else self.base
        return OTHERS.get(role, {}).get(self.name, self.base)

    def _beside_experts(self, role: str, count: int) -> str:
        """The type of a matrix in a model with experts where that differs from other models', else
        an empty text: llama.cpp raises attention in models of eight experts."""
        if self.name == "MXFP4":
            return "MXFP4" if role.startswith("experts.") else "Q8_0"
        if count == 8 and role in ("k_proj", "v_proj"):
            return "Q8_0"
        if count == 8 and role == "o_proj":
            return "Q5_K" if self.name in OUTPUT_OF_EIGHT else self.base
        return ""

    def _value(self, block: int, config: DecoderConfig) -> str:
        """The value projection's type; it is small with grouped heads, and the most sensitive."""
        layers = config.num_hidden_layers
        if any(kind.taps for kind in config.kinds):  # llama.cpp counts the layers that attend
            attends = [not config.kinds[kind].taps for kind in config.layers]
            block, layers = sum(attends[:block]), sum(attends)
        shared = config.num_attention_heads // config.num_key_value_heads
        if config.kinds[config.layers[0]].taps:  # it looks at the first layer, which has no heads
            shared = 0
        grid = self.base
        if self.name in VALUES_OF_FOUR and shared >= 4:
            grid = VALUES_OF_FOUR[self.name]
        elif self.name == "Q2_K":
            grid = "Q3_K"
        elif self.name == "IQ3_XXS" and not self.importance:
            grid = "IQ3_S"
        elif self.name == "IQ3_M":
            grid = "Q4_K"
        elif self.name == "Q3_K_M":
            grid = "Q5_K" if block < 2 else "Q4_K"
        elif self.name == "Q3_K_L":
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
        if self.name == "IQ3_XXS" and not self.importance and block >= layers // 8:
            return "Q3_K"
        if block < layers // 8:
            raised = DOWN_FIRST | (DOWN_FIRST_WEIGHTED if self.importance else DOWN_FIRST_PLAIN)
            return raised.get(self.name, self.base)
        return self.base


def more_bits(block: int, layers: int) -> bool:
    """Whether llama.cpp gives a block more bits: both ends, and every third between."""
    first, last = layers // 8, 7 * layers // 8
    return block < first or block >= last or (block - first) % 3 == 2


def fitting(wish: str, columns: int) -> tuple[str, str]:
    """The type, or its fallback for rows of ``columns`` weights, and a note in that case."""
    wanted = LACKING.get(wish, wish)
    if columns % BLOCKS[wanted][0] == 0:
        note = f"{wanted} instead of {wish}, which packlight cannot write"
        return wanted, "" if wanted == wish else note
    grid = FALLBACKS.get(wanted, "F16")
    if columns % BLOCKS[grid][0]:
        grid = "F16"
    note = f"{grid} instead of {wish}: rows of {columns} are not a multiple of {BLOCKS[wanted][0]}"
    return grid, note


def tensor_bytes(grid: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in the file, without alignment."""
    weights, size = BLOCKS[grid]
    return math.prod(shape) // weights * size
