"""What a job refuses before any weight is read."""

from __future__ import annotations

import pytest
from exported import Exports

from compress.checkpoint.checkpoint import Checkpoint
from compress.errors import UnsupportedModelError
from compress.plan.facts import describe_checkpoint
from compress.plan.job import prepare
from compress.recipe import load


@pytest.mark.parametrize(
    ("overrides", "format", "name"),
    [
        (["quantize.fold=awq"], "gguf", "quantize.fold"),
        (["prune.method=ffn", "prune.ratio=0.25"], "onnx", "prune"),
        (["targets.coreml.sparsity=2of4"], "coreml", "sparsity"),
        ([], "coreml", "convolve in place of attention"),
    ],
)
def test_layers_of_convolution_are_refused_by_the_settings_name(
    exported: Exports, overrides: list[str], format: str, name: str
) -> None:
    checkpoint = Checkpoint.open(exported.checkpoint("lfm2"))
    recipe = load("phone-4bit", overrides, [format])
    with pytest.raises(UnsupportedModelError, match=name):
        prepare(checkpoint, recipe, transforms={})


def test_a_checkpoint_says_which_layers_attend(exported: Exports) -> None:
    facts = describe_checkpoint(Checkpoint.open(exported.checkpoint("lfm2")))
    assert facts["metadata"]["layers"] == "1 attend, 3 convolve over 3 positions"
    assert facts["metadata"]["KV cache per token"].startswith("256 B")
