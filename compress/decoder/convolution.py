"""The gated causal convolution that some layers have in place of attention (LFM2).

    x ─ in_proj ─┬─ B ─┐
                 ├─ x ─┴ × ─ conv ─┐
                 └─ C ─────────────┴ × ─ out_proj

The convolution is depthwise over the last ``taps`` positions of B·x; a layer's state is the last
``taps - 1`` of them. Reference: ``Lfm2ShortConv`` of transformers 4.57.6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from compress.decoder.decoder import OnInput
    from compress.decoder.kv_cache import Past

__all__ = ["convolved"]


def convolved(
    linear: Callable[[str, Tensor, OnInput | None], Tensor],
    taps: Tensor,
    x: Tensor,
    past: Past | None,
    on_input: OnInput | None,
) -> Tensor:
    """The layer's output for one normed sequence, without residual, ``[n, hidden]``.

    Args:
        linear: the products with ``in_proj`` and ``out_proj``, by role.
        taps: ``[hidden, taps]``; the last one meets the position itself.
        x: ``[n, hidden]``.
        past: keeps B·x of every position, so that it can be cut at any; None: there are none.
        on_input: as ``Block.attention``.
    """
    before, after, value = linear("in_proj", x, on_input).chunk(3, dim=-1)
    history = before * value
    if past is not None:
        history = past.append(history[None], history[None, :, :0])[0][0]
    length = x.shape[0] + taps.shape[1] - 1
    history = history[-length:]
    columns = F.pad(history.T, (length - history.shape[0], 0))
    mixed = F.conv1d(columns[None], taps[:, None], groups=taps.shape[0])[0].T
    return linear("out_proj", after * mixed, on_input)
