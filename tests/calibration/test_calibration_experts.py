"""Statistics of experts: over the tokens that transformers sends to each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from hooked import Model, distance, draw_windows, hooked

from compress.calibration import experts
from compress.calibration.statistics import LayerStats, Statistics, file_name, input_names, save
from compress.calibration.walk import Boundary, walk
from compress.decoder import experts as decoding


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model("mixtral", tmp_path_factory.mktemp("mixtral"), dtype="float32")


def gathered(model: Model, windows: list[list[int]], **settings: object) -> dict[str, LayerStats]:
    stats: dict[str, LayerStats] = {}
    for found in walk(model.config, model.read, windows, exact=True, **settings):
        assert len({file_name(key) for key in found}) == 1  # a file for each
        stats |= found
    return stats


def test_they_are_those_of_a_plain_hooked_model(model, monkeypatch, tmp_path):
    monkeypatch.setattr(experts, "LEAST", 1)
    monkeypatch.setattr(experts, "COLUMNS", 1 << 20)
    monkeypatch.setattr(experts, "IN_MEMORY", 0)  # activations in files
    monkeypatch.setattr(decoding, "ROWS", 16)
    windows = draw_windows(count=33, length=16)
    stats = gathered(model, windows, hessian=True, work=tmp_path)
    expected = hooked(model, tiny.reference(model.folder), windows)
    assert list(stats) == list(input_names(model.config))
    assert (tmp_path / "inner.bin").is_file() and (tmp_path / "mixed.bin").is_file()
    for key, x in expected.items():
        assert stats[key].count == len(x)
        assert distance(stats[key].importance, (x * x).mean(0)) < 1e-4, key
        held = stats[key].held_back
        rows = 0 if held is None else len(held)
        (hessian,) = stats[key].hessian
        # The Hessian is over the tokens that are not held back: of every 16th window.
        products = x.T @ x - (0 if held is None else held.T.astype(float) @ held)
        assert distance(hessian, products / (len(x) - rows)) < 1e-4, key
    tokens = [len(expected[f"blocks.0.experts.{e}.gate_proj"]) for e in range(8)]
    assert sum(tokens) == 2 * 33 * 16 and len(set(tokens)) > 4


def test_an_expert_with_few_tokens_shares_the_importance_of_all(model):
    windows = draw_windows(count=2, length=16)  # four tokens each
    stats = gathered(model, windows, hessian=True)
    expected = hooked(model, tiny.reference(model.folder), windows)
    gates = [expected.get(f"blocks.0.experts.{e}.gate_proj", np.empty((0, 128))) for e in range(8)]
    everything = np.concatenate(gates)  # each token twice
    prior = (everything**2).mean(0)
    for e, x in enumerate(gates):
        entry = stats[f"blocks.0.experts.{e}.gate_proj"]
        assert entry.hessian is None and entry.count == len(x)
        own = (x**2).mean(0) if len(x) else 0.0
        mixed = prior + len(x) / experts.floor_of(model.config) * (own - prior)
        assert distance(entry.importance, mixed) < 1e-4
    down = stats["blocks.0.experts.0.down_proj"].importance
    own = (expected["blocks.0.experts.0.down_proj"] ** 2).mean(0)
    share = len(expected["blocks.0.experts.0.down_proj"]) / experts.floor_of(model.config)
    assert distance(down, own.mean() + share * (own - own.mean())) < 1e-4


def test_an_interrupted_walk_continues_with_the_next_block(model, tmp_path):
    windows = draw_windows(count=3, length=16)
    whole = gathered(model, windows, hessian=False, boundary=Boundary(tmp_path / "a"))
    place, seen = tmp_path / "b", []
    for found in walk(
        model.config, model.read, windows, hessian=False, exact=True, boundary=Boundary(place)
    ):
        seen += list(found)
        if "blocks.2.experts.3.gate_proj" in found:
            break
    rest = gathered(model, windows, hessian=False, boundary=Boundary(place))
    assert next(iter(rest)) == "blocks.2.q_proj"
    for key, entry in rest.items():
        assert (entry.importance == whole[key].importance).all()


def test_each_matrix_is_read_once_for_all_windows(model):
    model.readings = 0
    gathered(model, draw_windows(count=6, length=16), hessian=False)
    few = model.readings
    model.readings = 0
    gathered(model, draw_windows(count=12, length=16), hessian=False)
    assert model.readings <= few + 4 * 8 * 3 and few <= 4 * (8 * 3 + 7) + 4
    assert model.readings <= 4 * (8 * 3 + 7) + 4


def test_the_report_says_what_experts_saw(model, tmp_path: Path):
    for found in walk(model.config, model.read, draw_windows(count=2, length=16), hessian=False):
        save(tmp_path / file_name(next(iter(found))), found)
    line = experts.describe_experts(
        model.config, Statistics.open(model.config, tmp_path, hessian=True)
    )
    assert line.startswith("Calibration tokens of an expert: 0 to ") or "median 8" in line
    assert "32 of 32 saw fewer than 128" in line
