"""Longrope beyond the original context, in every format: both kinds of factors, and the switch."""

from __future__ import annotations

import json
from pathlib import Path

import gguf_oracle
import numpy as np
import pytest
import tiny
from commands import packlight, refused
from exported import Exported, Exports, config_of, reference
from writing import plan_for

from compress.checkpoint.checkpoint import Checkpoint
from compress.errors import UnsupportedModelError, UsageError
from compress.formats import get_format
from compress.plan.shapes import Runtime

ORIGINAL, CONTEXT = 256, 600
SETTINGS = {"gguf": {"type": "F16"}, "onnx": {"bits": 8, "accuracy_level": 0}}
CASES = [("phi3-longrope", "gguf"), ("phi3-longrope", "onnx"), ("phi4-mini", "onnx")]


def long_one(exported: Exports, family: str, name: str) -> tuple[Exported, Runtime]:
    """An artifact with room beyond the original context, and its runtime."""
    made = exported.write(
        name, exported.checkpoint(family), SETTINGS[name], name=family, context=CONTEXT
    )
    assert made.plan.max_context == CONTEXT
    return made, get_format(name).open_runtime(made.path, context=CONTEXT, threads=1)


def agree(name: str, found: np.ndarray, wanted: np.ndarray) -> None:
    if name == "onnx":
        assert np.abs(found - wanted).max() <= 1e-4
    else:  # whose cache is float16
        assert gguf_oracle.kl_divergence(wanted, found) < 2e-4


@pytest.mark.parametrize(("family", "name"), CASES)
def test_both_sides_of_the_switch(exported: Exports, family: str, name: str) -> None:
    made, runtime = long_one(exported, family, name)
    floats = reference(made)
    for length in (ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, CONTEXT, 40):
        ids = made.tokens(length, seed=length)
        agree(name, runtime.logits(ids), floats.logits(ids))
    ids = made.tokens(ORIGINAL + 1)  # what the last token does to all before it
    other = floats.logits(ids[:-1])
    assert gguf_oracle.kl_divergence(floats.logits(ids)[:-1], other) > 0.01
    with pytest.raises(UsageError, match=f"room for {CONTEXT}"):
        runtime.logits(made.tokens(CONTEXT + 1))
    runtime.close()


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_cached_text_that_grows_across_it(exported: Exports, family: str, name: str) -> None:
    made, runtime = long_one(exported, family, name)
    floats, ids = reference(made), made.tokens(ORIGINAL + 20)
    below, beyond = floats.logits(ids[:ORIGINAL]), floats.logits(ids)
    runtime.reset()
    agree(name, runtime.feed(ids[: ORIGINAL - 2])[None], below[-3:-2])
    agree(name, runtime.feed(ids[ORIGINAL - 2 : ORIGINAL])[None], below[-1:])
    found = [runtime.feed(ids[i : i + 1]) for i in range(ORIGINAL, ORIGINAL + 5)]
    agree(name, np.stack(found), beyond[ORIGINAL : ORIGINAL + 5])
    assert runtime.rewind(ORIGINAL + 2) == ORIGINAL + 2
    agree(name, runtime.extend(ids[ORIGINAL + 2 :]), beyond[ORIGINAL + 2 :])
    kept = runtime.rewind(ORIGINAL - 4)  # the long factors are in its keys
    agree(name, runtime.extend(ids[kept:ORIGINAL])[-4:], below[-4:])
    agree(name, runtime.extend(ids[ORIGINAL:]), beyond[ORIGINAL:])
    runtime.close()


def test_the_default_is_the_original_context(exported: Exports) -> None:
    config = exported.config("phi3-longrope")
    plan = plan_for("onnx", config, {})
    assert plan.max_context == ORIGINAL
    assert {e.shape[0] for e in plan.entries if e.name.startswith("rope.")} == {ORIGINAL}
    wide = config_of(Checkpoint.open(exported.checkpoint("phi3-longrope")), CONTEXT)
    both = plan_for("onnx", wide, {})
    rows = {e.shape[0] for e in both.entries if e.name.startswith("rope.")}
    assert rows == {ORIGINAL + CONTEXT}
    assert any("from their first token on" in note for note in both.notes)
    within = plan_for("onnx", wide, {"context": 100})
    assert {e.shape[0] for e in within.entries if e.name.startswith("rope.")} == {100}


@pytest.mark.parametrize("name", ["coreml", "coreai", "mlx"])
def test_other_formats_hold_the_original_context(exported: Exports, name: str) -> None:
    if not get_format(name).installed:
        pytest.skip(f"needs the extra packlight[{name}]")
    wide = config_of(Checkpoint.open(exported.checkpoint("phi3-longrope")), CONTEXT)
    plan = plan_for(name, wide, {}, context=CONTEXT)
    assert plan.max_context == ORIGINAL
    assert any(f"{ORIGINAL} positions, not 2048" in note for note in plan.notes)


def test_llama_cpp_rounds_contexts_up(exported: Exports) -> None:
    folder = exported.checkpoint("phi3-longrope", original_max_position_embeddings=300)
    config = config_of(Checkpoint.open(folder), CONTEXT)
    with pytest.raises(UnsupportedModelError, match="rounds contexts up to 256"):
        plan_for("gguf", config, {})


def test_a_build_for_more_positions(exported: Exports, tmp_path: Path) -> None:
    model = tiny.make("phi3-longrope", tmp_path / "model")
    done = packlight("build", model, "-o", tmp_path / "no", "--context", "2049")
    assert "more than the 2048 positions" in refused(done)
    out = tmp_path / "out"
    packlight(
        "build", model, "-f", "gguf", "-f", "onnx", "-o", out, "--context", "600", "--force",
        "--set", "verify.sequence_length=300", "--set", "verify.windows=2",
        "--set", "targets.gguf.type=Q8_0", "--set", "targets.onnx.bits=8",
    )  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert [row["max_context"] for row in report["artifacts"]] == [600, 600]
    assert all(row["kl_divergence"]["mean"] < 0.02 for row in report["artifacts"])
    again = packlight(
        "verify", out, "--baseline", model, "--sequence-length", "300", "--windows", "2", "--json"
    )
    rows = json.loads(again.stdout)["artifacts"]
    assert [row["max_context"] for row in rows] == [600, 600]
    for before, after in zip(report["artifacts"], rows, strict=True):
        assert after["kl_divergence"]["mean"] == before["kl_divergence"]["mean"]
    fits = packlight("fit", out / "onnx", "--context", "600", "--memory", "1GB", "--json")
    assert [row["context"] for row in json.loads(fits.stdout)["rows"]] == [600]
