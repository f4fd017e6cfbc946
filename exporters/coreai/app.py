"""What an app needs beside a Core AI program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.plan.job import Job
from compress.plan.shapes import Artifact
from exporters import app
from exporters.coreai.graph import INPUTS, STATES


def write_app_files(artifact: Artifact, job: Job, parity: Mapping[str, Any] | None) -> None:
    """Write the files of ``exporters.app`` into the bundle: see ``compress.formats``."""
    config, context = job.shape, artifact.plan.settings["context"]
    ids = f"1...{context}"
    cache = [config.num_hidden_layers, 1, config.num_key_value_heads, ids, config.head_dim]
    interface = app.Interface(
        inputs=[{"name": name, "dtype": "int32", "shape": [1, ids]} for name in INPUTS],
        states=[{"name": name, "dtype": "float16", "shape": cache} for name in STATES],
        outputs=({"name": "logits", "dtype": "float16", "shape": [1, ids, config.vocab_size]},),
        deployment={"iOS": "27.0", "macOS": "27.0"},
        context=context,
        package=artifact.path / f"{artifact.plan.model_name}.aimodel",
    )
    app.write_app_files(artifact, job, interface, parity)
