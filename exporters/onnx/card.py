"""Finds ONNX folders of a build, and says how to run one."""

from __future__ import annotations

from pathlib import Path

from compress.formats import Check, Usage

USAGE = Usage(
    "With Optimum; ONNX Runtime GenAI and Transformers.js load the same folder:",
    "from optimum.onnxruntime import ORTModelForCausalLM\n"
    "from transformers import AutoTokenizer\n\n"
    "tokenizer = AutoTokenizer.from_pretrained({path})\n"
    "model = ORTModelForCausalLM.from_pretrained({path})\n"
    'tokens = tokenizer("Once upon a time", return_tensors="pt")\n'
    "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=64)[0]))",
    "python",
    repr,
)


def find(path: Path) -> list[Path]:
    """The ``.onnx`` file at a path, a folder with one, or that in a build's folder."""
    if path.is_file():
        return [path] if path.suffix == ".onnx" else []
    if list(path.glob("onnx/*.onnx")) or list(path.glob("*.onnx")):
        return [path]
    return [graph.parents[1] for graph in sorted(path.glob("onnx/onnx/*.onnx"))]


def checks() -> list[Check]:
    """No checks: onnxruntime is checked as a dependency."""
    return []
