"""Makes docs/families.md from the matrix of ``tiny_families.ROWS`` and the measured figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tiny_families import ROWS

from compress.decoder.families import ARCHITECTURES
from exporters.gguf.architectures import ARCHITECTURES as GRAPHS
from exporters.mlx.models import MODELS as MLX

FORMATS = {"gguf": "GGUF", "onnx": "ONNX", "coreml": "Core ML", "coreai": "Core AI", "mlx": "MLX"}
USUAL = {
    "llama": "Llama 2, 3, 3.2, SmolLM2, TinyLlama, Falcon 3, DeepSeek-R1 distills",
    "mistral": "Mistral 7B",
    "phi3": "Phi-3 mini and medium, Phi-3.5 mini, Phi-4 mini",
    "phi": "Phi-1, Phi-1.5, Phi-2",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3 dense",
    "mobilellm": "MobileLLM 125M to 1.5B",
}
WHY = {
    "smollm3-interval-2": "llama.cpp's graph has the interval 4 compiled in",
    "llama4_text-nope": "no graph of llama.cpp has its mixture of layers",
    "exaone4-window": "llama.cpp's graph has windows in models of 64 layers only",
    "phimoe": "llama.cpp's graph has RMSNorm for LayerNorm, and another choice of experts",
    "lfm2": "no state of a convolution",
    "qwen3_moe-plain": "llama.cpp's graph divides the chosen probabilities by their sum",
}
EXPERTS = "experts are not supported"
MLX_LACKING = "has norms of q and k in every layer"
WHY_OF_FORMAT = {
    "coreml": "no choice of weights by token on the Neural Engine",
    "coreai": "no graph of experts",
}

HEAD = """\
# Families

<!-- Made from tests/tiny_families.py and tests/golden/families.json by
`python -m pytest -n 0 -m "slow or not slow" tests/exporters/test_families.py --update-golden` -->

Which decoders packlight builds, and what was compared. Every row is a model of the family with
random weights (four blocks, hidden size 64 to 256, windows of 8), made by transformers; rows that
say *builds* are compared in the same way in tests of their own (`tests/tiny.py`).

- **Decoder**: packlight's float32 decoder, the reference of every verification. Its logits differ
  from those of transformers 4.57.6 (eager attention) by at most 1e-4, at 1, 12, 7, 9 and 100
  tokens, uncached and cached; each of the row's features switched off changes them by more than
  1e-2.
- **GGUF** is run by llama.cpp, **ONNX** by onnxruntime, **Core ML** by packlight's evaluator of
  Core ML programs (not on a device), **Core AI** by Apple's CPU runtime, as a float32 twin. **MLX**
  is run by the reference decoder, with weights and logits that equal mlx-lm's on 32 tokens
  ([mlx.md](mlx.md)). The figure is the KL divergence of the next token's probabilities from the
  float model at eight bits, in nats per token, over 59 tokens; at most 0.005 passes. Of experts in
  ONNX it is that from the decoded weights at four bits: of eight bits onnxruntime rounds their
  inputs to int8, too. Greedy
  tokens through the cache are the same as without (but for ties in float16).
- A target that cannot express a model refuses by name, the others build. *≤ window* means that
  llama.cpp or mlx-lm ignores the family's sliding window: the file is exact, and is verified, up
  to it.

Of a mixture of experts the router stays float. GGUF has llama.cpp's tensors of all experts, ONNX
onnxruntime's `QMoE`; gpt-oss's MXFP4 blocks go to GGUF bit for bit, whatever the type; pruning,
sparsity, AWQ's folds, budgets and `propagate: quantized` are refused with experts. Layers that
convolve in place of attention (LFM2) keep their last columns in place of keys and values; pruning,
sparsity and AWQ's folds are refused with them. State-space layers are not supported.

"""

TAIL = """
## Adding a family

A family whose features are known is 30 to 50 lines in four files. Granite as the example:

