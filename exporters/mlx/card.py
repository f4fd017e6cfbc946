"""Finds MLX folders of a build, says how to run one, and which Python has mlx-lm."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from compress.decoder.config_json import json_or_empty
from compress.errors import RuntimeMissingError
from compress.formats import Check, Usage

PYTHON = "PACKLIGHT_MLX_PYTHON"  # the setting: a Python of an environment that has mlx-lm

GENERATE = (
    "from mlx_lm import generate, load\n\n"
    "model, tokenizer = load({})\n"
    'print(generate(model, tokenizer, prompt="Once upon a time", max_tokens=64))'
)
SWIFT = (
    "import MLXLLM\nimport MLXLMCommon\n\n"
    "let folder = URL(filePath: {path})\n"
    "let model = try await loadModelContainer(directory: folder)\n"
    'print(try await ChatSession(model).respond(to: "Once upon a time"))'
)
DOWNLOADED = 'snapshot_download({repo}, allow_patterns="mlx/*") + "/mlx"'

USAGE = (
    Usage(
        "With [mlx-lm](https://github.com/ml-explore/mlx-lm) (`pip install mlx-lm`, tried with "
        "0.32.2; on Linux also `mlx[cpu]`, which is slow):",
        GENERATE.format("{path}"),
        "python",
        repr,
        "from huggingface_hub import snapshot_download\n" + GENERATE.format(DOWNLOADED),
    ),
    Usage(
        "In an app for iPhone or Mac, with "
        "[mlx-swift-lm](https://github.com/ml-explore/mlx-swift-lm) (not tried by packlight):",
        SWIFT,
        "swift",
        lambda path: '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"',
    ),
)


def find(path: Path) -> list[Path]:
    """The folder at a path, or that in a build's folder."""
    return [folder for folder in (path, path / "mlx") if is_quantized(folder)][:1]


def is_quantized(folder: Path) -> bool:
    """Whether a folder's ``config.json`` has the ``quantization`` of mlx-lm."""
    if not folder.is_dir() or not next(folder.glob("model*.safetensors"), None):
        return False
    stated = json_or_empty(folder / "config.json").get("quantization")
    return isinstance(stated, dict) and {"bits", "group_size"} <= stated.keys()


def runtime_python() -> str:
    """The Python that runs mlx-lm: ``PACKLIGHT_MLX_PYTHON``, or this one where it is installed.

    Raises:
        RuntimeMissingError: neither.
    """
    if named := os.environ.get(PYTHON):
        if found := shutil.which(named):
            return found
        raise RuntimeMissingError(
            f"{PYTHON} is {named!r}, which is no program",
            hint="--runtime-python takes the path of an environment's python",
        )
    if find_spec("mlx") and find_spec("mlx_lm"):
        return sys.executable
    raise RuntimeMissingError(
        "mlx-lm, which runs an MLX folder, is not installed",
        hint='pip install "packlight[mlx]"; or in an environment of its own (mlx-lm wants '
        "transformers 5) and --runtime-python its/bin/python; or --no-verify",
    )


check_runtime = runtime_python


def checks() -> list[Check]:
    """Check that a named Python is there; mlx-lm is optional."""
    try:
        return [Check("mlx-lm", runtime_python(), True)]
    except RuntimeMissingError as error:
        if os.environ.get(PYTHON):
            return [Check("mlx-lm", error.message, False, error.hint)]
        return [Check("mlx-lm", "not installed (optional: verifies -f mlx)", True)]
