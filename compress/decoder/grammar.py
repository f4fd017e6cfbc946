"""Parts of a decoder's description that layers share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionKind:
    """One kind of layer; a model has one to three. It attends, or convolves in place of attention.

    Attributes:
        rope: index into ``DecoderConfig.ropes``; None: no rotation (NoPE).
        window: attention sees this many last positions; None where there is no window or it is
            never reached within ``max_context``.
        normed: False where q and k of these layers are not normed in spite of ``qk_norm``.
        taps: of the gated causal convolution that these layers have in place of attention
            (``compress.decoder.convolution``); 0: they attend.
        absent: roles of weights that other layers have and these do not.
    """

    rope: int | None = 0
    window: int | None = None
    normed: bool = True
    taps: int = 0
    absent: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Experts:
    """The mixture of experts that is every block's MLP: a linear router without a bias scores the
    experts of each token, and the outputs of the best are added, each times its probability.

    Attributes:
        count: of a block's experts.
        chosen: of them, for each token.
        width: of an expert's MLP, which is gated.
        renormalize: the chosen ones' probabilities are divided by their sum. The same as a softmax
            over the chosen ones alone (granitemoe).
        shared_width: of one more MLP, which every token passes; 0 for none.
        shared_gate: its output is multiplied by the sigmoid of one more linear (qwen2_moe).
    """

    count: int
    chosen: int
    width: int
    renormalize: bool = True
    shared_width: int = 0
    shared_gate: bool = False


GATED = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
CONVOLUTION = ("in_proj", "out_proj")  # and ``conv``, which stays float


def expert_roles(experts: Experts) -> tuple[str, ...]:
    """``DecoderConfig.linear_roles`` of a block with a mixture of experts."""
    roles = [*ATTENTION, "router"]
    roles += ["shared_gate"] * experts.shared_gate
    roles += [f"shared.{last}" for last in GATED if experts.shared_width]
    return (*roles, *(f"experts.{e}.{last}" for e in range(experts.count) for last in GATED))
