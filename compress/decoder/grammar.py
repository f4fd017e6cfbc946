"""Parts of a decoder's description that layers share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionKind:
    """One kind of attention layer; a model has one to three.

    Attributes:
        rope: index into ``DecoderConfig.ropes``; None: no rotation (NoPE).
        window: attention sees this many last positions; None where there is no window or it is
            never reached within ``max_context``.
        normed: False where q and k of these layers are not normed in spite of ``qk_norm``.
    """

    rope: int | None = 0
    window: int | None = None
    normed: bool = True
