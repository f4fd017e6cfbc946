"""Rotary position embedding (RoPE): what ``config.json`` says, reduced to what a runtime needs.

Formulas: ``modeling_rope_utils`` of transformers 4.57.6; longrope is arXiv 2402.13753.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.decoder.config_json import Config, number, numbers, short, whole
from compress.errors import UnsupportedModelError

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of a decoder.

    Attributes:
        theta: the base.
        kind: ``default``, ``linear``, ``llama3`` or ``longrope``.
        rotary_dim: leading dimensions of a head that rotate (halves: NEOX layout).
        factors: float, ``[rotary_dim / 2]``: inverse frequencies are divided by these
            (1.0 for ``default``; the *short* list for ``longrope``).
        long_factors: the other list of ``longrope``, for metadata only; empty otherwise.
        attention_factor: multiplied into cos and sin, also for short prompts (``longrope``).
        original_context: positions up to which ``factors`` hold (``longrope``), else 0.
    """

    theta: float
    kind: str
    rotary_dim: int
    factors: tuple[float, ...]
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    original_context: int = 0

    def inverse_frequencies(self) -> Float32:
        """float32 ``[rotary_dim / 2]``, rounded where transformers rounds.

        One unit in the last place here is 2e-4 radians at position 4096, so the order matters:
        float32 exponent, correctly rounded power, float32 product and reciprocal.
        """
        exponent = np.arange(0, self.rotary_dim, 2, dtype=np.float32) / np.float32(self.rotary_dim)
        base = np.power(self.theta, exponent.astype(np.float64)).astype(np.float32)
        factors = np.asarray(self.factors, np.float32)
        return np.asarray(np.float32(1.0) / (factors * base), np.float32)

    def cos_sin(self, positions: int) -> tuple[Float32, Float32]:
        """Tables of cos and sin, each float32 ``[positions, rotary_dim / 2]``, scaled."""
        angle = np.outer(np.arange(positions, dtype=np.float32), self.inverse_frequencies())
        scale = np.float32(self.attention_factor)
        return np.cos(angle) * scale, np.sin(angle) * scale


def read_rope(config: Config, head_dim: int, partial: float = 1.0) -> Rope:
    """Rotary settings from ``rope_theta``/``rope_scaling`` or the newer ``rope_parameters``.

    ``longrope`` (Phi-3-128k, 3.5, Phi-4-mini; also spelled ``su``) keeps the short factors: they
    hold up to ``original_max_position_embeddings``.

    Args:
        partial: the family's share of a head that rotates, where the config names none.

    Raises:
        UnsupportedModelError: another scaling (``yarn``, ``dynamic`` …).
        KeyError, ValueError: a key is missing or its value impossible.
    """
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise ValueError("rope_scaling is not an object")
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise UnsupportedModelError("rope settings that differ between layers are not supported")
    both = {**config, **{key: value for key, value in scaling.items() if value is not None}}
    theta = number(both, "rope_theta", 10000.0)
    rotary = int(head_dim * number(both, "partial_rotary_factor", partial))
    if rotary % 2 or not 2 <= rotary <= head_dim:
        raise ValueError(f"{rotary} rotating dimensions do not fit heads of {head_dim}")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    half = rotary // 2
    if kind == "default":
        return Rope(theta, kind, rotary, (1.0,) * half)
    if kind == "linear":
        return Rope(theta, kind, rotary, (number(scaling, "factor"),) * half)
    if kind == "llama3":
        return Rope(theta, kind, rotary, _llama3_factors(theta, rotary, scaling))
    # transformers reads the early Phi-3 spellings as longrope too.
    if kind in ("longrope", "su") or (kind == "yarn" and "short_factor" in scaling):
        return _longrope(theta, rotary, both)
    raise UnsupportedModelError(f"rope scaling {short(kind)} is not supported")


def _longrope(theta: float, rotary: int, keys: Config) -> Rope:
    short, long = numbers(keys, "short_factor"), numbers(keys, "long_factor")
    if len(short) != rotary // 2 or len(long) != rotary // 2:
        raise ValueError(
            f"rope_scaling has {len(short)} short and {len(long)} long factors, "
            f"the heads need {rotary // 2}"
        )
    positions = whole(keys, "max_position_embeddings")
    original = whole(keys, "original_max_position_embeddings", 4096)  # Phi3Config's default
    stretch = positions / original
    attention = 1.0
    if stretch > 1 and original > 1:
        attention = math.sqrt(1 + math.log(stretch) / math.log(original))
    attention = number(keys, "attention_factor", attention)
    return Rope(theta, "longrope", rotary, short, long, attention, original)


def _llama3_factors(theta: float, rotary: int, scaling: Mapping[str, Any]) -> tuple[float, ...]:
    factor = number(scaling, "factor")
    low, high = number(scaling, "low_freq_factor"), number(scaling, "high_freq_factor")
    original = number(scaling, "original_max_position_embeddings")
    if high <= low:
        raise ValueError(f"high_freq_factor ({high}) is not above low_freq_factor ({low})")
    factors = []
    for i in range(0, rotary, 2):
        turns = original / (2 * math.pi * theta ** (i / rotary))  # original context ÷ wavelength
        if turns < low:
            factors.append(factor)
        elif turns > high:
            factors.append(1.0)
        else:
            smooth = (turns - low) / (high - low)
            factors.append(1.0 / ((1 - smooth) / factor + smooth))
    return tuple(factors)
