"""Finds GGUF files of a build, and says how to run one and whether that works here."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

from compress.formats import Check, Usage

OLLAMA = (
    "echo FROM ./{path} > Modelfile\n"
    "ollama create my-model -f Modelfile\n"
    "ollama run my-model"
)  # fmt: skip
USAGE = (
    Usage(
        "With [llama.cpp](https://github.com/ggml-org/llama.cpp):",
        "llama-cli -m {path} -p 'Once upon a time' -n 64",
        "sh",
        shlex.quote,
        "llama-cli --hf-repo {repo} --hf-file {path} -p 'Once upon a time' -n 64",
    ),
    Usage(
        "With [Ollama](https://ollama.com), from a Modelfile; the chat template is in the file:",
        OLLAMA,
        "sh",
        shlex.quote,
        "hf download {repo} {path} --local-dir .\n" + OLLAMA,
    ),
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
