"""The warning before a model is rounded that rounding does not suit."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import tiny

from compress.checkpoint.checkpoint import Checkpoint
from compress.plan.job import Job, prepare
from compress.plan.rounding import HURT, warn_of_rounding
from compress.recipe import load


@pytest.fixture
def job(tmp_path: Path) -> Job:
    checkpoint = Checkpoint.open(tiny.make("llama", tmp_path / "model"))
    return prepare(checkpoint, load("int4-fast"), transforms={})


def of_size(job: Job, layers: int, bits: float) -> Job:
    """The job of a model of so many blocks, whose matrices have so many bits per weight."""
    config = replace(job.config, num_hidden_layers=layers, layers=(0,) * layers)
    plans = [
        replace(
            plan,
            entries=tuple(
                replace(entry, nbytes=int(bits * prod(entry.shape) / 8))
                if entry.name.startswith("blocks.")
                else replace(entry, nbytes=100 * entry.nbytes)  # a large embedding hides nothing
                for entry in plan.entries
            ),
        )
        for plan in job.plans
    ]
    return replace(job, config=config, plans=tuple(plans))


def test_a_small_real_model_is_warned_of_rounding(job: Job) -> None:
    real = of_size(job, 200, 4.5)
    assert real.config.num_parameters in HURT
    warn_of_rounding(real)
    (line,) = job.checkpoint.warnings
    assert line.startswith("gguf, onnx, coreml: rtn without calibration is not enough")
    assert "-r phone-4bit" in line


@pytest.mark.parametrize(("layers", "bits"), [(2, 4.5), (4000, 4.5), (200, 8.5)])
def test_toys_large_models_and_eight_bits_are_not(job: Job, layers: int, bits: float) -> None:
    warn_of_rounding(of_size(job, layers, bits))
    assert job.checkpoint.warnings == []
