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
    """The mixture of experts that is every block's MLP: a linear router scores the experts of each
    token, and the outputs of the best are added, each times its probability.

    Attributes:
        count: of a block's experts.
        chosen: of them, for each token.
        width: of an expert's MLP, which is gated.
        renormalize: the chosen ones' probabilities are divided by their sum. The same as a softmax
            over the chosen ones alone (granitemoe).
        jitter: above 0 the two experts are those of sparsemixer (phimoe): the weight of each is its
            probability among the scores within 2 * jitter of the best, the second's without the
            first.
        shared_width: of one more MLP, which every token passes; 0 for none.
        shared_gate: its output is multiplied by the sigmoid of one more linear (qwen2_moe).
        biased: the router and the experts' linears have biases (gpt_oss).
        clamp: the activation is that of gpt_oss, ``(up + 1) * gate * sigmoid(1.702 * gate)`` with
            gate at most this, and up between minus and plus this; 0 for the family's own.
        packed: stored as MXFP4 (``compress.checkpoint.packed``).
    """

    count: int
    chosen: int
    width: int
    renormalize: bool = True
    jitter: float = 0.0
    shared_width: int = 0
    shared_gate: bool = False
    biased: bool = False
    clamp: float = 0.0
    packed: bool = False


GATED = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
CONVOLUTION = ("in_proj", "out_proj")  # and ``conv``, which stays float


def expert_roles(experts: Experts) -> tuple[str, ...]:
    """``DecoderConfig.linear_roles`` of a block with a mixture of experts."""
    roles = [*ATTENTION, "router"]
    roles += ["shared_gate"] * experts.shared_gate
    roles += [f"shared.{last}" for last in GATED if experts.shared_width]
    return (*roles, *(f"experts.{e}.{last}" for e in range(experts.count) for last in GATED))
