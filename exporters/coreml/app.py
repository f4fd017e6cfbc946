"""What an app needs beside a Core ML package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.plan.job import Job
from compress.plan.shapes import Artifact
from exporters import app
from exporters.coreml.planning import ANE


def write_app_files(artifact: Artifact, job: Job, parity: Mapping[str, Any] | None) -> None:
    """Write the files of ``exporters.app`` beside the package: see ``compress.formats``."""
    config, context = job.shape, artifact.plan.settings["context"]
    if artifact.plan.settings["preset"] == ANE:
        interface = app.Interface(
            inputs=({"name": "ids", "dtype": "int32", "shape": [1, "64 or 1"]},),
            states=(),  # the caller has them: chunks.json
            outputs=({"name": "logits_1 …", "dtype": "float16", "shape": [1, "rows", 1, "ids"]},),
            deployment={"iOS": "18.0"},
            context=context,
            swift=False,
        )
        app.write_app_files(artifact, job, interface, parity)
        return
    ids = f"1...{context}"
    cache = [config.num_hidden_layers, 1, config.num_key_value_heads, context, config.head_dim]
    states = ("keyCache", "valueCache")
    interface = app.Interface(
        inputs=(
            {"name": "inputIds", "dtype": "int32", "shape": [1, ids]},
            {"name": "causalMask", "dtype": "float16", "shape": [1, 1, ids, ids]},
        ),
        states=[{"name": name, "dtype": "float16", "shape": cache} for name in states],
        outputs=({"name": "logits", "dtype": "float16", "shape": [1, ids, config.vocab_size]},),
        deployment={"iOS": "18.0", "macOS": "15.0"},
        context=context,
    )
    app.write_app_files(artifact, job, interface, parity)
