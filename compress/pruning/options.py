"""The command line's option for pruning: ``--prune``."""

from __future__ import annotations

from typing import Any

from compress.errors import UsageError
from compress.recipe import AMOUNTS

__all__ = ["prune_option"]


def prune_option(text: str) -> dict[str, Any]:
    """``depth:3``, ``ffn:10%``, ``ffn:2048``, ``heads:2``, ``auto`` → the recipe's ``prune``.

    Raises:
        UsageError: anything else.
    """
    method, _, amount = text.partition(":")
    keys = AMOUNTS.get(method, ())
    number = amount.removesuffix("%")
    if keys and amount.endswith("%"):
        try:
            return {"method": method, "ratio": float(number) / 100}
        except ValueError:
            pass
    elif keys and number.isdecimal():
        return {"method": method, keys[1]: int(number)}
    raise UsageError(
        f"--prune {text}: write METHOD:AMOUNT",
        hint="depth:3 or depth:10% (blocks that go), ffn:2048 (width that stays), ffn:10%, "
        "heads:2 (key-value heads that stay), heads:25%",
    )
