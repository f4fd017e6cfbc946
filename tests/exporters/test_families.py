"""The matrix of dense families and formats: every cell of docs/families.md is run here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import Exports, config_of, decoded, greedy
from families_page import page, refused_by, told_by
from numpy.typing import NDArray
from tiny_families import ROWS

from compress.checkpoint.checkpoint import Checkpoint, Stored
from compress.decoder.decoder import Decoder, reader
from compress.errors import RuntimeMissingError, UnsupportedModelError
from compress.formats import get_format

HERE = Path(__file__).resolve()
FIGURES = HERE.parents[1] / "golden" / "families.json"
PAGE = HERE.parents[2] / "docs" / "families.md"
DIVERGENCE = 0.005  # nats per token, of eight bits from float
TIE = 0.02  # of logits with a standard deviation of about 2
SETTINGS: dict[str, dict[str, Any]] = {
    "gguf": {"type": "Q8_0"},
    "onnx": {"bits": 8, "accuracy_level": 0},
    "coreml": {"grid": "int8-channel"},
    "coreai": {"grid": "int8-channel"},
    "mlx": {"bits": 8, "group_size": 32},
}
# What mlx-lm's class of a family lacks (tests/exporters/mlx/test_mlx_folder.py) is left out.
MLX_LACKS: dict[str, dict[str, Any]] = {
    "gpt_neox": {"intermediate_size": 1024},
    "gpt_neox-serial": {"intermediate_size": 1024},
    "glm": {"partial_rotary_factor": 1.0},
}
# A row for each kind of thing that differs; the rest is run by `make test-slow`.
DEFAULT = ("gemma3_text", "gpt_neo", "mixtral", "lfm2")


def divergence(wanted: NDArray[Any], found: NDArray[Any]) -> float:
    """Mean KL divergence, nats per token."""
    logs = []
    for logits in (wanted.astype(np.float64), found.astype(np.float64)):
        logits = logits - logits.max(axis=1, keepdims=True)
        logs.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    return float(np.mean(np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), axis=1)))


@pytest.mark.parametrize(
    ("row", "name"),
    [
        pytest.param(row, name, marks=() if row in DEFAULT else pytest.mark.slow)
        for row in ROWS
        for name in SETTINGS
    ],
)
def test_a_cell(request: pytest.FixtureRequest, exported: Exports, row: str, name: str) -> None:
    if get_format(name).extra:
        try:
            get_format(name).check_runtime()
        except RuntimeMissingError as error:
            pytest.skip(error.message)
    refused = refused_by(name, row)
    folder = exported.checkpoint(row, **(MLX_LACKS.get(row, {}) if name == "mlx" else {}))
    if refused:
        with pytest.raises(UnsupportedModelError) as caught:
            exported.write(name, folder, SETTINGS[name])
        assert refused in str(caught.value)
        return
    settings = SETTINGS[name]
    if name == "onnx" and config_of(Checkpoint.open(folder)).experts is not None:
        settings = {"bits": 4, "accuracy_level": 0}  # of 8 bits, onnxruntime rounds inputs, too
    made = exported.write(name, folder, settings, name=row)
    told = told_by(name, row)
    assert any(told in note for note in made.plan.notes) or not told
    checkpoint = Checkpoint.open(folder)
    config = config_of(checkpoint)
    float_model = Decoder(config, Stored(checkpoint, config).read, threads=1, resident=True)
    if made.plan.settings.get("bits") == 4:  # what the codes mean
        float_model = Decoder(made.config, reader(made.config, decoded(made)), threads=1)
    room = min(60, made.plan.max_context)  # beyond every window, where the runtime has them
    runtime = get_format(name).open_runtime(made.path, context=room, threads=1)
    ids = made.tokens(room - 1)
    found = divergence(float_model.logits(ids), runtime.logits(ids))
    assert found <= DIVERGENCE
    length = min(16, room - 5)
    sequence = ids[:4]
    for token in greedy(runtime, sequence, length):  # through the cache
        logits = runtime.logits(sequence)[-1]  # without
        # In float16 sums of other lengths round otherwise, which can turn two equal tokens.
        assert logits.max() - logits[token] <= TIE
        sequence.append(token)
    runtime.close()
    if request.config.getoption("--update-golden"):
        figures = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {}
        figures.setdefault(row, {})[name] = float(f"{max(found, 0.0):.1e}")
        FIGURES.write_text(json.dumps(dict(sorted(figures.items())), indent=1) + "\n")


def test_the_page_is_the_table(request: pytest.FixtureRequest) -> None:
    text = page(json.loads(FIGURES.read_text()))
    if request.config.getoption("--update-golden"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text, "--update-golden"
