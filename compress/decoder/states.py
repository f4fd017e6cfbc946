"""What each layer keeps of the positions before: keys and values, which grow with them, or the last
columns before a convolution, which do not.
"""

from __future__ import annotations

from dataclasses import dataclass

from compress.decoder.config import DecoderConfig

__all__ = ["State", "fixed_bytes", "layer_types", "states"]

FLOAT32 = 4  # bytes of a value: runtimes keep states that do not grow in float32


@dataclass(frozen=True)
class State:
    """The state of one layer.

    Attributes:
        kind: ``kv`` or ``conv``.
        shape: of ``kv`` the shape of a position's keys, and of its values, ``(heads, head_dim)``;
            of ``conv`` ``(channels, taps)``: one column more than is needed, as in transformers.
    """

    kind: str
    shape: tuple[int, int]


def states(config: DecoderConfig) -> tuple[State, ...]:
    """The state of every layer."""
    heads = State("kv", (config.num_key_value_heads, config.head_dim))
    kinds = [
        State("conv", (config.hidden_size, kind.taps)) if kind.taps else heads
        for kind in config.kinds
    ]
    return tuple(kinds[kind] for kind in config.layers)


def fixed_bytes(config: DecoderConfig) -> int:
    """Bytes of the states that do not grow with the context."""
    shapes = [state.shape for state in states(config) if state.kind == "conv"]
    return FLOAT32 * sum(channels * taps for channels, taps in shapes)


def layer_types(config: DecoderConfig) -> list[str]:
    """``layer_types`` as in a ``config.json``: ``full_attention`` or ``conv``."""
    return ["conv" if state.kind == "conv" else "full_attention" for state in states(config)]
