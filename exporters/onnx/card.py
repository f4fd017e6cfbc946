"""Finds ONNX folders of a build, and says how to run one."""

from __future__ import annotations

import json
from pathlib import Path

from compress.formats import Check, Usage

DOWNLOADED = 'snapshot_download({repo}, ignore_patterns=["*.gguf", "coreml/*"])'
GENAI = (
    "model = og.Model({})\n"
    "tokenizer = og.Tokenizer(model)\n"
    "stream = tokenizer.create_stream()\n"
    "parameters = og.GeneratorParams(model)\n"
    "parameters.set_search_options(max_length=128)\n"
    "generator = og.Generator(model, parameters)\n"
    'generator.append_tokens(tokenizer.encode("Once upon a time"))\n'
    "while not generator.is_done():\n"
    "    generator.generate_next_token()\n"
    '    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)'
)
OPTIMUM = (
    "from optimum.onnxruntime import ORTModelForCausalLM\n"
    "from transformers import AutoTokenizer\n\n"
    "tokenizer = AutoTokenizer.from_pretrained({})\n"
    "model = ORTModelForCausalLM.from_pretrained({})\n"
    'tokens = tokenizer("Once upon a time", return_tensors="pt")\n'
    "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=64)[0]))"
)
BROWSER = (
    'import {{ pipeline }} from "@huggingface/transformers";\n\n'
    'const generate = await pipeline("text-generation", PLACE);\n'
    'console.log(await generate("Once upon a time", {{ max_new_tokens: 64 }}));'
)


USAGE = (
    Usage(
        "With ONNX Runtime GenAI (`pip install onnxruntime-genai`, tried with 0.18):",
        "import onnxruntime_genai as og\n\n" + GENAI.format("{path}"),
        "python",
        repr,
        "import onnxruntime_genai as og\nfrom huggingface_hub import snapshot_download\n\n"
        + GENAI.format(DOWNLOADED),
    ),
    Usage(
        "With Transformers.js, in a browser (wasm or WebGPU) or in Node "
        "(`npm install @huggingface/transformers`, tried with 4.3):",
        BROWSER.replace("PLACE", '"./" + {path}'),  # without the dot it would be a Hub id
        "js",
        json.dumps,
        BROWSER.replace("PLACE", "{repo}"),
    ),
    Usage(
        "With Optimum, in an environment of its own (`pip install onnxruntime optimum==2.1.0 "
        "optimum-onnx==0.1.0 transformers==4.57.6`; later ones do not fit together):",
        OPTIMUM.format("{path}", "{path}"),
        "python",
        repr,
        OPTIMUM.format("{repo}", "{repo}"),
    ),
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
