"""Rotary position embedding (RoPE): the settings of ``config.json`` as inverse frequencies.

Formulas: ``modeling_rope_utils`` of transformers 4.57.6; longrope is arXiv 2402.13753.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.decoder.config_json import Config, flag, number, numbers, whole

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Yarn:
    """Settings of YaRN (arXiv 2309.00071).

    Attributes:
        factor: divisor of low frequencies.
        original_context: positions of the original training.
        usual: whether the paper's bounds (32 turns and 1, whole pairs) give the same factors.
    """

    factor: float
    original_context: int
    usual: bool


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of a decoder.

    Attributes:
        theta: the base.
        kind: ``default``, ``linear``, ``llama3``, ``longrope``, ``yarn`` or ``dynamic`` (as
            ``default`` up to ``max_position_embeddings``).
        rotary_dim: leading dimensions of a head that rotate (halves: NEOX layout).
        factors: float, ``[rotary_dim / 2]``: inverse frequencies are divided by these
            (1.0 for ``default``; the *short* list for ``longrope``).
        long_factors: the other list of ``longrope``, of texts beyond ``original_context``; empty
            otherwise.
        attention_factor: multiplied into cos and sin, also for short prompts (``longrope``,
            ``yarn``).
        long_attention_factor: with ``long_factors``; the same but in phimoe.
        original_context: positions up to which ``factors`` hold (``longrope``), else 0.
        yarn: settings behind ``factors``, for metadata; None for other kinds.
        caveat: a line for the user, or ``""``.
    """

    theta: float
    kind: str
    rotary_dim: int
    factors: tuple[float, ...]
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    long_attention_factor: float = 1.0
    original_context: int = 0
    yarn: Yarn | None = None
    caveat: str = ""

    def inverse_frequencies(self) -> Float32:
        """float32 ``[rotary_dim / 2]``, rounded where transformers rounds.

        One unit in the last place is 2e-4 radians at position 4096, so the order of operations
        matters: float32 exponent, correctly rounded power, float32 product and reciprocal.
        """
        base = powers(self.theta, self.rotary_dim)
        if self.yarn is not None:  # in float64: gives back the frequencies rounded in ``_yarn``
            return (1.0 / (np.asarray(self.factors) * base)).astype(np.float32)
        factors = np.asarray(self.factors, np.float32)
        return np.asarray(np.float32(1.0) / (factors * base), np.float32)

    def cos_sin(self, positions: int, switch: int = 0) -> tuple[Float32, Float32]:
        """cos and sin times ``attention_factor``, each float32 ``[positions, rotary_dim / 2]``.

        Args:
            switch: of ``longrope``: so many rows by ``factors``, and after them ``positions`` rows,
                from position 0 on, by ``long_factors``.
        """
        if switch:
            tables = (self.cos_sin(switch), self.by_long_factors().cos_sin(positions))
            cos, sin = (np.concatenate(both) for both in zip(*tables, strict=True))
            return cos, sin
        angle = np.outer(np.arange(positions, dtype=np.float32), self.inverse_frequencies())
        scale = np.float32(self.attention_factor)
        return np.cos(angle) * scale, np.sin(angle) * scale

    def by_long_factors(self) -> Rope:
        """This embedding for texts beyond ``original_context`` (``longrope``)."""
        factor = self.long_attention_factor
        return replace(self, factors=self.long_factors, attention_factor=factor)


def powers(theta: float, rotary: int) -> Float32:
    """``theta ** (2i / rotary)`` for each pair of dimensions: exponents in float32, powers rounded
    to float32."""
    exponent = np.arange(0, rotary, 2, dtype=np.float32) / np.float32(rotary)
    return np.power(theta, exponent.astype(np.float64)).astype(np.float32)


def longrope(theta: float, rotary: int, keys: Config) -> Rope:
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
    # Of phimoe the two differ.
    below, beyond = (number(keys, key, attention) for key in ("short_mscale", "long_mscale"))
    return Rope(theta, "longrope", rotary, short, long, below, beyond, original)


def yarn(theta: float, rotary: int, scaling: Mapping[str, Any], positions: int) -> Rope:
    """As ``_compute_yarn_parameters`` of transformers, with its float32 roundings.

    Args:
        positions: of the model, used where ``scaling`` has no original context.
    """
    factor = number(scaling, "factor")
    original = whole(scaling, "original_max_position_embeddings", positions)
    fast, slow = number(scaling, "beta_fast", 32.0), number(scaling, "beta_slow", 1.0)
    truncate = scaling.get("truncate") is None or flag(scaling, "truncate")
    if factor < 1 or theta <= 1:
        raise ValueError(f"yarn: factor {factor:g} and rope_theta {theta:g} must be 1 or more")
    factors = _yarn_factors(theta, rotary, factor, original, (fast, slow), truncate=truncate)
    usual = factors == _yarn_factors(theta, rotary, factor, original, (32, 1), truncate=True)
    attention, caveat = number(scaling, "attention_factor", _attention(factor, scaling)), ""
    if "attention_factor" not in scaling and "attn_factor" in scaling:
        caveat = (
            f"transformers does not read rope_scaling's attn_factor, and neither is it read here: "
            f"cos and sin are multiplied by {attention:.4g}; attention_factor in config.json sets "
            "another number"
        )
    yarn = Yarn(factor, original, usual)
    return Rope(theta, "yarn", rotary, factors, (), attention, yarn=yarn, caveat=caveat)


def _yarn_factors(
    theta: float, rotary: int, factor: float, original: int, turns: tuple[float, float], *,
    truncate: bool,
) -> tuple[float, ...]:  # fmt: skip
    """Divisors of the frequencies: 1 above ``turns[0]`` turns within the original context, the
    whole factor below ``turns[1]``, a ramp between."""
    low, high = (
        rotary * math.log(original / (count * 2 * math.pi)) / (2 * math.log(theta))
        for count in turns
    )
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary - 1)
    pairs, width = np.arange(rotary // 2, dtype=np.float32), high - low or 0.001
    plain_share = np.float32(1) - np.clip((pairs - np.float32(low)) / np.float32(width), 0, 1)
    base = powers(theta, rotary)
    plain, stretched = np.float32(1) / base, np.float32(1) / (np.float32(factor) * base)
    frequencies = stretched * (np.float32(1) - plain_share) + plain * plain_share
    return tuple((1.0 / (frequencies.astype(np.float64) * base)).tolist())


def _attention(factor: float, scaling: Mapping[str, Any]) -> float:
    """YaRN's attention factor, from the scaling factor and DeepSeek's two mscale values."""
    over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if over and under:
        over, under = number(scaling, "mscale"), number(scaling, "mscale_all_dim")
        return (0.1 * over * math.log(factor) + 1) / (0.1 * under * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


def llama3_factors(theta: float, rotary: int, scaling: Mapping[str, Any]) -> tuple[float, ...]:
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
