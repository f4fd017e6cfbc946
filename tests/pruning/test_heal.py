"""Healing reduces the error of pruning, never raises it, and is recorded."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from commands import packlight
from tiny_sources import stored, texts

from compress.calibration.texts import CalibrationSet
from compress.checkpoint.sources import Source
from compress.console import Console
from compress.decoder.config import FUSED, WeightMap
from compress.decoder.decoder import Decoder
from compress.decoder.tokenizer import Tokenizer
from compress.demo import model_path
from compress.errors import RecipeError, UsageError
from compress.output.pruned_checkpoint import save_checkpoint
from compress.plan.cut import Healing, plan_cut
from compress.pruning.heal import Adam, Shares, heal
from compress.pruning.pruned import Shallower
from compress.pruning.step import Pruned, prune_source
from compress.recipe import load
from compress.recipe.model import Prune


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))


def pruned(source: Source, calibration: CalibrationSet | None = None, **settings) -> Pruned:
    cut = plan_cut(source.config, Prune(**settings))
    assert cut is not None
    return prune_source(source, cut, calibration or texts(source), Console("quiet", False))


def last_step(found: Pruned) -> dict:
    return found.source.config.raw["packlight"]["steps"][-1]


def weights(source: Source) -> dict[str, np.ndarray]:
    return {name: source.read(name) for name in WeightMap(source.config).names()}


# --- the optimizer and the clock --------------------------------------------------------------


def test_adam_is_that_of_torch_with_steps_of_each_tensors_size():
    random = torch.Generator().manual_seed(0)
    starts = [torch.randn(5, 3, generator=random) * scale for scale in (0.02, 1.0)]
    goals = [torch.randn(5, 3, generator=random) for _ in starts]
    for start, goal in zip(starts, goals, strict=True):
        ours, theirs = (start.clone().requires_grad_() for _ in range(2))
        rate = 0.01 * float(start.square().mean().sqrt())
        reference = torch.optim.Adam([theirs], lr=rate, betas=(0.9, 0.99), eps=1e-12)
        adam = Adam([ours])
        for _ in range(7):
            (ours - goal).square().sum().backward()
            adam.step(0.01)
            reference.zero_grad()
            (theirs - goal).square().sum().backward()
            reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        assert ours.grad is None


def test_minutes_are_divided_over_the_blocks():
    now = 0.0
    shares = Shares(Healing(minutes=1), 3, lambda: now)
    shares.next_block()  # 20 seconds for this one
    now = 10.0  # spent on computing targets
    shares.begin()
    assert shares.done(0) == 0
    now = 15.0
    assert shares.done(99) == pytest.approx(0.5)
    now = 24.0  # a step took longer than the remaining time
    assert shares.done(100) == 1
    shares.next_block()  # 36 seconds are left for two
    shares.begin()
    now = 33.0
    assert shares.done(1) == pytest.approx(0.5)
    now = 70.0  # and nothing for the last
    shares.next_block()
    shares.begin()
    assert shares.done(0) == 1


# --- what it does -----------------------------------------------------------------------------


def test_half_of_the_demos_mlp_heals_on_text_that_trained_nothing():
    source = stored(model_path())
    calibration = CalibrationSet.load(
        ["builtin"], Tokenizer(model_path()), tokens=2048, sequence_length=128, seed=0
    )
    found = pruned(source, calibration, method="ffn", ratio=0.5, heal={"steps": 8})
    step = last_step(found)
    before, after = (np.array(step["held_back_error"][key]) for key in ("before", "after"))
    assert step["steps_by_block"] == [8] * 6
    assert (after <= before).all()
    assert (after < before).sum() >= 4
    assert "8 steps a block" in found.notes[-1]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"method": "depth", "blocks": 1}),
        ("phi3", {"method": "ffn", "ratio": 0.5, "update": False}),
        ("phi", {"method": "ffn", "ratio": 0.5, "update": False}),
        ("qwen3", {"method": "heads", "ratio": 0.5}),
    ],
)
def test_a_healed_model_is_nearer_and_loads_in_transformers(family, settings, tmp_path):
    source = stored(tiny.make(family, tmp_path / "whole", num_hidden_layers=3))
    tokens = texts(source, 20).windows
    plain = pruned(source, texts(source, 20), **settings)
    found = pruned(source, texts(source, 20), **settings, heal={"steps": 24})
    step = last_step(found)
    assert sum(step["held_back_error"]["after"]) < sum(step["held_back_error"]["before"])

    def distance(other: Source) -> float:
        pairs = zip(
            Decoder(source.config, source.read).stream_logits(tokens),
            Decoder(other.config, other.read).stream_logits(tokens),
            strict=True,
        )
        return float(np.mean([np.square(a - b).mean() for a, b in pairs]))

    assert distance(found.source) < distance(plain.source)

    save_checkpoint(found.source, tmp_path / "saved")
    again = stored(tmp_path / "saved")
    for name, values in weights(found.source).items():
        np.testing.assert_array_equal(again.read(name), values)
    steps = again.checkpoint.config["packlight"]["steps"]
    assert [step["step"] for step in steps] == ["prune", "heal"]
    ours = Decoder(found.source.config, found.source.read).logits(tokens[0])
    with torch.no_grad():
        theirs = tiny.reference(tmp_path / "saved")(torch.tensor([tokens[0]])).logits[0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=5e-4)


def test_blocks_that_lost_nothing_stay_as_they_are(tmp_path):
    source = stored(tiny.make("llama", tmp_path / "m", num_hidden_layers=3))
    (tmp_path / "out").mkdir()
    found = heal(
        source, Shallower(source, source.config, range(3)), range(3), Healing(steps=4),
        texts(source).windows, tmp_path / "out", tmp_path,
    )  # fmt: skip
    assert found["before"] == found["after"]
    assert max(found["before"]) < 4e-6  # the rounding of states to bfloat16
    assert found["steps"] == [0, 0, 0]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_block_that_would_get_worse_stays_as_it_was(tmp_path):
    source = stored(tiny.make("llama", tmp_path / "m", num_hidden_layers=2))
    narrow = pruned(source, method="ffn", width=384).source
    (tmp_path / "out").mkdir()
    found = heal(
        source, narrow, range(2), Healing(steps=3), texts(source).windows, tmp_path / "out",
        tmp_path, rate=1000.0,
    )  # fmt: skip
    assert found["steps"] == [3, 3]
    assert found["after"] == found["before"]
    assert list((tmp_path / "out").iterdir()) == []


def test_a_dropped_blocks_work_is_what_the_block_before_it_learns(tmp_path):
    source = stored(tiny.make("llama", tmp_path / "m", num_hidden_layers=3))
    (tmp_path / "out").mkdir()
    short = Shallower(source, replace(source.config, num_hidden_layers=2), (0, 2))
    windows = texts(source).windows
    found = heal(
        source, short, (0, 2), Healing(steps=1), windows, tmp_path / "out", tmp_path
    )  # fmt: skip
    states = list(Decoder(source.config, source.read).walk(windows[3:]))  # the one held back
    goal, alone = states[2][0], states[1][0]
    error = ((alone - goal).square().sum(-1) / goal.square().sum(-1)).mean()
    assert found["before"][0] == pytest.approx(float(error), rel=0.01)  # states are bfloat16


# --- the same again ---------------------------------------------------------------------------


def test_steps_give_the_same_bytes_again(tmp_path, monkeypatch):
    source = stored(tiny.make("phi3", tmp_path / "m", num_hidden_layers=2))
    runs = []
    for cache in ("one", "two"):
        monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / cache))
        runs.append(pruned(source, method="ffn", width=256, update=False, heal={"steps": 5}))
    first, second = runs
    assert first.source.fingerprint() == second.source.fingerprint()
    assert first.notes == second.notes
    for name, values in weights(first.source).items():
        np.testing.assert_array_equal(second.source.read(name), values)
    plain = pruned(source, method="ffn", width=256, update=False)
    assert plain.source.fingerprint() != first.source.fingerprint()
    old, new = weights(plain.source), weights(first.source)
    assert any(not np.array_equal(old[name], new[name]) for name in old)
    monkeypatch.setattr("compress.pruning.heal.heal", None)  # would fail if it were called
    third = pruned(source, method="ffn", width=256, update=False, heal={"steps": 5})
    assert third.source.fingerprint() == second.source.fingerprint()


def test_the_clock_ends_a_block_between_steps(tmp_path):
    source = stored(tiny.make("llama", tmp_path / "m", num_hidden_layers=2))
    narrow = pruned(source, method="ffn", width=256, update=False).source
    (tmp_path / "out").mkdir()
    ticks = itertools.count()  # advances by a second at each call
    found = heal(
        source, narrow, range(2), Healing(minutes=1.0), texts(source).windows,
        tmp_path / "out", tmp_path, clock=lambda: float(next(ticks)),
    )  # fmt: skip
    assert all(8 <= steps <= 30 for steps in found["steps"])
    assert all(a < b for a, b in zip(found["after"], found["before"], strict=True))


def test_rows_and_fused_weights_read_alike(tmp_path):
    source = stored(tiny.make("mobilellm", tmp_path, num_hidden_layers=2, layer_sharing=True))
    found = pruned(source, method="ffn", width=256, heal={"steps": 3}).source
    shapes = WeightMap(found.config)
    for name, values in weights(found).items():
        assert values.shape == shapes.shape(name)
        np.testing.assert_array_equal(found.read(name, slice(3, 11)), values[3:11])
    for fused, members in FUSED.items():
        whole = np.concatenate([found.read(f"blocks.3.{m}.weight") for m in members])
        np.testing.assert_array_equal(found.read(f"blocks.2.{fused}.weight"), whole)
        for rows in (slice(250, 300), slice(0, 5), slice(len(whole) - 2, None), slice(7, 7)):
            np.testing.assert_array_equal(found.read(f"blocks.2.{fused}.weight", rows), whole[rows])


# --- words ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prune", "words"),
    [
        ("{heal: {steps: 3}}", "nothing is pruned"),
        ("{method: ffn, ratio: 0.5, heal: {}}", "name at least one of minutes, steps"),
        ("{method: ffn, ratio: 0.5, heal: {steps: 3, minutes: 1}}", "only one of minutes, steps"),
        ("{method: ffn, ratio: 0.5, heal: {minutes: 0}}", "prune.heal.minutes"),
        ("{method: ffn, ratio: 0.5, heal: {hours: 1}}", "unknown key prune.heal.hours"),
    ],
)
def test_recipes_that_cannot_be(prune, words):
    with pytest.raises(RecipeError, match=words):
        load("phone-4bit", [f"prune={prune}"])


def test_one_window_is_not_enough(tmp_path):
    source = stored(tiny.make("llama", tmp_path, num_hidden_layers=2))
    with pytest.raises(UsageError, match="two windows"):
        pruned(source, texts(source, 1), method="ffn", width=256, heal={"steps": 3})


def test_a_build_heals_and_its_card_says_so(tmp_path):
    model = tiny.make("llama", tmp_path / "m", num_hidden_layers=2)
    (tmp_path / "text.txt").write_text(tiny.TEXT * 3)
    build = (
        "build", model, "-r", "int4-fast", "-f", "onnx", "--no-verify", "--prune", "ffn:50%",
        "--calibration", "text.txt", "--set", "calibration.tokens=128",
        "--set", "calibration.sequence_length=32", "--threads", 1,
    )  # fmt: skip
    done = packlight(
        *build, "--set", "prune.heal.steps=2", "-o", "out", "--save-checkpoint", "saved",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    notes = json.loads((tmp_path / "out" / "report.json").read_text())["notes"]
    assert any(note.startswith("Healed for 2 steps a block") for note in notes)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "healed one by one (2 steps a block)" in card
    assert "steps_by_block" in card
