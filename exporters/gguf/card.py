"""Finds GGUF files of a build, and says how to run one and whether that works here."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

from compress.formats import Check, Usage

USAGE = Usage(
    "With [llama.cpp](https://github.com/ggml-org/llama.cpp), or from a Modelfile with "
    "[Ollama](https://ollama.com), which takes the chat template from the file:",
    "llama-cli -m {path} -p 'Once upon a time' -n 64\n\n"
    "echo FROM ./{path} > Modelfile\n"
    "ollama create my-model -f Modelfile\n"
    "ollama run my-model",
    "sh",
    shlex.quote,
)


def find(path: Path) -> list[Path]:
    """The ``.gguf`` file at a path, or those in a folder or in a build's folder."""
    if path.is_file():
        return [path] if path.suffix == ".gguf" else []
    return sorted((*path.glob("*.gguf"), *path.glob("gguf/*.gguf")))


def checks() -> list[Check]:
    """Check for a package with llama.cpp's C library."""
    for package in ("xllamacpp", "llama_cpp"):
        if importlib.util.find_spec(package) is not None:
            return [Check("llama.cpp", f"through {package}", True)]
    missing = "missing: GGUF files cannot be verified"
    return [Check("llama.cpp", missing, False, "pip install xllamacpp")]
