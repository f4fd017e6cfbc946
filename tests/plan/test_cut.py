"""Models whose pruned form no checkpoint of theirs expresses."""

from __future__ import annotations

import pytest
from exported import Exports

from compress.errors import UnsupportedModelError
from compress.plan.cut import plan_cut
from compress.recipe.model import Prune


@pytest.mark.parametrize(
    ("row", "method", "reason"),
    [
        ("gpt2", "depth", "layout"),
        ("falcon", "ffn", "layout"),
        ("gemma3_text", "depth", "its layers differ"),
        ("olmo2", "heads", "one norm spans all"),
        ("llama4_text", "ffn", "a key of its own"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    exported: Exports, row: str, method: str, reason: str
) -> None:
    prune = Prune.model_validate({"method": method, "ratio": 0.3})
    with pytest.raises(UnsupportedModelError, match=reason):
        plan_cut(exported.config(row), prune)


def test_a_cut_model_of_one_kind_of_layers(exported: Exports) -> None:
    for row, method in (("granite", "depth"), ("gemma3_text", "ffn"), ("arcee", "heads")):
        cut = plan_cut(exported.config(row), Prune.model_validate({"method": method, "ratio": 0.5}))
        assert cut is not None and cut.retained < cut.total
        assert len(cut.config.layers) == cut.config.num_hidden_layers
