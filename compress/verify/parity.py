"""Parity vectors: some logits of an artifact in its runtime here, which a device must reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from compress.verify.baseline import Float32

POSITIONS = 32
LOGITS = 32  # of a position: half of them its largest, the others spread over the vocabulary
PREFILL = 16  # ids of the first call; the others follow one at a time, through the KV cache

# A device sums float16 products in another order. Nobody has measured how far that leads on a
# phone; float16 at every operation moved no logit of SmolLM2-135M by a tenth of this.
ABSOLUTE, RELATIVE = 0.05, 0.01


def vectors(runtime: str, tokens: Sequence[int], logits: Float32) -> dict[str, Any] | None:
    """Ids, most likely tokens and logits at the first ``POSITIONS`` positions of a sequence.

    Args:
        runtime: its name.
        tokens: of the sequence.
        logits: float32 ``[positions, vocab]``, of at least its first ``POSITIONS``.

    Returns:
        Plain data; None where there are no tokens, or a logit is not finite.
    """
    rows = logits[: min(POSITIONS, len(tokens))]
    if not len(rows) or not np.isfinite(rows).all():
        return None
    vocab = rows.shape[1]
    largest = np.argsort(-rows, axis=1, kind="stable")[:, : LOGITS // 2]
    asked, values, margins = [], [], []
    for row, best in zip(rows, largest, strict=True):
        others = np.setdiff1d(np.linspace(0, vocab - 1, LOGITS, dtype=np.int64), best)
        ids = np.concatenate([best, others[: LOGITS - len(best)]])
        asked.append(ids.tolist())
        values.append([round(float(value), 4) for value in row[ids]])
        margins.append(round(float(row[best[0]] - row[best[min(1, len(best) - 1)]]), 4))
    absolute = ABSOLUTE + RELATIVE * float(np.abs(rows).max())
    return {
        "runtime": runtime,
        "ids": [int(token) for token in tokens[: len(rows)]],
        "prefill": min(PREFILL, len(rows)),
        "top_1": largest[:, 0].tolist(),
        "margins": margins,
        "token_ids": asked,
        "values": values,
        "tolerance": {"absolute": round(absolute, 4), "measured_on_a_device": False},
    }
