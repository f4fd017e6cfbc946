"""States that do not grow, of layers that convolve, in the ONNX folder."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from exported import Exports, greedy, reference
from loaders import COUNT, LOADERS, TRANSFORMERS, Case

from exporters.onnx.inspection import find_graph
from exporters.onnx.runtime import OnnxRuntime


def test_the_graph_has_an_input_for_each_layers_state(exported: Exports) -> None:
    made = exported("onnx", "lfm2", accuracy_level=0)
    graph = onnx.load(find_graph(made.path), load_external_data=False).graph
    shapes = {
        value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    past = [name for name in shapes if name.startswith("past")]
    keys = ["past_key_values.2.key", "past_key_values.2.value"]
    assert past == ["past_conv.0", "past_conv.1", *keys, "past_conv.3"]
    assert shapes["past_conv.1"] == shapes["present_conv.1"] == ["batch_size", 128, 3]
    taps = next(t for t in graph.initializer if "layers.0.conv.weight" in t.name)
    assert taps.data_type == onnx.TensorProto.FLOAT  # it is not quantized
    config = json.loads((made.path / "config.json").read_text())
    assert config["layer_types"] == ["conv", "conv", "full_attention", "conv"]


def test_the_state_goes_through_chunks_and_is_dropped(exported: Exports) -> None:
    made = exported("onnx", "lfm2", accuracy_level=0)
    ids = made.tokens(40)
    wanted = reference(made).logits(ids)
    runtime = OnnxRuntime(made.path, context=64, threads=1, batch=7)
    for _ in range(2):  # the second time the state is not that of the first
        assert np.abs(runtime.logits(ids) - wanted).max() < 1e-3
    found = [runtime.feed(ids[:1]), runtime.feed(ids[1:3]), runtime.feed(ids[3:])]
    for place, logits in zip((0, 2, 39), found, strict=True):
        assert np.abs(logits - wanted[place]).max() < 1e-3
    assert runtime.rewind(40) == 40
    assert runtime.rewind(20) == 0  # the columns before that are gone
    assert np.abs(runtime.extend(ids[:20]) - wanted[:20]).max() < 1e-3
    runtime.close()


@pytest.mark.parametrize("name", ["genai", pytest.param("node", marks=pytest.mark.slow)])
def test_a_loader_gives_our_tokens(exported: Exports, name: str) -> None:
    made = exported("onnx", "lfm2", accuracy_level=0)
    case = Case(made.path, made.tokens(9, seed=1))
    if name == "node" and not TRANSFORMERS.is_dir():
        pytest.skip("needs `make loaders`")
    answer = LOADERS[name].run({"lfm2": case})["lfm2"]
    runtime = OnnxRuntime(made.path, context=64, threads=1)
    assert answer == greedy(runtime, case.prompt, COUNT)


def test_optimum_is_told_of(exported: Exports) -> None:
    made = exported("onnx", "lfm2", accuracy_level=0)
    assert any("states of convolutions" in note for note in made.plan.notes)