1. `compress/decoder/dense_families.py`: a row of `DENSE` (tensor names, class and model type, what
   a missing key means), and a function for the fields of `DecoderConfig` that differ from llama's.
   For granite four scalars:

   ```python
   def _granite(config: Config) -> dict[str, Any]:
       return attention_biases(config) | {
           "embed_scale": number(config, "embedding_multiplier", 1.0),
           "residual_scale": number(config, "residual_multiplier", 1.0),
           "attention_scale": number(config, "attention_multiplier", 1.0),
           "logit_scale": 1.0 / number(config, "logits_scaling", 1.0),
       }
   ```

   The decoder computes them as they are. For ONNX, Core ML and Core AI they are folded into the
   weights (`compress/checkpoint/scalars.py`), so that those exporters know nothing of them.
2. `exporters/gguf/architectures.py`: llama.cpp's graph, and which scalars it has itself; the others
   are folded. New keys of a graph go to `write_extras` in `exporters/gguf/metadata.py`.
3. `tests/tiny_families.py`: a tiny config with every feature on, and the features to switch off.
   The tests of the decoder and of every format follow from the row, and so does this page.
4. `exporters/gguf/splitting.py`, if its tokenizer splits text in a new way: its pattern and
   llama.cpp's name for it; `tests/exporters/gguf/test_splitting.py` compares the two.
"""


def page(figures: Mapping[str, Mapping[str, float]]) -> str:
    """The text of docs/families.md."""
    return HEAD + "\n".join(lines(figures)) + "\n" + TAIL


def lines(figures: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """The table, and what is refused."""
    classes = {family: name for name, family in ARCHITECTURES.items()}
    titles = " | ".join(FORMATS.values())
    yield f"| family | class | models | llama.cpp's graph | {titles} | refused |"
    yield "|---" * (len(FORMATS) + 5) + "|"
    for family, models in USUAL.items():
        cells = ["builds"] * len(FORMATS)
        graph = GRAPHS[family].name
        yield f"| {family} | {classes[family]} | {models} | {graph} | {' | '.join(cells)} | |"
    for name, row in ROWS.items():
        family = family_of(name)
        graph = GRAPHS[family].name if family in GRAPHS else "–"
        cells = [cell(name, key, figures) for key in FORMATS]
        why = "; ".join(
            f"{FORMATS[key]}: {reason(key, name, part)}"
            for key in FORMATS
            if (part := refused_by(key, name))
        )
        label = f"`{classes[family]}`" if row.models else ""
        yield (f"| {name} | {label} | {row.models} | {graph} | {' | '.join(cells)} | {why} |")


def family_of(name: str) -> str:
    """The family of a row: its model type."""
    return str(ROWS[name].config["model_type"])


def refused_by(key: str, name: str) -> str:
    """A part of the reason why a format refuses a row; empty where it does not."""
    if key == "mlx":
        if family_of(name) not in MLX:
            return "mlx-lm has no model class"
        return MLX_LACKING if name == "llama4_text-nope" else ""
    return ROWS[name].refused.get(key, "")


def reason(key: str, name: str, part: str) -> str:
    """Why a format refuses a row, for the page."""
    if key == "mlx":
        return part
    return WHY_OF_FORMAT[key] if part == EXPERTS else WHY[name]


def told_by(key: str, name: str) -> str:
    """A part of a format's note on what its runtime lacks for a row; empty for nothing."""
    if key == "mlx":
        windows = ROWS[name].config.get("sliding_window") and not MLX[family_of(name)].windows
        return "mlx-lm ignores the sliding window" if windows else ""
    return ROWS[name].told.get(key, "")


def cell(name: str, key: str, figures: Mapping[str, Mapping[str, float]]) -> str:
    """A format's figure for a row; only what was measured has one."""
    if refused_by(key, name):
        return "refused"
    found = figures.get(name, {}).get(key)
    if found is None:
        return "not run"
    return f"{found:.1e} ≤ window" if told_by(key, name) else f"{found:.1e}"
